"""What USB expects of a net."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class USBNet(nn.Module):
    """Features, then a linear head; the calling convention of USB's nets.

    A subclass defines ``extract`` (images to a (N, F, h, w) map) or ``features`` (images to (N, F)), and ends its own
    construction with :meth:`set_heads`.

    Args:
        in_channels: channels of the images.
        input_noise, double_head, l2_feature: see :class:`muscle_plugin.nets.options.NetOptions`.
        head_dropout: probability of dropout between feature and heads; the feature that is returned is without it.
            The nets take the other three as ``shared``.
    """

    #: Names of the options that the net has.
    OPTIONS: ClassVar[tuple[str, ...]] = ("dropout", "input_noise", "double_head", "l2_feature")
    #: Smallest side of an image, in pixels.
    MIN_SIZE: ClassVar[int] = 1

    num_features: int
    classifier: nn.Module

    def __init__(
        self,
        in_channels: int,
        input_noise: float = 0.0,
        double_head: bool = False,
        l2_feature: bool = False,
        head_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if in_channels < 1:
            raise ValueError(f"net: images have 1 channel or more, got {in_channels}")
        self.in_channels = in_channels
        self.input_noise = input_noise
        self.double_head = double_head
        self.l2_feature = l2_feature
        self.head_dropout = head_dropout

    def set_heads(self, num_features: int, num_classes: int, weight_normed: bool = False) -> None:
        """Set ``num_features`` and make ``classifier`` and, if asked for, the weight-normed ``classifier2``.

        Args:
            weight_normed: whether the first head is weight-normed too.
        """
        self.num_features = num_features
        head = nn.Linear(num_features, num_classes)
        self.classifier = weight_norm(head) if weight_normed else head
        if self.double_head:
            self.classifier2 = weight_norm(nn.Linear(num_features, num_classes))

    def extract(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) images to (N, num_features, h, w) feature maps."""
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) images to (N, num_features) features, before any L2 normalisation."""
        return self.extract(x).mean((2, 3))

    def forward(self, x: Tensor, only_fc: bool = False, only_feat: bool = False, **_: Any) -> Any:
        """``{"logits": (N, classes), "feat": (N, num_features)}``; or one of the two parts.

        With ``double_head`` the second head's (N, classes) are there as ``logits2``.

        Args:
            x: images, or features when ``only_fc``, which gives the logits of the first head.

        Raises:
            ValueError: images with another number of channels than the net was built for.
        """
        if only_fc:
            return self.classifier(self._dropped(x))
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"net: takes images of {self.in_channels} channels, (N, {self.in_channels}, H, W), got {tuple(x.shape)}"
            )
        if self.training and self.input_noise:
            x = x + self.input_noise * torch.randn_like(x)
        feat = self.features(x)
        if self.l2_feature:
            feat = F.normalize(feat, dim=1)
        if only_feat:
            return feat
        of_head = self._dropped(feat)
        out = {"logits": self.classifier(of_head), "feat": feat}
        return {**out, "logits2": self.classifier2(of_head)} if self.double_head else out

    def _dropped(self, feat: Tensor) -> Tensor:
        return F.dropout(feat, self.head_dropout, self.training) if self.head_dropout else feat

    def no_weight_decay(self) -> list[str]:
        """Names of the parameters without weight decay: biases and batch-norm parameters."""
        return [n for n, p in self.named_parameters() if p.ndim == 1]

    def group_matcher(self, coarse: bool = False, prefix: str = "") -> Any:
        """Layer groups for USB's layer-wise learning-rate decay: patterns of parameter names, or a function of one.

        Args:
            coarse: larger groups, where the net distinguishes.
            prefix: of the parameter names, where another module holds this net.
        """
        return {"stem": rf"^{prefix}blocks\.0", "blocks": rf"^{prefix}blocks\.(\d+)"}


def grouped(groups: dict[str, int], prefix: str) -> Callable[[str], int]:
    """A ``group_matcher`` from the groups of a backbone's parameters; what is in none, such as a head, is the last.

    Args:
        groups: parameter names within ``backbone``, with their group's number.
        prefix: as in :meth:`USBNet.group_matcher`.
    """
    last = max(groups.values()) + 1
    return lambda name: groups.get(name.removeprefix(f"{prefix}backbone."), last)


def groups_in_order(names: Iterable[str]) -> dict[str, int]:
    """Groups of parameters that share their first two module names, in the order in which they come."""
    groups: dict[str, int] = {}
    numbers: dict[tuple[str, ...], int] = {}
    for name in names:
        groups[name] = numbers.setdefault(tuple(name.split(".")[:-1][:2]), len(numbers))
    return groups
