"""The 13-layer net of Temporal Ensembling, Mean Teacher and label propagation, which MUSCLE's Tables 1, 2 and 4 use."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from muscle_plugin.nets.base import USBNet
from muscle_plugin.nets.options import channels


def _conv(i: int, o: int, kernel: int, padding: int) -> nn.Sequential:
    return nn.Sequential(weight_norm(nn.Conv2d(i, o, kernel, padding=padding)), nn.BatchNorm2d(o), nn.LeakyReLU(0.1))


def _pool(dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.MaxPool2d(2), *([nn.Dropout(dropout)] if dropout else []))


class CNN13(USBNet):
    """3 x conv 128, 3 x conv 256, then 512, 256 and 128 channels; max-pool and dropout after each of the first two
    groups; weight norm, batch norm and LeakyReLU(0.1) throughout. For 32 x 32 images; 3,125,908 parameters at C = 10,
    3,127,208 with two heads.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        dropout, input_noise, width, double_head, l2_feature: see :class:`muscle_plugin.nets.options.NetOptions`.
    """

    OPTIONS = (*USBNet.OPTIONS, "width")
    MIN_SIZE = 12

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        dropout: float = 0.5,
        width: float = 1.0,
        **shared: Any,
    ) -> None:
        super().__init__(in_channels, **shared)
        a, b, c = (channels(n, width) for n in (128, 256, 512))
        self.blocks = nn.Sequential(
            nn.Sequential(_conv(in_channels, a, 3, 1), _conv(a, a, 3, 1), _conv(a, a, 3, 1)),
            _pool(dropout),
            nn.Sequential(_conv(a, b, 3, 1), _conv(b, b, 3, 1), _conv(b, b, 3, 1)),
            _pool(dropout),
            nn.Sequential(_conv(b, c, 3, 0), _conv(c, b, 1, 0), _conv(b, a, 1, 0)),
        )
        self.set_heads(a, num_classes, weight_normed=True)

    def extract(self, x: Tensor) -> Tensor:
        return self.blocks(x)
