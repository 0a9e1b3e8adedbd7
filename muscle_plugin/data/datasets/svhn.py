"""SVHN from torchvision's files."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from muscle_plugin.data.datasets.download import find_or_download
from muscle_plugin.data.source import Source, SourceOptions, consecutive
from muscle_plugin.errors import DataError
from muscle_plugin.text import first_line


def svhn(options: SourceOptions, parts: tuple[str, ...] = ("train", "extra", "test")) -> Source:
    """Read SVHN as USB uses it: 73,257 training images, 531,131 extra ones if they are among ``parts``, 26,032 test images."""
    from scipy.io import loadmat

    files = tuple(f"{part}_32x32.mat" for part in parts)
    root = find_or_download("svhn", options.data_dir, "", files, parts)
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for file in files:
        try:
            content = loadmat(root / file, variable_names=["X", "y"])
            pixels = torch.from_numpy(content["X"]).permute(3, 2, 0, 1)  # the file has (32, 32, 3, N)
            if pixels.shape[1:] != (3, 32, 32) or pixels.dtype != torch.uint8:
                raise ValueError(f"expected (32, 32, 3, N) uint8 images, found {content['X'].shape}")
            images.append(pixels)
            labels.append(torch.from_numpy(content["y"].astype(np.int64).ravel()) % 10)  # the file writes 0 as 10
        except Exception as e:  # SciPy raises whatever it meets
            raise DataError(f"{root / file}: not a file of SVHN ({first_line(e)}); download it again") from None
    members = consecutive(sum(map(len, labels[:-1])), len(labels[-1]))
    return Source(torch.cat(images), torch.cat(labels), *members, tuple("0123456789"))
