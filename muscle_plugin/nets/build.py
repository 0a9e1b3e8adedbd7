"""Builds a net by its name: this package's, timm's, torchvision's, USB's or a plugin's.

What a net needs is imported when it is asked for: neither USB nor timm nor torchvision is for another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from muscle_plugin.errors import InputError
from muscle_plugin.nets.base import USBNet
from muscle_plugin.nets.foreign import plugged_net, torchvision_net, torchvision_statistics
from muscle_plugin.nets.frozen import FeatureHead
from muscle_plugin.nets.own import CLASSES
from muscle_plugin.registry.names import DATASETS, NETS, PLUGIN_NETS, TIMM
from muscle_plugin.settings.schema import OF_ONES_OWN, RunSettings
from muscle_plugin.text import did_you_mean, shown

#: Builds a net; called as USB does, with ``num_classes`` and, if wanted, ``pretrained`` and ``pretrained_path``.
NetBuilder = Callable[..., nn.Module]
#: Values of options that ask for nothing, and which any net therefore takes.
_OFF: dict[str, object] = {"dropout": 0.0, "input_noise": 0.0, "width": 1.0, "double_head": False, "l2_feature": False}


@dataclass(frozen=True)
class NetOptions:
    """Choices about a net; None leaves one to the net's own default.

    Attributes:
        dropout: probability in [0, 1); 0 leaves dropout out (MUSCLE, Figure 2 b). In cnn13 after its two max-pools (0.5
            by default), in other nets before the head (0 by default).
        input_noise: standard deviation of Gaussian noise on the images while training, in units of the normalised
            images that the net is given (Mean Teacher's 13-layer net: 0.15). Default 0.
        width: factor on the channels, which are rounded to a multiple of 8. Default 1.
        double_head: a second, weight-normed linear head, whose output is ``logits2`` (Mean Teacher's "double output").
        l2_feature: divide the feature by its L2 norm before the head (label propagation without Mean Teacher).

    Raises:
        InputError: a value out of its range.
    """

    dropout: float | None = None
    input_noise: float | None = None
    width: float | None = None
    double_head: bool | None = None
    l2_feature: bool | None = None

    def __post_init__(self) -> None:
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise InputError(f"net: dropout must be at least 0 and less than 1, got {self.dropout}")
        if self.input_noise is not None and not 0 <= self.input_noise < math.inf:
            raise InputError(f"net: input_noise must be 0 or more, got {self.input_noise}")
        if self.width is not None and not 0 < self.width < math.inf:
            raise InputError(f"net: width must be more than 0, got {self.width}")


def _arguments(net: str, options: NetOptions | Mapping[str, Any] | None, has: Collection[str]) -> dict[str, Any]:
    """The options that are set, as keyword arguments of a net that has the options ``has``."""
    given = asdict(options) if isinstance(options, NetOptions) else dict(options or {})
    for name, value in given.items():
        if not isinstance(value, (int, float, type(None))):
            raise InputError(f"net: {name} must be a number or a truth value, got {shown(repr(value))}")
        asks_nothing = name in _OFF and value in (None, _OFF[name])
        if name not in has and not asks_nothing:
            raise InputError(f"net: {net} has no option {name!r}{did_you_mean(name, has)}; it has {', '.join(has)}")
    checked = asdict(NetOptions(**given))
    return {n: v for n, v in checked.items() if n in has and v is not None}


def build_net(
    name: str,
    num_classes: int,
    in_channels: int = 3,
    img_size: int | None = None,
    options: NetOptions | Mapping[str, Any] | None = None,
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
    chosen = _arguments(name, options, net_options(name))
    if name.startswith(TIMM):
        from muscle_plugin.nets.timm_backbone import TimmBackbone

        model = name.removeprefix(TIMM)
        return TimmBackbone(model, num_classes, in_channels, img_size, pretrained, pretrained_path, **chosen)
    if pretrained:
        raise InputError(f"net: {name} has no pretrained weights")
    net = CLASSES[name]
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
    if name not in CLASSES:
        known = [*CLASSES, f"{TIMM}<name>"]
        raise InputError(f"net: unknown {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    return CLASSES[name].OPTIONS


def net_builder(
    net: str, from_torchvision: bool, channels: int, img_size: int, options: Mapping[str, object]
) -> NetBuilder:
    """Find what builds a net of this package, timm, a plugin or USB, or of torchvision with ``from_torchvision``.

    USB's, timm's and torchvision's nets take three ``channels`` in any case. ``options`` are names and values of
    :class:`NetOptions`, for nets of this package and of timm. What cannot be had is an InputError.
    """
    if (net in CLASSES or net.startswith(TIMM)) and not from_torchvision:
        in_channels = 3 if net.startswith(TIMM) else channels
        return partial(build_net, net, in_channels=in_channels, img_size=img_size, options=options)
    if options:
        raise InputError(f"net: {net} has no option {', '.join(options)}; this package's and timm's nets have")
    if from_torchvision:
        return partial(torchvision_net, net)
    if net in PLUGIN_NETS:
        return partial(plugged_net, net, in_channels=channels, img_size=img_size)
    own = f"{', '.join((*NETS, *PLUGIN_NETS))}, {TIMM}<name>"
    if find_spec("semilearn") is None:
        advice = "USB's nets need semilearn, which is not installed: pip install semilearn"
        raise InputError(f"net: {shown(repr(net))} is none of {own}; {advice}")
    from muscle_plugin.usb.nets import names, usb_net

    if net not in (of_usb := names()):
        near = did_you_mean(net, (*NETS, *PLUGIN_NETS, *of_usb))
        raise InputError(f"net: unknown {shown(repr(net))}{near}{OF_ONES_OWN}; known: {own}, {', '.join(of_usb)}")
    return partial(usb_net, net)


def options_of(settings: RunSettings) -> dict[str, object]:
    """Options of the net that settings ask for; of a frozen backbone without those that its head takes."""
    asked = {"input_noise": settings.net_noise, "width": settings.net_width}
    if settings.tune != "head":
        asked |= {
            "dropout": settings.net_dropout,
            "double_head": settings.net_double_head or None,
            "l2_feature": settings.net_l2 or None,
        }
    return {k: v for k, v in asked.items() if v is not None}


def builder_of(settings: RunSettings) -> NetBuilder:
    """Find what builds the net that settings ask for; see :func:`net_builder`."""
    channels = DATASETS[settings.dataset].channels
    size = settings.input_size
    return net_builder(settings.net, settings.net_from_name, channels, size, options_of(settings))


def head_options(settings: RunSettings) -> dict[str, float | bool]:
    """Options of the head of a frozen backbone; see :class:`FeatureHead`."""
    s = settings
    options = {"dropout": s.net_dropout or 0.0, "double_head": s.net_double_head, "l2_feature": s.net_l2}
    return {"hidden": s.head == "mlp", **options}


def head_builder(settings: RunSettings, num_features: int) -> NetBuilder:
    """What builds the head of a frozen backbone."""

    def build(num_classes: int, **_: object) -> FeatureHead:
        return FeatureHead(num_features, num_classes, **head_options(settings))  # type: ignore[arg-type]

    return build


def pretrained_statistics(settings: RunSettings) -> tuple[tuple[float, ...], tuple[float, ...], str] | None:
    """Mean and standard deviation of the pixels, and interpolation, with which the net's weights were trained, if settings
    ask for these. Of USB's pretrained nets None: USB gives them images with the data set's statistics.

    Raises:
        InputError: they do, and the net does not say them.
    """
    s, found = settings, None
    if s.normalise == "data" or not (s.use_pretrain or s.normalise == "net"):
        return None
    if s.net.startswith(TIMM) and not s.net_from_name:
        from muscle_plugin.nets.timm_backbone import pretrained_statistics

        found = pretrained_statistics(s.net.removeprefix(TIMM))
    elif s.net_from_name:
        found = torchvision_statistics(s.net, s.pretrain_path)
    if found is None and s.normalise == "net":
        raise InputError(f"normalise: {s.net} does not say how it was trained; give --normalise data")
    return found


def builder_instead_of(given: NetBuilder | None, settings: RunSettings) -> NetBuilder | None:
    """Replace what USB's ``get_net_builder`` returns for the net of ``settings``, which knows a net by its name alone, by
    :func:`builder_of`, which also minds channels, options and pretrained weights. Any other builder stays."""
    if settings.net_from_name:
        from torchvision import models as usbs
    else:
        from muscle_plugin.usb.names import nets as usbs
    replace = given is not None and given is getattr(usbs, settings.net, None)
    return builder_of(settings) if replace else given
