"""What a plugin registers: tables of algorithms, data sets and nets, and the decorators that fill them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from muscle_plugin.errors import PluginError
from muscle_plugin.registry.names import DATASETS, NETS, DatasetInfo

F = TypeVar("F", bound=Callable[..., Any])

#: What a name may be: it becomes a flag's value and part of folder names.
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Images:
    """What the function of a data set returns; any object with these attributes will do.

    Attributes:
        images: (N, C, H, W) uint8, an array or a tensor; or a list of N image files (relative paths start at
            ``data_dir``), which are decoded as RGB and resized.
        labels: (N,) whole numbers from 0 to C - 1; -1 for no label.
        test: (N,) bool, or the positions of the test images; may be empty.
        classes: names of the C classes, in the order of the labels.
    """

    images: Any
    labels: Any
    test: Any
    classes: Sequence[str]


@dataclass(frozen=True)
class PluginDataset:
    """A registered data set: the function that reads it, the channels of its images, and the file that defines it."""

    read: Callable[[Any], Any]
    channels: int
    place: str


@dataclass(frozen=True)
class PluginNet:
    """A registered net: the function that builds it, and the file that defines it."""

    build: Callable[..., Any]
    place: str


#: What plugins have registered, by name.
PLUGIN_DATASETS: dict[str, PluginDataset] = {}
PLUGIN_NETS: dict[str, PluginNet] = {}


def place_of(thing: object) -> str:
    """The file that defines a function or class, or the name of its module."""
    module = getattr(thing, "__module__", None) or "?"
    return str(getattr(sys.modules.get(module), "__file__", None) or module)


def _check_name(kind: str, name: object, thing: object) -> None:
    if not callable(thing):
        raise PluginError(f"{kind} {name!r}: a function is expected, got {type(thing).__name__}")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise PluginError(
            f"{place_of(thing)}: {kind} {name!r}: a name has letters, digits and _, and begins with a letter"
        )


def _redefines(old: str, thing: object) -> bool:
    """Whether a notebook cell is run again."""
    return place_of(thing) == old == "__main__"


def dataset(
    name: str,
    *,
    img_size: int,
    channels: int = 3,
    num_classes: int | None = None,
    num_labels: int | None = None,
    weak_augment: str = "crop_flip",
    hard_augment: str = "randaugment",
) -> Callable[[F], F]:
    """Decorator of a function that returns the :class:`Images` of ``--dataset <name>``.

    The function is called with one argument, whose attributes are ``data_dir`` (a ``Path``), ``img_size`` (pixels) and
    ``seed`` (of ``split_seed``); it need not use them.

    Args:
        img_size: default of ``--img_size``: side in pixels to which images are resized.
        channels: of the images, 1 or 3.
        num_classes: if given, settings that do not fit it are refused before the data is read.
        num_labels: default of ``--num_labels``; None: every label there is.
        weak_augment, hard_augment: defaults of the settings of these names.

    Raises:
        PluginError: there is a data set of this name, or a value is out of range.
    """

    def register(read: F) -> F:
        _check_name("data set", name, read)
        place = place_of(read)
        what = f"{place}: data set {name!r}"
        if name in DATASETS and not (name in PLUGIN_DATASETS and _redefines(PLUGIN_DATASETS[name].place, read)):
            owner = PLUGIN_DATASETS[name].place if name in PLUGIN_DATASETS else "this package"
            raise PluginError(f"{what}: {owner} has one of this name; take another")
        for key, value, least, most in (
            ("img_size", img_size, 4, 1024),
            ("num_classes", num_classes, 2, 10**6),
            ("num_labels", num_labels, 1, 2**53),
        ):
            if not (value is None and key != "img_size") and not (type(value) is int and least <= value <= most):
                raise PluginError(f"{what}: {key} must be a whole number from {least} to {most}, got {value!r}")
        if channels not in (1, 3):
            raise PluginError(f"{what}: channels must be 1 or 3, got {channels!r}")
        PLUGIN_DATASETS[name] = PluginDataset(read, channels, place)
        DATASETS[name] = DatasetInfo(
            num_classes, img_size, channels, num_labels=num_labels, weak_augment=weak_augment, hard_augment=hard_augment
        )
        return read

    return register


def net(name: str) -> Callable[[F], F]:
    """Decorator of a function that builds the net of ``--net <name>``.

    It is called with those of ``num_classes``, ``channels`` and ``img_size`` that it has parameters for, and returns an
    ``nn.Module`` that takes (N, channels, img_size, img_size) images and either

    * ends in an ``nn.Linear`` of ``num_classes`` outputs and returns these, as torchvision's and timm's nets do, or
    * returns ``{"logits": (N, num_classes), "feat": (N, F)}`` and takes ``only_feat`` and ``only_fc``, as USB's nets do; a
      subclass of :class:`USBNet` does both.

    Raises:
        PluginError: there is a net of this name.
    """

    def register(build: F) -> F:
        _check_name("net", name, build)
        place = place_of(build)
        usb = sys.modules.get("semilearn.nets")
        if name in PLUGIN_NETS and not _redefines(PLUGIN_NETS[name].place, build):
            raise PluginError(f"{place}: net {name!r}: {PLUGIN_NETS[name].place} has one of this name; take another")
        if name in NETS or callable(getattr(usb, name, None)):
            raise PluginError(
                f"{place}: net {name!r}: {'this package' if name in NETS else 'USB'} has one of this name; take another"
            )
        PLUGIN_NETS[name] = PluginNet(build, place)
        return build

    return register
