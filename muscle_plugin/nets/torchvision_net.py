"""Any classification net of torchvision, with the calling convention of USB's nets (``--net_from_name true``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TorchvisionNet(nn.Module):
    """A torchvision classifier whose last linear layer is replaced.

    Args:
        name: a name of ``torchvision.models.list_models``.
        num_classes: outputs.
        weights: file of a state dict to start from, or None.

    Raises:
        ValueError: no such net, or it does not end in a linear layer.
    """

    def __init__(self, name: str, num_classes: int, weights: str | None = None) -> None:
        super().__init__()
        import torchvision
        from torchvision import models

        known = models.list_models(module=torchvision.models)
        if name not in known:
            raise ValueError(f"net: torchvision has no {name!r}; known: {', '.join(known)}")
        net = models.get_model(name, weights=None)
        if weights:
            net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        path = [n for n, m in net.named_modules() if isinstance(m, nn.Linear)][-1]
        parent, _, last = path.rpartition(".")
        head = net.get_submodule(path)
        assert isinstance(head, nn.Linear)
        self.num_features = head.in_features
        setattr(net.get_submodule(parent), last, nn.Identity())
        self.backbone = net
        self.classifier = nn.Linear(self.num_features, num_classes)

    def forward(self, x: Tensor, only_fc: bool = False, only_feat: bool = False, **_: Any) -> Any:
        if only_fc:
            return self.classifier(x)
        feat = self.backbone(x)
        return feat if only_feat else {"logits": self.classifier(feat), "feat": feat}

    def no_weight_decay(self) -> list[str]:
        """Names of the parameters without weight decay: biases and normalisation parameters."""
        return [n for n, p in self.named_parameters() if p.ndim == 1]
