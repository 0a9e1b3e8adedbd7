"""Nets of this package. Each returns ``{"logits", "feat"}`` and takes ``only_fc``/``only_feat``, as USB's do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from muscle_plugin.nets.base import USBNet
from muscle_plugin.nets.cnn13 import CNN13, cnn13
from muscle_plugin.nets.options import NetOptions
from muscle_plugin.nets.resnet18_84 import ResNet18, resnet18_84
from muscle_plugin.nets.small_cnn import SmallCNN, small_cnn
from muscle_plugin.nets.timm_backbone import TimmBackbone, timm_backbone
from muscle_plugin.registry.names import NETS, TIMM
from muscle_plugin.text import did_you_mean

OWN_NETS: dict[str, Callable[..., Any]] = {"small_cnn": small_cnn, "cnn13": cnn13, "resnet18_84": resnet18_84}

_CLASSES: dict[str, type[USBNet]] = {"small_cnn": SmallCNN, "cnn13": CNN13, "resnet18_84": ResNet18}

assert tuple(OWN_NETS) == NETS

__all__ = ["OWN_NETS", "NetOptions", "build_net", "cnn13", "net_options", "resnet18_84", "small_cnn", "timm_backbone"]


def build_net(
    name: str,
    num_classes: int,
    in_channels: int = 3,
    img_size: int | None = None,
    options: NetOptions | Mapping[str, Any] | None = None,
    *,
    pretrained: bool = False,
    pretrained_path: Any = None,
) -> USBNet:
    """A net of this package, or ``timm:<name>``.

    Args:
        name: one of ``OWN_NETS``, or ``timm:`` and the name of a timm model.
        num_classes: outputs.
        in_channels: channels of the images.
        img_size: side of the images, in pixels; None: any (timm: the one that the model was made for).
        options: see :class:`NetOptions`; a mapping of its names to values will do. None: the net's defaults.
        pretrained: start from pretrained weights, which only nets of timm have.
        pretrained_path: file of them; empty or None: timm's hub. Not read unless ``pretrained``.

    Raises:
        ValueError: no such net, an option that it does not have or a value out of range, images that it does not take,
            or weights that cannot be had or do not fit.
    """
    chosen = NetOptions.of(name, options)
    if name.startswith(TIMM):
        model = name.removeprefix(TIMM)
        return timm_backbone(model, num_classes, in_channels, img_size, pretrained, pretrained_path, chosen)
    net_options(name)
    least = _CLASSES[name].MIN_SIZE
    if img_size is not None and img_size < least:
        raise ValueError(
            f"net: {name} cannot take images of {img_size} x {img_size}: it takes {least} x {least} or more"
        )
    return OWN_NETS[name](num_classes, in_channels, pretrained, pretrained_path, chosen)


def net_options(name: str) -> tuple[str, ...]:
    """Names of the options that a net has.

    Raises:
        ValueError: no such net.
    """
    if name.startswith(TIMM):
        return TimmBackbone.OPTIONS
    if name not in _CLASSES:
        known = [*OWN_NETS, f"{TIMM}<name>"]
        raise ValueError(f"net: unknown {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    return _CLASSES[name].OPTIONS
