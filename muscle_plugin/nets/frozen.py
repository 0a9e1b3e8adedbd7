"""A frozen backbone and the head that is trained on its features."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from muscle_plugin.errors import InputError
from muscle_plugin.nets.base import USBNet
from muscle_plugin.nets.weights import of_head

#: Images per forward pass on one CPU core, where activations of more would leave the caches; and on a GPU.
AT_ONCE = {"cpu": 16, "cuda": 512}


class FeatureHead(USBNet):
    """A linear head on standardised features, or one with a hidden layer as wide as the feature; with the calling
    convention of USB's nets, (N, num_features) features in place of images.

    Args:
        num_features: size of the features.
        hidden: whether to have a hidden layer with ReLU.
        dropout, double_head, l2_feature: see :class:`muscle_plugin.nets.NetOptions`.
    """

    OPTIONS = ("dropout", "double_head", "l2_feature")
    mean: Tensor
    std: Tensor

    def __init__(
        self, num_features: int, num_classes: int, hidden: bool = False, dropout: float = 0.0, **shared: Any
    ) -> None:
        super().__init__(1, head_dropout=dropout, **shared)
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))
        self.blocks = nn.Sequential(nn.Linear(num_features, num_features), nn.ReLU()) if hidden else nn.Identity()
        self.set_heads(num_features, num_classes)

    def check_input(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != len(self.mean):
            raise InputError(f"head: takes features, (N, {len(self.mean)}), got {tuple(x.shape)}")

    def features(self, x: Tensor) -> Tensor:
        return self.blocks((x - self.mean) / self.std)

    def _dropped(self, feat: Tensor) -> Tensor:
        """Dropout; on a CPU in half of PyTorch's time or less, which is a third of a step. Probabilities are multiples of
        2^-16."""
        p = round(self.head_dropout * 2**16)
        if not self.training or not p or feat.is_cuda:
            return super()._dropped(feat)
        bits = torch.empty(-(-feat.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = bits[: feat.numel()].view(feat.shape) >= p - 2**15
        return feat * kept.to(feat.dtype).mul_(1 / (1 - p / 2**16))

    def standardise_by(self, features: Tensor) -> None:
        """Bring features to the mean 0 and the standard deviation 1 of these, (n, num_features). A feature that hardly varies
        is divided by a tenth of the mean standard deviation: strong views can activate features that are constant here."""
        self.mean.copy_(features.mean(0))
        std = features.std(0) if len(features) > 1 else torch.ones_like(self.std)
        self.std.copy_(std.clamp_min(max(1e-6, 0.1 * float(std.mean()))))


class FrozenNet(nn.Module):
    """A backbone and the head that was trained on its features, as one net of images."""

    def __init__(self, backbone: nn.Module, head: FeatureHead) -> None:
        super().__init__()
        if isinstance(backbone, USBNet):
            backbone.classifier = nn.Identity()
        self.backbone, self.head, self.num_features = backbone, head, head.num_features

    def forward(self, x: Tensor, only_fc: bool = False, only_feat: bool = False, **_: object) -> Any:
        return self.head(x if only_fc else self.backbone(x, only_feat=True), only_fc=only_fc, only_feat=only_feat)

    def folded(self) -> nn.Module | None:
        """The same net with the standardisation in its classifier, W' = W / std and b' = b - W' mean; None if the head is not
        linear in the features. A second head is left out."""
        head = self.head
        linear = head.classifier
        if not isinstance(self.backbone, USBNet) or not isinstance(head.blocks, nn.Identity) or head.l2_feature:
            return None
        assert isinstance(linear, nn.Linear)
        net = copy.deepcopy(self.backbone)
        net.classifier = nn.Linear(linear.in_features, linear.out_features)
        with torch.no_grad():
            weight = linear.weight.double() / head.std
            net.classifier.weight.copy_(weight)
            net.classifier.bias.copy_(linear.bias - weight @ head.mean.double())
        return net.eval()


class Encoder:
    """Computes (N, num_features) float32 features of normalised images by a frozen net in eval mode.

    Args:
        net: with the calling convention of USB's nets, on its device.
        precision: makes the context of a forward pass.
        channels_last: whether the net computes in this memory layout.
    """

    def __init__(
        self, net: nn.Module, device: torch.device, precision: Callable[[], AbstractContextManager[Any]],
        channels_last: bool,
    ) -> None:  # fmt: skip
        self.net = net.eval().requires_grad_(False).to(device)
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._precision, self._device = precision, device
        self.num_features: int = net.num_features  # type: ignore[assignment]

    @cached_property
    def digest(self) -> str:
        """See :func:`digest`."""
        return digest(self.net)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=self._layout)
        with self._precision():
            parts = [self.net(part, only_feat=True).float() for part in images.split(AT_ONCE[self._device.type])]
        return torch.cat(parts)


def digest(net: nn.Module) -> str:
    """SHA-256 of a net's tensors but for its head's, with their names: the same for the same weights, whatever file they
    came from."""
    return sha256({n: t for n, t in net.state_dict().items() if not of_head(n)})


def sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors with their names, without batch norm's counters."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if not name.endswith("num_batches_tracked"):
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
