"""A small convolutional net for small images: a thousand steps take seconds to a minute on one CPU core."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from muscle_plugin.nets.base import USBNet
from muscle_plugin.nets.options import channels


def _conv(i: int, o: int, kernel: int, stride: int, padding: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, kernel, stride, padding, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class SmallCNN(USBNet):
    """Two 5x5 convolutions of stride 2, then a 4x4 one without padding; batch norm and ReLU after each.

    On 16 x 16 images the last one sees the whole image at once: unlike a mean over positions, its features tell a stroke
    above from one below, which is what tells digits apart. On larger images its outputs are averaged over positions.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        width: factor on the channels, 32 in the first convolution; the others have twice and four times as many.
        dropout, input_noise, double_head, l2_feature: see :class:`muscle_plugin.nets.options.NetOptions`.
    """

    OPTIONS = (*USBNet.OPTIONS, "width")
    #: Smallest side of an image for which the last convolution has an input of 4 x 4.
    MIN_SIZE = 13

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 1,
        width: float = 1.0,
        dropout: float = 0.0,
        **shared: Any,
    ) -> None:
        super().__init__(in_channels, head_dropout=dropout, **shared)
        n = channels(32, width)
        self.blocks = nn.Sequential(
            _conv(in_channels, n, 5, 2, 2), _conv(n, 2 * n, 5, 2, 2), _conv(2 * n, 4 * n, 4, 1, 0)
        )
        self.set_heads(4 * n, num_classes)

    def extract(self, x: Tensor) -> Tensor:
        return self.blocks(x)
