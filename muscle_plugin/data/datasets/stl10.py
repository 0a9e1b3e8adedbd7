"""STL-10 from torchvision's files."""

from __future__ import annotations

import numpy as np
import torch

from muscle_plugin.data.datasets.download import find_or_download
from muscle_plugin.data.source import Source, SourceOptions, consecutive, resize
from muscle_plugin.errors import DataError
from muscle_plugin.text import shown

_BYTES = 3 * 96 * 96  # of an image
_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def stl10(options: SourceOptions) -> Source:
    """Read STL-10: 5,000 labelled and 100,000 unlabelled training images, 8,000 test images, 96 x 96 (3.1 GB)."""
    root = find_or_download("stl10", options.data_dir, "stl10_binary", ("train_X.bin",), ("train",))

    def content(file: str) -> torch.Tensor:
        try:
            return torch.from_numpy(np.memmap(root / file, np.uint8, "c"))  # torch wants to be able to write
        except (OSError, ValueError) as e:
            raise DataError(f"{root / file}: cannot be read ({shown(e)})") from None

    def images_in(file: str) -> torch.Tensor:
        found = content(file)
        if len(found) % _BYTES:
            raise DataError(f"{root / file}: {len(found)} bytes are not a whole number of 96 x 96 images")
        # columns come before rows in the file
        return resize(found.view(-1, 3, 96, 96).transpose(2, 3), options.img_size)

    def labels_in(file: str, count: int) -> torch.Tensor:
        found = content(file).long() - 1  # from 1 in the file
        if len(found) != count or found.min() < 0 or found.max() > 9:
            raise DataError(f"{root / file}: expected {count} labels from 1 to 10")
        return found

    train, unlabelled, test = parts = [images_in(f"{part}_X.bin") for part in ("train", "unlabeled", "test")]
    hidden = torch.full((len(unlabelled),), -1)
    labels = torch.cat([labels_in("train_y.bin", len(train)), hidden, labels_in("test_y.bin", len(test))])
    return Source(torch.cat(parts), labels, *consecutive(len(train) + len(unlabelled), len(test)), _CLASSES)
