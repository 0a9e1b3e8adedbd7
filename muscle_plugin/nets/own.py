"""This package's nets: one for digits, and the two that MUSCLE's tables use. None has pretrained weights."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from muscle_plugin.nets.base import USBNet


def channels(default: int, width: float) -> int:
    """``default * width`` rounded to the nearest multiple of 8, at least 8."""
    return max(8, 8 * math.floor(default * width / 8 + 0.5))


class SmallCNN(USBNet):
    """Two 5x5 convolutions of stride 2, then a 4x4 one without padding; batch norm and ReLU after each.

    A thousand steps take seconds to a minute on one CPU core. On 16 x 16 images the last convolution sees the whole image
    at once: unlike a mean over positions, its features tell a stroke above from one below, which is what tells digits
    apart. On larger images its outputs are averaged over positions.
    """

    OPTIONS = (*USBNet.OPTIONS, "width")
    #: The last convolution has an input of 4 x 4.
    MIN_SIZE = 13

    def __init__(
        self, num_classes: int, in_channels: int = 1, width: float = 1.0, dropout: float = 0.0, **shared: Any
    ) -> None:
        super().__init__(in_channels, head_dropout=dropout, **shared)

        def conv(i: int, o: int, kernel: int, stride: int, padding: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, kernel, stride, padding, bias=False), nn.BatchNorm2d(o), nn.ReLU())

        n = channels(32, width)
        self.blocks = nn.Sequential(conv(in_channels, n, 5, 2, 2), conv(n, 2 * n, 5, 2, 2), conv(2 * n, 4 * n, 4, 1, 0))
        self.set_heads(4 * n, num_classes)


class CNN13(USBNet):
    """The 13-layer net of Temporal Ensembling, Mean Teacher and label propagation (MUSCLE's Tables 1, 2 and 4).

    3 x conv 128, 3 x conv 256, then 512, 256 and 128 channels; max-pool and dropout after each of the first two groups;
    weight norm, batch norm and LeakyReLU(0.1) throughout. For 32 x 32 images; 3,125,908 parameters at C = 10, 3,127,208
    with two heads.
    """

    OPTIONS = (*USBNet.OPTIONS, "width")
    MIN_SIZE = 12

    def __init__(
        self, num_classes: int, in_channels: int = 3, dropout: float = 0.5, width: float = 1.0, **shared: Any
    ) -> None:
        super().__init__(in_channels, **shared)

        def conv(i: int, o: int, kernel: int, padding: int) -> nn.Sequential:
            layer = weight_norm(nn.Conv2d(i, o, kernel, padding=padding))
            return nn.Sequential(layer, nn.BatchNorm2d(o), nn.LeakyReLU(0.1))

        def pool() -> nn.Sequential:
            return nn.Sequential(nn.MaxPool2d(2), *([nn.Dropout(dropout)] if dropout else []))

        a, b, c = (channels(n, width) for n in (128, 256, 512))
        self.blocks = nn.Sequential(
            nn.Sequential(conv(in_channels, a, 3, 1), conv(a, a, 3, 1), conv(a, a, 3, 1)),
            pool(),
            nn.Sequential(conv(a, b, 3, 1), conv(b, b, 3, 1), conv(b, b, 3, 1)),
            pool(),
            nn.Sequential(conv(b, c, 3, 0), conv(c, b, 1, 0), conv(b, a, 1, 0)),
        )
        self.set_heads(a, num_classes, weight_normed=True)


class ResNet18(USBNet):
    """torchvision's ResNet-18 for 84 x 84 images (Iscen et al. 2019; MUSCLE's Tables 3 and 5).

    A 7x7 convolution and a 3x3 max-pool, each of stride 2, two basic blocks in each of four stages, the mean over
    positions, 512 features. 11,227,812 parameters at C = 100, 11,279,212 with two heads, of which the second is
    weight-normed.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, dropout: float = 0.0, **shared: Any) -> None:
        super().__init__(in_channels, head_dropout=dropout, **shared)
        from torchvision.models import resnet18

        net = resnet18(weights=None)
        if in_channels != 3:
            net.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.blocks = nn.Sequential(OrderedDict((n, m) for n, m in net.named_children() if n not in ("avgpool", "fc")))
        self.set_heads(512, num_classes)

    def group_matcher(self, coarse: bool = False, prefix: str = "") -> dict[str, str]:
        block = "" if coarse else r"\.(\d+)"
        return {"stem": rf"^{prefix}blocks\.(?:conv1|bn1)", "blocks": rf"^{prefix}blocks\.layer(\d+){block}"}


#: By the names of :data:`muscle_plugin.registry.names.NETS`.
CLASSES: dict[str, type[USBNet]] = {"small_cnn": SmallCNN, "cnn13": CNN13, "resnet18_84": ResNet18}
