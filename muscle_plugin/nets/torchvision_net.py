"""Any classification net of torchvision, with the calling convention of USB's nets (``--net_from_name true``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from muscle_plugin.files import load_tensors
from muscle_plugin.nets.base import USBNet, grouped, groups_in_order
from muscle_plugin.text import first_line


class TorchvisionNet(USBNet):
    """A torchvision classifier whose last linear layer is replaced. It takes images of three channels.

    Args:
        name: a name of ``torchvision.models.list_models``.
        num_classes: outputs.
        weights: file of a state dict to start from, or None.

    Raises:
        ValueError: no such net, or it does not end in a linear layer.
    """

    OPTIONS = ()

    def __init__(self, name: str, num_classes: int, weights: str | None = None) -> None:
        super().__init__(in_channels=3)
        import torchvision
        from torchvision import models

        known = models.list_models(module=torchvision.models)
        if name not in known:
            raise ValueError(f"net: torchvision has no {name!r}; known: {', '.join(known)}")
        net = models.get_model(name, weights=None)
        if weights:
            try:
                net.load_state_dict(load_tensors(Path(weights)))
            except (RuntimeError, TypeError, AttributeError) as e:
                raise ValueError(f"net: {weights}: not weights of torchvision's {name} ({first_line(e)})") from e
        path = next((n for n, m in reversed(list(net.named_modules())) if isinstance(m, nn.Linear)), None)
        if path is None:
            raise ValueError(f"net: torchvision's {name} does not end in a linear layer")
        parent, _, last = path.rpartition(".")
        head = net.get_submodule(path)
        assert isinstance(head, nn.Linear)
        setattr(net.get_submodule(parent), last, nn.Identity())
        self.backbone = net
        self.set_heads(head.in_features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def group_matcher(self, coarse: bool = False, prefix: str = "") -> Any:
        """Groups in the order of the net's modules; see :meth:`USBNet.group_matcher`."""
        return grouped(groups_in_order(n for n, _ in self.backbone.named_parameters()), prefix)
