"""EuroSAT (RGB)."""

from __future__ import annotations

from muscle_plugin.data.datasets.image_files import LabelledFile, class_folders, read_image_files
from muscle_plugin.data.images import find_images
from muscle_plugin.data.source import Source, SourceOptions
from muscle_plugin.errors import DataError

_CLASSES = 10
_PLACES = ("eurosat/2750", "eurosat", "EuroSAT_RGB", "2750", "")


def eurosat(options: SourceOptions) -> Source:
    """Read EuroSAT (RGB), divided as in USB: the first 80 % of each class's files in order of name are training images.

    ``data_dir``, or ``eurosat/2750/`` (torchvision's), ``eurosat/`` (USB's) or ``2750/`` in it, holds one folder per class.
    """
    for root in (options.data_dir / place for place in _PLACES):
        folders = class_folders(root)
        if len(folders) == _CLASSES:
            break
    else:
        raise DataError(
            f"eurosat is not in {options.data_dir}: expected {_CLASSES} folders of images, one per class, in"
            " eurosat/2750/, eurosat/ or that folder itself (EuroSAT.zip, the RGB version)"
        )
    items = []
    for folder in folders:
        files = sorted(find_images(folder), key=lambda p: p.name)
        if len(files) < 2:
            raise DataError(f"{folder}: no images in it")
        items += [LabelledFile(f, folder.name, i >= int(0.8 * len(files))) for i, f in enumerate(files)]
    return read_image_files("eurosat", root, items, [f.name for f in folders], options)
