"""Mini-ImageNet."""

from __future__ import annotations

from pathlib import Path

import torch

from muscle_plugin.data.datasets.image_files import LabelledFile, class_folders, read_image_files
from muscle_plugin.data.images import find_images
from muscle_plugin.data.source import Source, SourceOptions
from muscle_plugin.errors import DataError
from muscle_plugin.seeding import derive

_PLACES = ("", "miniimagenet", "mini-imagenet", "mini_imagenet", "MiniImageNet")


def miniimagenet(
    options: SourceOptions, num_classes: int = 100, per_class: int = 600, test_per_class: int = 100
) -> Source:
    """Read Mini-ImageNet, divided as in the paper (section 5.1): of 600 images of each of 100 classes, 100 drawn by
    ``options.seed`` are test images.

    ``data_dir`` (or ``miniimagenet/`` in it) holds one folder per class, or the usual train/, val/ and test/ of 64, 16 and
    20 such folders, whose union is taken.
    """
    for root in (options.data_dir / place for place in _PLACES):
        if found := _class_images(root):
            break
    else:
        raise DataError(
            f"miniimagenet is not in {options.data_dir}, and has no public download. Put its images there as"
            " train/<class>/*, val/<class>/* and test/<class>/*, or as <class>/*, or give their folder as --data_dir"
        )
    if len(found) != num_classes:
        raise DataError(f"{root}: Mini-ImageNet has {num_classes} classes, found folders of {len(found)}")
    generator = torch.Generator().manual_seed(derive(options.seed, "division"))
    items = []
    for name, files in sorted(found.items()):
        if len(files) != per_class:
            raise DataError(f"{root}: Mini-ImageNet has {per_class} images of class {name}, found {len(files)}")
        drawn = set(torch.randperm(per_class, generator=generator)[:test_per_class].tolist())
        items += [LabelledFile(f, name, i in drawn) for i, f in enumerate(files)]
    return read_image_files("miniimagenet", root, items, sorted(found), options)


def _class_images(root: Path) -> dict[str, list[Path]]:
    """Class name -> its images, in either layout; empty if ``root`` has neither."""
    parts = [root / p for p in ("train", "val", "test") if (root / p).is_dir()]
    folders = [f for p in parts or [root] for f in class_folders(p)]
    return {f.name: files for f in folders if (files := find_images(f))} if len(folders) > 1 else {}
