"""Algorithms, data sets and nets of one's own, without a change to this package.

A plugin is a Python file, or a module that can be imported, named by ``--plugins``. What it registers is then known by
name as this package's own is: in settings, on the command line, to ``muscle_<name>``. It registers

* an algorithm with USB's own decorator, ``@ALGORITHMS.register("mine")`` on a class written for USB;
* a data set with :func:`dataset`, on a function that returns :class:`Images`;
* a net with :func:`net`, on a function that returns an ``nn.Module``.

``docs/tutorials/`` has one page for each. Importing this module loads neither torch nor USB.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from muscle_plugin.errors import PluginError
from muscle_plugin.registry.names import (
    DATASETS,
    NETS,
    PLUGIN_DATASETS,
    PLUGIN_NETS,
    DatasetInfo,
    PluginDataset,
    PluginNet,
)
from muscle_plugin.registry.plugins import NAME, load_all, located, place_of
from muscle_plugin.settings.schema import MuscleSettings

__all__ = ["Images", "PluginError", "USBNet", "dataset", "load", "net"]  # noqa: F822


F = TypeVar("F", bound=Callable[..., Any])


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


def _place(kind: str, name: str, thing: object, plugins: Mapping[str, Any], owner: str | None) -> str:
    """The file that defines what is to have a name, unless ``plugins`` or an ``owner`` has something of this name."""
    if not callable(thing):
        raise PluginError(f"{kind} {name!r}: a function is expected, got {type(thing).__name__}")
    place = place_of(thing)
    what = f"{place}: {kind} {name!r}"
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise PluginError(f"{what}: a name has letters, digits and _, and begins with a letter")
    if name in plugins:  # which the cell of a notebook may define anew
        owner = None if place == plugins[name].place == "__main__" else plugins[name].place
    if owner:
        raise PluginError(f"{what}: {owner} has one of this name; take another")
    return place


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
        place = _place("data set", name, read, PLUGIN_DATASETS, "this package" if str(name) in DATASETS else None)
        what = f"{place}: data set {name!r}"
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
        of_usb = callable(getattr(sys.modules.get("semilearn.nets"), str(name), None))
        owner = "this package" if str(name) in NETS else "USB" if of_usb else None
        PLUGIN_NETS[name] = PluginNet(build, _place("net", name, build, PLUGIN_NETS, owner))
        return build

    return register


def load(plugins: str | Path | Iterable[str | Path]) -> None:
    """Import plugins, files (relative to the working folder) or modules, and make known what they register.

    It runs their code. One that was loaded before is not loaded again.

    Raises:
        PluginError: there is no such plugin, importing it fails, or what it registers cannot be used.
    """
    given = str(plugins) if isinstance(plugins, (str, Path)) else [str(p) for p in plugins]
    load_all(located(given, Path.cwd()), MuscleSettings.model_fields)


def __getattr__(name: str) -> Any:
    if name == "USBNet":  # it loads torch
        from muscle_plugin.nets.base import USBNet

        return USBNet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
