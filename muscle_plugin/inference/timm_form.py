"""A net of timm as timm writes its own: ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from muscle_plugin.inference.compare import Comparison
from muscle_plugin.inference.trained import Classifier, Trained
from muscle_plugin.registry.names import TIMM


def to_timm(trained: Trained, comparison: Comparison) -> tuple[dict[str, Any], dict[str, Tensor], str] | None:
    """``config.json``, weights by timm's names, and the name of timm's classifier.

    None where timm's model is not the same net: with normalised features, or with layers between pooling and classifier.
    """
    backbone = trained.net.get_submodule("backbone")
    cfg: dict[str, Any] = backbone.pretrained_cfg  # type: ignore[assignment]
    classifier = cfg.get("classifier")
    if not isinstance(classifier, str) or getattr(trained.net, "l2_feature", False):
        return None
    pretrained = {
        **{k: cfg[k] for k in ("first_conv", "fixed_input_size", "min_input_size") if cfg.get(k) is not None},
        "input_size": [3, trained.img_size, trained.img_size],
        "num_classes": len(trained.classes),
        "classifier": classifier,
        "custom_load": False,
        # as `predict` has images: stretched to the size, not cropped
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": trained.mean * (3 // len(trained.mean)),
        "std": trained.std * (3 // len(trained.std)),
    }
    config = {
        "architecture": trained.name.removeprefix(TIMM).partition(".")[0],
        "num_classes": len(trained.classes),
        "num_features": int(trained.net.num_features),  # type: ignore[arg-type]
        "label_names": trained.classes,
        "model_args": {"img_size": trained.img_size},
        "pretrained_cfg": pretrained,
    }
    try:
        model = timm_model(config)
    except TypeError:  # a convolutional net, which takes any size
        del config["model_args"]
        model = timm_model(config)
    weights = {}
    for name, tensor in trained.net.state_dict().items():
        part, _, rest = name.partition(".")
        if part in ("backbone", "classifier"):
            weights[rest if part == "backbone" else f"{classifier}.{rest}"] = tensor
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        return None
    return (config, weights, classifier) if comparison.same(logits_of(model, trained, comparison.images)) else None


def from_timm(weights: dict[str, Tensor], classifier: str) -> dict[str, Tensor]:
    """Weights by this package's names."""
    head = f"{classifier}."
    return {
        f"classifier.{n.removeprefix(head)}" if n.startswith(head) else f"backbone.{n}": t for n, t in weights.items()
    }


def timm_model(config: dict[str, Any]) -> nn.Module:
    """The model that a ``config.json`` describes, with random weights."""
    import timm

    arguments = config.get("model_args", {})
    return timm.create_model(config["architecture"], num_classes=config["num_classes"], **arguments).eval()


@torch.no_grad()
def logits_of(model: nn.Module, trained: Trained, images: Tensor) -> Tensor:
    """(N, C) logits of timm's model for images prepared as for the net of the checkpoint."""
    return Classifier(replace(trained, net=_InUSBsForm(model)), torch.device("cpu"))(images)


class _InUSBsForm(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(x)}
