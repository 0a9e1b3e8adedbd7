"""A small convolutional net for small images: a thousand steps take seconds to a minute on one CPU core."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from muscle_plugin.nets.base import USBNet
from muscle_plugin.nets.options import NetOptions, channels, refuse_pretrained


def _conv(i: int, o: int, kernel: int, stride: int, padding: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, kernel, stride, padding, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class SmallCNN(USBNet):
    """Two 5x5 convolutions of stride 2, then a 4x4 one without padding; batch norm and ReLU after each.

    On 16 x 16 images the last one sees the whole image at once: unlike a mean over positions, its features tell a stroke
    above from one below, which is what tells digits apart. On larger images its outputs are averaged over positions.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        width: channels of the first convolution; the others have twice and four times as many.
        dropout, input_noise, double_head, l2_feature: see :class:`muscle_plugin.nets.options.NetOptions`.
    """

    OPTIONS = (*USBNet.OPTIONS, "width")
    #: Smallest side of an image for which the last convolution has an input of 4 x 4.
    MIN_SIZE = 13

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 1,
        width: int = 32,
        dropout: float = 0.0,
        **shared: Any,
    ) -> None:
        super().__init__(in_channels, head_dropout=dropout, **shared)
        self.blocks = nn.Sequential(
            _conv(in_channels, width, 5, 2, 2), _conv(width, 2 * width, 5, 2, 2), _conv(2 * width, 4 * width, 4, 1, 0)
        )
        self.set_heads(4 * width, num_classes)

    def extract(self, x: Tensor) -> Tensor:
        if min(x.shape[-2:]) < self.MIN_SIZE:
            raise ValueError(
                f"small_cnn takes images of {self.MIN_SIZE} x {self.MIN_SIZE} or more, got {tuple(x.shape)}"
            )
        return self.blocks(x)


def small_cnn(
    num_classes: int,
    in_channels: int = 1,
    pretrained: bool = False,
    pretrained_path: Any = None,
    options: NetOptions | None = None,
) -> SmallCNN:
    """Builder in USB's form. ``pretrained`` has no weights to offer and is refused."""
    refuse_pretrained("small_cnn", pretrained)
    arguments = NetOptions.of("small_cnn", options).arguments("small_cnn", SmallCNN.OPTIONS)
    if "width" in arguments:
        arguments["width"] = channels(32, arguments["width"])
    return SmallCNN(num_classes, in_channels, **arguments)
