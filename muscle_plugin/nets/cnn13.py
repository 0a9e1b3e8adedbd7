"""The 13-layer net of Temporal Ensembling, Mean Teacher and label propagation, which MUSCLE's Tables 1, 2 and 4 use."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from muscle_plugin.nets.base import USBNet


def _conv(i: int, o: int, kernel: int, padding: int) -> nn.Sequential:
    return nn.Sequential(weight_norm(nn.Conv2d(i, o, kernel, padding=padding)), nn.BatchNorm2d(o), nn.LeakyReLU(0.1))


class CNN13(USBNet):
    """3 x conv 128, 3 x conv 256, then 512, 256 and 128 channels; max-pool and dropout after each of the first two
    groups; weight norm, batch norm and LeakyReLU(0.1) throughout. For 32 x 32 images; 3,125,908 parameters at C = 10.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        dropout: probability, 0 to leave dropout out (Figure 2 b).
    """

    def __init__(self, num_classes: int, in_channels: int = 3, dropout: float = 0.5) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Sequential(_conv(in_channels, 128, 3, 1), _conv(128, 128, 3, 1), _conv(128, 128, 3, 1)),
            nn.Sequential(nn.MaxPool2d(2), nn.Dropout(dropout)),
            nn.Sequential(_conv(128, 256, 3, 1), _conv(256, 256, 3, 1), _conv(256, 256, 3, 1)),
            nn.Sequential(nn.MaxPool2d(2), nn.Dropout(dropout)),
            nn.Sequential(_conv(256, 512, 3, 0), _conv(512, 256, 1, 0), _conv(256, 128, 1, 0)),
        )
        self.num_features = 128
        self.classifier = weight_norm(nn.Linear(128, num_classes))

    def extract(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def cnn13(num_classes: int, in_channels: int = 3, pretrained: bool = False, pretrained_path: Any = None) -> CNN13:
    """Builder in USB's form. ``pretrained`` has no weights to offer and is refused."""
    if pretrained:
        raise ValueError("cnn13 has no pretrained weights")
    return CNN13(num_classes, in_channels)
