"""Data sets whose images are files of their own: decoded once, packed into an array file, bad ones reported."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from muscle_plugin.data.images import leads_out, name_below
from muscle_plugin.data.packed import pack
from muscle_plugin.data.source import Source, SourceOptions
from muscle_plugin.errors import DataError


def read_image_files(
    name: str,
    root: Path,
    files: Sequence[Path],
    labels: Sequence[int],
    test: Sequence[bool],
    classes: Sequence[str],
    options: SourceOptions,
    notes: Sequence[str] = (),
) -> Source:
    """Make a data set of image files below ``root``, of which each has a label (-1: none) and is a test image or not.

    Raises:
        DataError: a link leads out of ``root``, or a file is unreadable, and the options do not allow it.
    """
    if not options.allow_outside and (path := leads_out(root, files)):
        raise DataError(f"{path}: a link out of {root}; --allow_outside true follows such links")
    packed = pack(name, root, files, options.img_size, options.cache_dirs)
    good = torch.ones(len(files), dtype=torch.bool)
    if packed.bad:
        listed = f"{len(packed.bad)} image file(s)", packed.faults()
        if not options.skip_bad_images:
            raise DataError("{} cannot be used: {}. --skip-bad-images leaves them out".format(*listed))
        good[list(packed.bad)] = False
        notes = [*notes, "left out {}: {}".format(*listed)]
    is_test = torch.tensor(test)
    train, tested = ((good & chosen).nonzero().flatten() for chosen in (~is_test, is_test))
    names = [str(name_below(root, f)) for f in files]
    return Source(packed.images, torch.tensor(labels), train, tested, tuple(classes), notes=tuple(notes), names=names)


def read_classes(
    name: str, root: Path, classes: Mapping[str, tuple[Sequence[Path], Collection[int]]], options: SourceOptions
) -> Source:
    """Make a data set of the files of each class, and the positions of the test images among them."""
    files = [f for members, _ in classes.values() for f in members]
    labels = [c for c, (members, _) in enumerate(classes.values()) for _ in members]
    test = [i in tested for members, tested in classes.values() for i in range(len(members))]
    return read_image_files(name, root, files, labels, test, list(classes), options)


def class_folders(folder: Path) -> list[Path]:
    """Return the folders in ``folder``, in order of name; hidden ones are left out."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
