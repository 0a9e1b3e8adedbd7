"""Images as a net takes them: resized, and with zero mean and unit variance per channel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

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


@dataclass(frozen=True)
class Preprocessing:
    """How a net takes images: at which side (None: as they are), by which interpolation, bilinear or bicubic, and normalised
    by which mean and standard deviation, (c,) each (None: the data set's)."""

    size: int | None = None
    interpolation: str = "bilinear"
    statistics: tuple[Tensor, Tensor] | None = None


AS_THEY_ARE = Preprocessing()


@cache
def resize_matrix(
    new: int, old: int, device: torch.device, interpolation: str = "bilinear", antialias: bool = False
) -> Tensor:
    """(new, old) weights that resize a side: ``R @ x @ R.T`` resizes images ``x``; bilinear or bicubic, antialiased as
    Pillow's."""
    one = torch.eye(old, device=device).view(1, 1, old, old)
    return F.interpolate(one, (new, old), mode=interpolation, antialias=antialias).view(new, old)


class Normaliser:
    """Resizes (N, c, H, W) images, uint8 or float in [0, 1], to ``size`` (None: leaves their size), normalises them, and
    repeats a single channel to ``channels``.

    ``mean`` and ``std`` are (c,) or, for grey images and a net of three channels, (3,), as fractions of 255. A byte is
    multiplied by ``scale``, and ``shift`` is added: (1, c, 1, 1). ``interpolation`` is bilinear or bicubic.
    """

    def __init__(
        self, mean: Tensor, std: Tensor, channels: int, device: torch.device, size: int | None = None,
        interpolation: str = "bilinear",
    ) -> None:  # fmt: skip
        if len(mean) not in (1, channels):
            raise DataError(f"the net takes {channels} channel(s), but the images have {len(mean)}")
        self._mean, self._std = mean.view(1, -1, 1, 1).to(device), std.view(1, -1, 1, 1).to(device)
        self.scale, self.shift = 1 / (255 * self._std), -self._mean / self._std
        self._channels, self._size, self._interpolation = channels, size, interpolation

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != torch.uint8:
            return self.resize((x - self._mean) / self._std)
        if x.shape[1] < self.scale.shape[1]:  # grey images, statistics of colours
            x = x.expand(-1, self._channels, -1, -1)
        return self.resize(x.float().mul_(self.scale).add_(self.shift))

    def resize(self, x: Tensor) -> Tensor:
        """Normalised images at the size, and with the channels, that the net takes."""
        if self._size is not None and x.shape[2:] != (self._size, self._size):
            how = (x.device, self._interpolation, True)
            rows, columns = (resize_matrix(self._size, side, *how) for side in x.shape[2:])
            x = rows @ x @ columns.t()
        return x.repeat(1, self._channels, 1, 1) if x.shape[1] < self._channels else x

    def undo(self, x: Tensor) -> Tensor:
        """Return normalised images as pictures of c channels, in [0, 1]."""
        return (x[:, : self._mean.shape[1]] * self._std + self._mean).clamp(0, 1)
