"""Readers of data sets by name: a new one is a function in a module of its own, and a line in ``READERS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from muscle_plugin.data.datasets.cifar import cifar10, cifar20, cifar100
from muscle_plugin.data.datasets.digits import digits
from muscle_plugin.data.datasets.eurosat import eurosat
from muscle_plugin.data.datasets.image_folder import image_folder
from muscle_plugin.data.datasets.miniimagenet import miniimagenet
from muscle_plugin.data.datasets.plugin import plugin_dataset
from muscle_plugin.data.datasets.stl10 import stl10
from muscle_plugin.data.datasets.svhn import svhn
from muscle_plugin.data.source import Source, SourceOptions, resize

__all__ = ["READERS", "load_source"]

READERS: dict[str, Callable[[SourceOptions], Source]] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "cifar20": cifar20,
    "miniimagenet": miniimagenet,
    "stl10": stl10,
    "svhn": svhn,
    "svhn_noextra": partial(svhn, parts=("train", "test")),
    "eurosat": eurosat,
    "folder": image_folder,
}


def load_source(dataset: str, options: SourceOptions) -> Source:
    """Read the data set of this name, at ``options.img_size``.

    Raises:
        DataError: its files are absent and cannot be downloaded, or are damaged.
    """
    reader = READERS.get(dataset)
    source = reader(options) if reader else plugin_dataset(dataset, options)
    return replace(source, images=resize(source.images, options.img_size))
