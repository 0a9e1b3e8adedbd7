"""Data sets whose images are files of their own: decoded once, packed into an array file, bad ones reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from muscle_plugin.data.images import leads_out, name_below, of_the_user
from muscle_plugin.data.packed import pack
from muscle_plugin.data.source import Source, SourceOptions
from muscle_plugin.errors import DataError


@dataclass(frozen=True)
class LabelledFile:
    """An image file, its class (None: unlabelled), and whether it is a test image."""

    path: Path
    label: str | None
    test: bool = False


def read_image_files(
    name: str, root: Path, items: Sequence[LabelledFile], classes: Sequence[str], options: SourceOptions,
    notes: Sequence[str] = (),
) -> Source:  # fmt: skip
    """Make a data set of image files below ``root``."""
    files = [x.path for x in items]
    if not options.allow_outside and (path := leads_out(root, files)):
        raise DataError(f"{path}: a link out of {root}; --allow_outside true follows such links")
    packed = pack(name, root, files, options.img_size, options.cache_dirs, options.pixel_range)
    notes = [*notes, *packed.notes]
    good = torch.ones(len(files), dtype=torch.bool)
    if packed.bad:
        if not options.skip_bad_images:
            raise DataError(f"{packed.faults()}. --skip-bad-images leaves them out")
        good[list(packed.bad)] = False
        notes = [*notes, f"left out: {packed.faults()}"]
    number = {c: i for i, c in enumerate(classes)}
    labels = torch.tensor([-1 if x.label is None else number[x.label] for x in items])
    is_test = torch.tensor([x.test for x in items])
    train, test = ((good & chosen).nonzero().flatten() for chosen in (~is_test, is_test))
    names = [str(name_below(root, f)) for f in files]
    return Source(
        packed.images, labels, train, test, tuple(classes),
        notes=tuple(notes), names=names, pixel_range=packed.pixel_range,
    )  # fmt: skip


def class_folders(folder: Path) -> list[Path]:
    """Return the folders in ``folder``, if it is one, in order of name; without those that are not the user's."""
    inside = folder.iterdir() if folder.is_dir() else ()
    return sorted(p for p in inside if p.is_dir() and of_the_user(p.name))
