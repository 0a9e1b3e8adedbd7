"""A small convolutional net for small images: four convolutions, seconds per thousand steps on one CPU core."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from muscle_plugin.nets.base import USBNet


class SmallCNN(USBNet):
    """Four 3x3 convolutions with batch norm and ReLU, the second and third of stride 2, then the mean over positions.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        width: channels of the first convolution; the others have 2, 4 and 4 times as many.
    """

    def __init__(self, num_classes: int, in_channels: int = 1, width: int = 24) -> None:
        super().__init__()
        widths = [in_channels, width, 2 * width, 4 * width, 4 * width]
        strides = [1, 2, 2, 1]
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
                for i, o, s in zip(widths[:-1], widths[1:], strides, strict=True)
            )
        )
        self.num_features = widths[-1]
        self.classifier = nn.Linear(self.num_features, num_classes)

    def extract(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def small_cnn(
    num_classes: int, in_channels: int = 1, pretrained: bool = False, pretrained_path: Any = None
) -> SmallCNN:
    """Builder in USB's form. ``pretrained`` has no weights to offer and is refused."""
    if pretrained:
        raise ValueError("small_cnn has no pretrained weights")
    return SmallCNN(num_classes, in_channels)
