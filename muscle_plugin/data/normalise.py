"""Pixels to zero mean and unit variance per channel."""

from __future__ import annotations

import torch
from torch import Tensor

from muscle_plugin.data.source import Source
from muscle_plugin.errors import DataError


def pixel_statistics(source: Source) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation of each channel, (channels,) float32 as fractions of 255, over at most 10,000
    of the training images."""
    chosen = source.train[:: max(1, len(source.train) // 10_000)]
    counts = torch.zeros(source.images.shape[1], 256, dtype=torch.float64)
    for part in chosen.split(500):
        images = source.images[part]
        for channel, row in enumerate(counts):
            row += torch.bincount(images[:, channel].flatten(), minlength=256)
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts /= counts.sum(1, keepdim=True)
    mean = counts @ levels
    std = (counts @ levels**2 - mean**2).clamp_min(1e-6).sqrt()
    return mean.float(), std.float()


class Normaliser:
    """Normalises (N, c, H, W) images, uint8 or float in [0, 1], and repeats a single channel to ``channels``.

    ``mean`` and ``std`` are (c,), as fractions of 255. A byte is multiplied by ``scale``, and ``shift`` is added: (1, c, 1, 1).
    """

    def __init__(self, mean: Tensor, std: Tensor, channels: int, device: torch.device) -> None:
        have = len(mean)
        if have not in (1, channels):
            raise DataError(f"the net takes {channels} channel(s), but the images have {have}")
        self._mean, self._std = mean.view(1, -1, 1, 1).to(device), std.view(1, -1, 1, 1).to(device)
        self.scale, self.shift = 1 / (255 * self._std), -self._mean / self._std
        self._repeat = channels // have

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float().mul_(self.scale).add_(self.shift) if x.dtype == torch.uint8 else (x - self._mean) / self._std
        return x.repeat(1, self._repeat, 1, 1) if self._repeat > 1 else x

    def undo(self, x: Tensor) -> Tensor:
        """Return normalised images as pictures of c channels, in [0, 1]."""
        return (x[:, : self._mean.shape[1]] * self._std + self._mean).clamp(0, 1)
