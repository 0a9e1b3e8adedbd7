"""EuroSAT (RGB)."""

from __future__ import annotations

from pathlib import Path

from muscle_plugin.data.datasets.image_files import class_folders, read_image_files
from muscle_plugin.data.images import find_images
from muscle_plugin.data.source import Source, SourceOptions
from muscle_plugin.errors import DataError

_CLASSES = 10
_TRAINING_SHARE = 0.8
_PLACES = ("eurosat/2750", "eurosat", "EuroSAT_RGB", "2750", "")


def eurosat(options: SourceOptions) -> Source:
    """Read EuroSAT (RGB), divided as in USB: the first 80 % of each class's files in order of name are training images,
    the rest test images.

    ``data_dir``, or ``eurosat/2750/`` (torchvision's), ``eurosat/`` (USB's) or ``2750/`` in it, holds one folder per class.

    Raises:
        DataError: there are no such folders, or not 10, or an image cannot be read.
    """
    places = [options.data_dir / place for place in _PLACES]
    root = next((p for p in places if p.is_dir() and len(class_folders(p)) == _CLASSES), None)
    if root is None:
        raise DataError(
            f"eurosat is not in {options.data_dir}: expected {_CLASSES} folders of images, one per class, in"
            " eurosat/2750/, eurosat/ or that folder itself (EuroSAT.zip, the RGB version)"
        )
    files: list[Path] = []
    labels: list[int] = []
    test: list[bool] = []
    folders = class_folders(root)
    for label, folder in enumerate(folders):
        members = sorted(find_images(folder), key=lambda p: p.name)
        if len(members) < 2:
            raise DataError(f"{folder}: no images in it")
        training = int(_TRAINING_SHARE * len(members))
        files += members
        labels += [label] * len(members)
        test += [i >= training for i in range(len(members))]
    return read_image_files("eurosat", root, files, labels, test, [f.name for f in folders], options)
