"""The calling convention of USB's nets, as a base class."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from muscle_plugin.errors import InputError

#: Layer groups for layer-wise learning-rate decay: patterns of parameter names, or a function from name to group.
Groups = dict[str, str] | Callable[[str], int]


class USBNet(nn.Module):
    """Features, then a linear head; the calling convention of USB's nets.

    A subclass sets ``blocks`` (images to a (N, F, h, w) map) or defines ``features`` (images to (N, F)), and ends its own
    construction with :meth:`set_heads`.

    Args:
        in_channels: channels of the images.
        input_noise, double_head, l2_feature: see :class:`muscle_plugin.nets.NetOptions`.
        head_dropout: probability of dropout between feature and heads; the returned feature is without it.
    """

    #: Names of the options that the net has.
    OPTIONS: ClassVar[tuple[str, ...]] = ("dropout", "input_noise", "double_head", "l2_feature")
    #: Smallest side of an image, in pixels.
    MIN_SIZE: ClassVar[int] = 1

    num_features: int
    blocks: nn.Module
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
            raise InputError(f"net: images have 1 channel or more, got {in_channels}")
        self.in_channels = in_channels
        self.input_noise = input_noise
        self.double_head = double_head
        self.l2_feature = l2_feature
        self.head_dropout = head_dropout

    def set_heads(self, num_features: int, num_classes: int, weight_normed: bool = False) -> None:
        """Set ``num_features``, ``classifier`` (``weight_normed`` or not) and, with ``double_head``, the weight-normed
        ``classifier2``."""
        self.num_features = num_features
        head = nn.Linear(num_features, num_classes)
        self.classifier = weight_norm(head) if weight_normed else head
        if self.double_head:
            self.classifier2 = weight_norm(nn.Linear(num_features, num_classes))

    def features(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) images to (N, num_features) features, before any L2 normalisation."""
        return self.blocks(x).mean((2, 3))

    def forward(
        self, x: Tensor, only_fc: bool = False, only_feat: bool = False, **_: object
    ) -> dict[str, Tensor] | Tensor:
        """Return ``{"logits": (N, C), "feat": (N, num_features)}``, or one of the two.

        With ``double_head`` the second head's (N, C) output is ``logits2``.

        Args:
            x: (N, channels, H, W) images, or (N, num_features) features if ``only_fc``.
            only_fc: return the first head's logits of features.
            only_feat: return the features of images.

        Raises:
            InputError: images with another number of channels than the net was built for, or too small for it.
        """
        if only_fc:
            return self.classifier(self._dropped(x))
        self.check_input(x)
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

    def check_input(self, x: Tensor) -> None:
        """Refuse what the net cannot take by an InputError."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise InputError(
                f"net: takes images of {self.in_channels} channels, (N, {self.in_channels}, H, W), got {tuple(x.shape)}"
            )
        if min(x.shape[2:]) < self.MIN_SIZE:
            raise InputError(f"net: takes images of {self.MIN_SIZE} x {self.MIN_SIZE} or more, got {tuple(x.shape)}")

    def _dropped(self, feat: Tensor) -> Tensor:
        return F.dropout(feat, self.head_dropout, self.training) if self.head_dropout else feat

    def no_weight_decay(self) -> list[str]:
        """Names of the parameters without weight decay: biases and batch-norm parameters."""
        return [n for n, p in self.named_parameters() if p.ndim == 1]

    def group_matcher(self, coarse: bool = False, prefix: str = "") -> Groups:
        """Layer groups for USB's layer-wise learning-rate decay, larger ones if ``coarse``; ``prefix`` is that of the
        parameter names where another module holds this net."""
        return {"stem": rf"^{prefix}blocks\.0", "blocks": rf"^{prefix}blocks\.(\d+)"}


class BackboneNet(USBNet):
    """A net from another library as ``backbone``, whose output is the (N, F) feature, and a linear head."""

    OPTIONS: ClassVar[tuple[str, ...]] = ()
    backbone: nn.Module

    def features(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def backbone_groups(self, coarse: bool) -> dict[str, int]:
        """Layer groups by parameter name within the backbone: parameters that share their first two module names."""
        numbers: dict[tuple[str, ...], int] = {}
        names = dict(self.backbone.named_parameters())
        return {n: numbers.setdefault(tuple(n.split(".")[:-1][:2]), len(numbers)) for n in names}

    def group_matcher(self, coarse: bool = False, prefix: str = "") -> Groups:
        groups = self.backbone_groups(coarse)
        last = max(groups.values()) + 1  # the heads
        return lambda name: groups.get(name.removeprefix(f"{prefix}backbone."), last)


def cut_last_linear(net: nn.Module, outputs: int | None = None) -> tuple[str, nn.Linear] | None:
    """Replace a net's last linear layer, with this many outputs if given, by the identity; return its name and the layer."""
    linear = {
        n: m for n, m in net.named_modules() if n and isinstance(m, nn.Linear) and outputs in (None, m.out_features)
    }
    if not linear:
        return None
    path, head = linear.popitem()
    parent, _, last = path.rpartition(".")
    setattr(net.get_submodule(parent), last, nn.Identity())
    return path, head
