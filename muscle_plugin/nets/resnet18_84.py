"""ResNet-18 for 84 x 84 images, as label propagation (Iscen et al. 2019) and MUSCLE's Tables 3 and 5 use it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from muscle_plugin.nets.base import USBNet


class ResNet18(USBNet):
    """torchvision's ResNet-18: a 7x7 convolution and a 3x3 max-pool, each of stride 2, two basic blocks in each of four
    stages, the mean over positions, 512 features; 3 x 3 positions are left of an 84 x 84 image. 11,227,812 parameters
    at C = 100, 11,279,212 with two heads, of which the second is weight-normed.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        dropout, input_noise, double_head, l2_feature: see :class:`muscle_plugin.nets.options.NetOptions`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        dropout: float = 0.0,
        **shared: Any,
    ) -> None:
        super().__init__(in_channels, head_dropout=dropout, **shared)
        from torchvision.models import resnet18

        net = resnet18(weights=None)
        if in_channels != 3:
            net.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.blocks = nn.Sequential(OrderedDict((n, m) for n, m in net.named_children() if n not in ("avgpool", "fc")))
        self.set_heads(512, num_classes)

    def extract(self, x: Tensor) -> Tensor:
        return self.blocks(x)

    def group_matcher(self, coarse: bool = False, prefix: str = "") -> dict[str, str]:
        """The stem, then each stage (``coarse``) or block; see :meth:`USBNet.group_matcher`."""
        block = "" if coarse else r"\.(\d+)"
        return {"stem": rf"^{prefix}blocks\.(?:conv1|bn1)", "blocks": rf"^{prefix}blocks\.layer(\d+){block}"}
