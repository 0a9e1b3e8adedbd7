"""Any classification net of torchvision, with the calling convention of USB's nets (``--net_from_name true``)."""

from __future__ import annotations

from pathlib import Path

import torchvision
from torchvision import models

from muscle_plugin.errors import InputError
from muscle_plugin.nets.base import BackboneNet, cut_last_linear
from muscle_plugin.nets.weights import misfit, read_weights


class TorchvisionNet(BackboneNet):
    """A torchvision classifier whose last linear layer is replaced by a new head. It takes images of three channels; its
    pretrained weights are a file of a state dict, with torchvision's classifier."""

    def __init__(
        self, name: str, num_classes: int, pretrained: bool = False, pretrained_path: str | Path | None = None
    ) -> None:
        super().__init__(in_channels=3)
        known = models.list_models(module=torchvision.models)
        if name not in known:
            raise InputError(f"net: torchvision has no {name!r}; known: {', '.join(known)}")
        self.backbone = models.get_model(name, weights=None)
        if pretrained and pretrained_path:
            state = read_weights(Path(pretrained_path))
            if fault := misfit(state, self.backbone.state_dict()):
                raise InputError(f"net: {pretrained_path}: not weights of torchvision's {name}: {fault}")
            self.backbone.load_state_dict(state, strict=False)
        cut = cut_last_linear(self.backbone)
        if cut is None:
            raise InputError(f"net: torchvision's {name} does not end in a linear layer")
        self.set_heads(cut[1].in_features, num_classes)
