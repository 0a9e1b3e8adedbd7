"""Any classification model of timm as a backbone: ``timm:<name>``, for instance ``timm:vit_tiny_patch16_224``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muscle_plugin.files import load_plain
from muscle_plugin.nets.base import USBNet, grouped, groups_in_order
from muscle_plugin.nets.options import NetOptions
from muscle_plugin.registry.names import TIMM
from muscle_plugin.text import did_you_mean


class TimmBackbone(USBNet):
    """A timm model without its classifier, whose own pooled output is the feature, and a linear head.

    Args:
        name: a name of ``timm.list_models``, with or without a tag of pretrained weights (``resnet18.a1_in1k``).
        num_classes: outputs.
        in_channels: channels of the images.
        img_size: side of the images; None: the one that the model was made for.
        pretrained: start from pretrained weights.
        pretrained_path: their file: a state dict of the model, with or without its classifier, in .safetensors or in
            torch's format (read with ``weights_only=True``). Empty or None: from timm's hub.
        dropout, input_noise, double_head, l2_feature: see :class:`muscle_plugin.nets.options.NetOptions`.

    Raises:
        ValueError: no such model, it does not take these images, or the weights cannot be had or do not fit.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        in_channels: int = 3,
        img_size: int | None = None,
        pretrained: bool = False,
        pretrained_path: str | Path | None = None,
        dropout: float = 0.0,
        **shared: Any,
    ) -> None:
        super().__init__(in_channels, head_dropout=dropout, **shared)
        import timm

        if not timm.is_model(name):
            raise ValueError(f"net: timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
        from_hub = pretrained and not pretrained_path
        if from_hub and not timm.is_model_pretrained(name):
            raise ValueError(f"net: timm has no pretrained weights for {name}; --pretrain_path names a file of them")
        self.backbone = _create(name, in_channels, img_size)
        num_features = _num_features(self.backbone, name, in_channels, img_size)
        if from_hub:
            self.backbone = _from_hub(name, in_channels, img_size)
        elif pretrained:
            load_weights(self.backbone, name, Path(str(pretrained_path)))
        self.set_heads(num_features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def no_weight_decay(self) -> list[str]:
        """Names of the parameters without weight decay: one-dimensional ones, and those that the model names."""
        named = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else ()
        skipped = {f"backbone.{n}" for n in named}
        return [n for n, p in self.named_parameters() if p.ndim == 1 or n in skipped]

    def group_matcher(self, coarse: bool = False, prefix: str = "") -> Any:
        """The model's own groups, then the heads; see :meth:`USBNet.group_matcher`."""
        if not hasattr(self.backbone, "group_matcher"):
            return grouped(groups_in_order(n for n, _ in self.backbone.named_parameters()), prefix)
        from timm.models import group_parameters

        matcher = self.backbone.group_matcher(coarse=coarse)
        return grouped(group_parameters(self.backbone, matcher, reverse=True), prefix)


def timm_backbone(
    name: str,
    num_classes: int,
    in_channels: int = 3,
    img_size: int | None = None,
    pretrained: bool = False,
    pretrained_path: Any = None,
    options: NetOptions | None = None,
) -> TimmBackbone:
    """Builder of ``timm:<name>`` in USB's form; ``name`` is without the prefix. See :class:`TimmBackbone`."""
    label = TIMM + name
    arguments = NetOptions.of(label, options).arguments(label, TimmBackbone.OPTIONS)
    return TimmBackbone(name, num_classes, in_channels, img_size, pretrained, pretrained_path, **arguments)


def _create(name: str, in_channels: int, img_size: int | None, pretrained: bool = False) -> Any:
    """The model without classifier, told the image size if it takes one."""
    import timm

    arguments: dict[str, Any] = {"num_classes": 0, "in_chans": in_channels, "pretrained": pretrained}
    try:
        return timm.create_model(name, img_size=img_size, **arguments)
    except TypeError as e:
        if "img_size" not in str(e):
            raise
        return timm.create_model(name, **arguments)  # a net of convolutions: it takes any size
    except (AssertionError, RuntimeError, ValueError) as e:
        raise _misfit(name, in_channels, img_size, e) from e


def _misfit(name: str, in_channels: int, img_size: int | None, reason: object) -> ValueError:
    size = "its own size" if img_size is None else f"{img_size} x {img_size}"
    why = (str(reason).splitlines() or [type(reason).__name__])[0]
    return ValueError(f"net: timm:{name} cannot take images of {size} and {in_channels} channels: {why}")


def _num_features(net: Any, name: str, in_channels: int, img_size: int | None) -> int:
    """Size of the pooled output for images of this size, which a blank image finds out.

    Raises:
        ValueError: the model does not take them.
    """
    from timm.layers import PatchEmbed

    side = img_size or net.pretrained_cfg["input_size"][-1]
    patches = getattr(net, "patch_embed", None)
    # timm would leave out the pixels that fill no patch
    if isinstance(patches, PatchEmbed) and not getattr(patches, "dynamic_img_pad", False):
        patch = max(patches.patch_size)
        if side % patch:
            raise _misfit(name, in_channels, img_size, f"the side must be a multiple of its patches' {patch}")
    net.eval()
    try:
        with torch.no_grad():
            out = net(torch.zeros(1, in_channels, side, side))
    except (AssertionError, IndexError, RuntimeError, ValueError) as e:
        raise _misfit(name, in_channels, img_size, e) from e
    net.train()
    if not isinstance(out, Tensor) or out.ndim != 2:
        raise ValueError(f"net: timm:{name} has no pooled output of one vector per image")
    return out.shape[1]


def _from_hub(name: str, in_channels: int, img_size: int | None) -> Any:
    try:
        return _create(name, in_channels, img_size, pretrained=True)
    except Exception as e:  # offline, each client library raises something of its own
        raise ValueError(
            f"net: the pretrained weights of timm:{name} cannot be fetched from timm's hub ({type(e).__name__}); "
            "offline, --pretrain_path names a file of them (.safetensors or .pth)"
        ) from e


def load_weights(net: Any, name: str, path: Path) -> None:
    """Load a state dict of a timm model, with or without its classifier, into the model without one.

    The classifier's weights are left out. Where the others do not fit as they are, they go through the model's own
    ``checkpoint_filter_fn``, which for instance interpolates position embeddings to another image size.

    Args:
        net: a timm model built with ``num_classes=0``.
        name: its name, for messages.
        path: file in .safetensors or in torch's format.

    Raises:
        ValueError: the file cannot be read, or its weights do not fit; the message says which.
    """
    weights = _read(name, path)
    wanted = net.state_dict()
    heads = net.pretrained_cfg.get("classifier") or ()
    # of head.linear its module too, which may hold a norm that goes with the classifier
    heads = tuple(h.partition(".")[0] + "." for h in ((heads,) if isinstance(heads, str) else heads))

    def without_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: v for n, v in state.items() if n in wanted or not n.startswith(heads)}

    state = without_head(weights)
    faults = _faults(state, wanted)
    convert = getattr(importlib.import_module(type(net).__module__), "checkpoint_filter_fn", None)
    if faults and convert is not None:
        try:
            converted = without_head(convert(dict(weights), net))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            converted = state  # not weights of this model at all
        if not _faults(converted, wanted):
            state, faults = converted, ""
    if faults:
        raise ValueError(f"net: {path}: these weights do not fit timm:{name}: {faults}")
    net.load_state_dict(state, strict=False)


def _read(name: str, path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"net: {path}: no such file of weights for timm:{name}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = load_plain(path)
    except ImportError as e:
        raise ValueError(f"net: {path}: reading it needs the package safetensors") from e
    except Exception as e:  # safetensors' error derives from Exception alone; torch's are of five kinds
        refused = "it is damaged or holds more than tensors" if isinstance(e, ValueError) else type(e).__name__
        raise ValueError(f"net: {path}: cannot be read as a state dict ({refused})") from e
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"net: {path}: holds no state dict (names and tensors)")
    return {n.removeprefix("module."): v for n, v in content.items()}


def _faults(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Which weights are missing, superfluous or of another shape, in one line; empty if all fit."""
    missing = [n for n in wanted if n not in state and not n.endswith("num_batches_tracked")]
    superfluous = [n for n in state if n not in wanted]
    shapes = [
        f"{n} {tuple(state[n].shape)} for {tuple(v.shape)}"
        for n, v in wanted.items()
        if n in state and state[n].shape != v.shape
    ]
    faults = {"missing": missing, "not in the model": superfluous, "of another shape": shapes}
    return "; ".join(f"{what}: {_some(names)}" for what, names in faults.items() if names)


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
