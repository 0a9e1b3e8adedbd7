"""Builds a net by its name: of this package, timm, torchvision, USB or a plugin."""

from __future__ import annotations

import contextlib
import http.client
import os
import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from muscle_plugin.files import (
    load_tensors,
)
from muscle_plugin.registry.extension import PLUGIN_NETS
from muscle_plugin.registry.names import DATASETS, NETS, TIMM
from muscle_plugin.settings.schema import OF_ONES_OWN
from muscle_plugin.text import did_you_mean, first_line, shown


def builder_of(settings: Any) -> Any:
    channels = DATASETS[settings.dataset].channels
    return net_builder(settings.net, settings.net_from_name, channels, settings.img_size, net_options(settings))


def net_options(settings: Any) -> dict[str, Any]:
    """The options of the net that settings ask for, by the names of :class:`muscle_plugin.nets.NetOptions`."""
    asked = {
        "dropout": settings.net_dropout,
        "input_noise": settings.net_noise,
        "width": settings.net_width,
        "double_head": settings.net_double_head or None,
        "l2_feature": settings.net_l2 or None,
    }
    return {k: v for k, v in asked.items() if v is not None}


def net_builder(net: str, from_torchvision: bool, channels: int, img_size: int, options: dict[str, Any]) -> Any:
    """What builds the net: called with ``num_classes`` and USB's keywords for pretrained weights.

    Args:
        channels: of the images; USB's and torchvision's nets take three in any case.
        options: see :class:`muscle_plugin.nets.NetOptions`; for nets of this package and of timm.

    Raises:
        ValueError: no such net, or it has no such option.
    """
    from muscle_plugin.nets import OWN_NETS, build_net

    if (net in OWN_NETS or net.startswith(TIMM)) and not from_torchvision:
        in_channels = 3 if net.startswith(TIMM) else channels
        return partial(build_net, net, in_channels=in_channels, img_size=img_size, options=options)
    if options:
        raise ValueError(f"net: {net} has no option {', '.join(options)}; this package's and timm's nets have")
    if from_torchvision:
        return partial(_torchvision_net, net)
    if net in PLUGIN_NETS:
        from muscle_plugin.nets.plugged import plugged_net

        return partial(plugged_net, net, in_channels=channels, img_size=img_size)
    from muscle_plugin.usb.names import nets

    # those of text and sound have no number at the end, and would fetch their weights
    if not callable(getattr(nets, net, None)) or net.startswith("_") or not net[-1:].isdigit():
        usb = sorted(n for n, x in vars(nets).items() if n[-1].isdigit() and callable(x) and n not in NETS)
        known = (*NETS, *PLUGIN_NETS, *usb)
        near = did_you_mean(net, known)
        raise ValueError(f"net: unknown {shown(repr(net))}{near}{OF_ONES_OWN}; known: {', '.join(known)}, {TIMM}<name>")
    return partial(_usb_net, getattr(nets, net), net)


def _usb_net(builder: Any, name: str, num_classes: int, pretrained: bool = False, pretrained_path: Any = None) -> Any:
    """A net of USB's; its pretrained weights come from a file or a URL.

    Raises:
        ValueError: these cannot be had, or are not its weights.
    """
    if not pretrained:
        return builder(num_classes=num_classes)
    where = str(pretrained_path or "")
    from_url = "://" in where
    if not from_url and not Path(where).is_file():
        raise ValueError(
            f"net: {where or 'pretrain_path'}: no such file of weights for {name}; --pretrain_path names it"
        )
    try:
        if not from_url:
            load_tensors(Path(where))
        with _weights_only():
            return builder(num_classes=num_classes, pretrained=True, pretrained_path=where)
    except (OSError, http.client.HTTPException) as e:
        instead = "without a network give a copy of it as --pretrain_path FILE, or --use_pretrain false"
        raise ValueError(f"net: {where}: cannot be downloaded ({e}); {instead}") from e
    except (LookupError, RuntimeError, TypeError, ValueError, AttributeError, EOFError, pickle.UnpicklingError) as e:
        raise ValueError(f"net: {where}: not weights of {name} as USB publishes them ({first_line(e)})") from e


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """USB's ``torch.load`` says nothing of ``weights_only``, which is off where torch is older than 2.6, and off in its hub."""
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def _torchvision_net(name: str, num_classes: int, pretrained: bool = False, pretrained_path: Any = None) -> Any:
    from muscle_plugin.nets.torchvision_net import TorchvisionNet

    return TorchvisionNet(name, num_classes, pretrained_path if pretrained else None)
