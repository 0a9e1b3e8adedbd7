"""Builds a net by its name: this package's, timm's, torchvision's, USB's or a plugin's.

What a net needs is imported when it is asked for: neither USB nor timm nor torchvision is for another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from torch import nn

from muscle_plugin.errors import InputError
from muscle_plugin.nets.base import USBNet
from muscle_plugin.nets.cnn13 import CNN13
from muscle_plugin.nets.options import NetOptions, refuse_pretrained
from muscle_plugin.nets.plugged import plugged_net
from muscle_plugin.nets.resnet18_84 import ResNet18
from muscle_plugin.nets.small_cnn import SmallCNN
from muscle_plugin.registry.names import DATASETS, NETS, PLUGIN_NETS, TIMM
from muscle_plugin.text import did_you_mean, shown

_CLASSES: dict[str, type[USBNet]] = {"small_cnn": SmallCNN, "cnn13": CNN13, "resnet18_84": ResNet18}
assert tuple(_CLASSES) == NETS


class NetBuilder(Protocol):
    """What builds a net, called as USB calls it."""

    def __call__(
        self, num_classes: int, *, pretrained: bool = False, pretrained_path: str | Path | None = None
    ) -> nn.Module:
        """Build the net with ``num_classes`` outputs, from pretrained weights if asked for."""


class NetSettings(Protocol):
    """The settings that choose a net."""

    dataset: str
    net: str
    net_from_name: bool
    img_size: int
    net_dropout: float | None
    net_noise: float | None
    net_width: float | None
    net_double_head: bool
    net_l2: bool


def build_net(
    name: str,
    num_classes: int,
    in_channels: int = 3,
    img_size: int | None = None,
    options: NetOptions | Mapping[str, object] | None = None,
    *,
    pretrained: bool = False,
    pretrained_path: str | Path | None = None,
) -> USBNet:
    """Build a net of this package, or ``timm:<name>``.

    Args:
        name: one of ``OWN_NETS``, or ``timm:`` and the name of a timm model.
        num_classes: outputs.
        in_channels: channels of the images.
        img_size: side of the images, in pixels; None: any (timm: the one that the model was made for).
        options: see :class:`NetOptions`, or a mapping of its names to values. None: the net's defaults.
        pretrained: start from pretrained weights, which only nets of timm have.
        pretrained_path: file of them; empty or None: timm's hub. Not read unless ``pretrained``.

    Raises:
        InputError: no such net, an option that it does not have or a value out of range, images that it does not take,
            or weights that cannot be had or do not fit.
    """
    chosen = NetOptions.of(name, options).arguments(name, net_options(name))
    if name.startswith(TIMM):
        from muscle_plugin.nets.timm_backbone import TimmBackbone

        model = name.removeprefix(TIMM)
        return TimmBackbone(model, num_classes, in_channels, img_size, pretrained, pretrained_path, **chosen)
    refuse_pretrained(name, pretrained)
    net = _CLASSES[name]
    if img_size is not None and img_size < net.MIN_SIZE:
        raise InputError(
            f"net: {name} cannot take images of {img_size} x {img_size}: it takes {net.MIN_SIZE} x {net.MIN_SIZE} or more"
        )
    return net(num_classes, in_channels, **chosen)


#: This package's nets: name to builder, in USB's form.
OWN_NETS: dict[str, NetBuilder] = {
    "small_cnn": partial(build_net, "small_cnn", in_channels=1),
    "cnn13": partial(build_net, "cnn13"),
    "resnet18_84": partial(build_net, "resnet18_84"),
}


def net_options(name: str) -> tuple[str, ...]:
    """Names of the options that a net has.

    Raises:
        InputError: no such net.
    """
    if name.startswith(TIMM):
        return USBNet.OPTIONS
    if name not in _CLASSES:
        known = [*_CLASSES, f"{TIMM}<name>"]
        raise InputError(f"net: unknown {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    return _CLASSES[name].OPTIONS


def net_builder(
    net: str, from_torchvision: bool, channels: int, img_size: int, options: Mapping[str, object]
) -> NetBuilder:
    """Find what builds a net.

    Args:
        net: name of a net of this package, timm, a plugin or USB; of torchvision with ``from_torchvision``.
        channels: of the images; USB's, timm's and torchvision's nets take three in any case.
        img_size: side of the images, in pixels.
        options: names and values of :class:`muscle_plugin.nets.NetOptions`; for nets of this package and of timm.

    Raises:
        InputError: no such net, it has no such option, or USB is needed for it and not installed.
    """
    if (net in _CLASSES or net.startswith(TIMM)) and not from_torchvision:
        in_channels = 3 if net.startswith(TIMM) else channels
        return partial(build_net, net, in_channels=in_channels, img_size=img_size, options=options)
    if options:
        raise InputError(f"net: {net} has no option {', '.join(options)}; this package's and timm's nets have")
    if from_torchvision:
        from muscle_plugin.nets.torchvision_net import TorchvisionNet

        return partial(TorchvisionNet, net)
    if net in PLUGIN_NETS:
        return partial(plugged_net, net, in_channels=channels, img_size=img_size)
    if find_spec("semilearn") is None:
        raise InputError(
            f"net: {shown(net)} is none of {', '.join((*NETS, *PLUGIN_NETS))}, {TIMM}<name>; a net of USB needs semilearn,"
            " which is not installed: pip install semilearn"
        )
    from muscle_plugin.usb import nets as usb

    if net not in usb.names():
        known = (*NETS, *PLUGIN_NETS, *(n for n in usb.names() if n not in NETS))
        near = did_you_mean(net, known)
        raise InputError(
            f"net: unknown {shown(repr(net))}{near} (one of your own: --plugins FILE); known: {', '.join(known)}, {TIMM}<name>"
        )
    return usb.builder(net)


def builder_of(settings: NetSettings) -> NetBuilder:
    """Find what builds the net that settings ask for.

    Raises:
        InputError: as :func:`net_builder`.
    """
    asked = {
        "dropout": settings.net_dropout,
        "input_noise": settings.net_noise,
        "width": settings.net_width,
        "double_head": settings.net_double_head or None,
        "l2_feature": settings.net_l2 or None,
    }
    options = {k: v for k, v in asked.items() if v is not None}
    channels = DATASETS[settings.dataset].channels
    return net_builder(settings.net, settings.net_from_name, channels, settings.img_size, options)


def builder_instead_of(given: NetBuilder | None, settings: NetSettings) -> NetBuilder | None:
    """Replace what USB's ``get_net_builder`` returns for the net of ``settings``, which knows a net by its name alone, by
    :func:`builder_of`, which also minds channels, options and pretrained weights. Any other builder stays.

    Raises:
        InputError: as :func:`net_builder`.
    """
    from muscle_plugin.usb.nets import is_usbs

    return builder_of(settings) if is_usbs(given, settings.net, settings.net_from_name) else given
