"""STL-10 from torchvision's files."""

from __future__ import annotations

import numpy as np
import torch

from muscle_plugin.data.datasets.download import find_or_download
from muscle_plugin.data.source import Source, SourceOptions, consecutive, resize
from muscle_plugin.errors import DataError
from muscle_plugin.text import shown

_BYTES = 3 * 96 * 96  # of an image
_AT_A_TIME = 1024  # images


def stl10(options: SourceOptions) -> Source:
    """Read STL-10: 5,000 labelled and 100,000 unlabelled training images, 8,000 test images, 96 x 96 (3.1 GB)."""
    root = find_or_download("stl10", options.data_dir, "stl10_binary", ("train_X.bin",))

    def content(file: str) -> np.ndarray:
        try:
            return np.memmap(root / file, np.uint8, "r")
        except (OSError, ValueError) as e:
            raise DataError(f"{root / file}: cannot be read ({shown(e)})") from None

    def labels_in(file: str, count: int) -> torch.Tensor:
        found = torch.from_numpy(content(file).astype(np.int64)) - 1  # from 1 in the file
        if len(found) != count or found.min() < 0 or found.max() > 9:
            raise DataError(f"{root / file}: expected {count} labels from 1 to 10")
        return found

    files = [f"{part}_X.bin" for part in ("train", "unlabeled", "test")]
    pixels = [content(file) for file in files]
    for file, part in zip(files, pixels, strict=True):
        if len(part) % _BYTES:
            raise DataError(f"{root / file}: {len(part)} bytes are not a whole number of 96 x 96 images")
    train, unlabelled, test = (len(part) // _BYTES for part in pixels)
    size = options.img_size
    images = torch.empty((train + unlabelled + test, 3, size, size), dtype=torch.uint8)
    start = 0
    for part in pixels:
        for first in range(0, len(part), _AT_A_TIME * _BYTES):
            chunk = torch.from_numpy(part[first : first + _AT_A_TIME * _BYTES].reshape(-1, 3, 96, 96).copy())
            done = resize(chunk.transpose(2, 3).contiguous(), size)  # columns come before rows in the file
            images[start : start + len(done)] = done
            start += len(done)
    labels = torch.cat([labels_in("train_y.bin", train), torch.full((unlabelled,), -1), labels_in("test_y.bin", test)])
    try:
        names = tuple((root / "class_names.txt").read_text().split())
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{root / 'class_names.txt'}: cannot be read ({shown(e)})") from None
    return Source(images, labels, *consecutive(train + unlabelled, test), names)
