"""Data sets of plugins: what the plugin's function returns is checked, and becomes a :class:`Source`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from muscle_plugin.data.checks import check_labels
from muscle_plugin.data.images import name_below
from muscle_plugin.data.packed import pack
from muscle_plugin.data.source import Source, SourceOptions
from muscle_plugin.errors import DataError
from muscle_plugin.registry.names import DATASETS, PLUGIN_DATASETS
from muscle_plugin.text import fault_in, shown


def plugin_dataset(name: str, options: SourceOptions) -> Source:
    """Read the data set that a plugin registered; raise a DataError that names it where it fails, or does not return what
    :class:`muscle_plugin.extend.Images` describes."""
    entry = PLUGIN_DATASETS[name]
    what = f"{entry.place}: data set {name!r}"
    try:
        return _checked(entry.read(options), name, entry.channels, options)
    except DataError as e:
        raise DataError(f"{what}: {e}") from e
    except Exception as e:  # whatever the plugin's code raises
        raise DataError(fault_in(e, entry.place, what)) from e


def _checked(returned: object, name: str, channels: int, options: SourceOptions) -> Source:
    """Make a source of what a plugin's function returned."""
    parts = ("images", "labels", "test", "classes")
    if missing := [p for p in parts if not hasattr(returned, p)]:
        raise DataError(f"returns {type(returned).__name__}, which has no {', '.join(missing)}; return Images(...)")
    given, given_labels, given_test, given_classes = (getattr(returned, p) for p in parts)
    classes = _classes(given_classes, DATASETS[name].num_classes)
    of_files: dict[str, Any] = {}
    if isinstance(given, (list, tuple)) and all(isinstance(x, (str, os.PathLike)) for x in given):
        images, of_files = _decoded(given, name, channels, options)
    else:
        images = _pixels(_array("images", given), channels)
    count = len(images)
    if not count:
        raise DataError("returns no image")
    found = _array("labels", given_labels)
    if found.shape != (count,) or found.dtype.kind not in "iu":
        raise DataError(f"labels must be {count} whole numbers, one for each image, got {found.dtype} {found.shape}")
    labels = torch.from_numpy(found.astype(np.int64))
    test = _test_mask(_array("test", given_test), count)
    if not (labels[~test] >= 0).any():
        raise DataError("no image for training has a label")
    source = Source(images, labels, (~test).nonzero().flatten(), test.nonzero().flatten(), classes, **of_files)
    check_labels(source, "labels")
    return source


def _classes(given: object, expected: int | None) -> tuple[str, ...]:
    names = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else ()
    if not all(isinstance(n, str) for n in names) or len(set(names)) < max(2, len(names)):
        raise DataError(f"classes must be a list of two or more different names, got {shown(repr(given))}")
    if expected not in (None, len(names)):
        raise DataError(f"returns {len(names)} classes, but was registered with num_classes={expected}")
    return names


def _pixels(found: np.ndarray, channels: int) -> Tensor:
    shape = found.shape
    if found.dtype == np.uint8 and found.ndim == 4 and shape[1] == channels and all(shape[2:]):
        return torch.from_numpy(np.require(found, requirements=["C", "W"]))
    hint = ""
    if found.dtype.kind == "f":
        hint = ": pixels from 0 to 1 become so by (255 * images).round().astype('uint8')"
    elif found.ndim == 4 and shape[3] == channels:
        hint = ": images.transpose(0, 3, 1, 2) has the channels second"
    elif found.ndim == 4 and shape[1] in {1, 3} - {channels}:
        hint = f": register it with channels={shape[1]}"
    wanted = f"images must be uint8 of shape (N, {channels}, H, W), or a list of files"
    raise DataError(f"{wanted}; got {found.dtype} {shape}{hint}")


def _decoded(
    files: Sequence[str | os.PathLike[str]], name: str, channels: int, options: SourceOptions
) -> tuple[Tensor, dict[str, Any]]:
    if channels != 3:
        raise DataError("image files are read as RGB: register it with channels=3")
    root = options.data_dir
    paths = [root / Path(f).expanduser() for f in files]
    packed = pack(name, root, paths, options.img_size, options.cache_dirs, options.pixel_range)
    if packed.bad:
        raise DataError(packed.faults())
    names = [str(name_below(root, p)) for p in paths]
    return packed.images, {"names": names, "notes": packed.notes, "pixel_range": packed.pixel_range}


def _test_mask(found: np.ndarray, count: int) -> Tensor:
    """(count,) bool of a mask, or of positions."""
    if found.dtype == bool and found.shape == (count,):
        return torch.from_numpy(found.copy())
    whole = found.dtype.kind in ("iu" if found.size else "iuf")  # of an empty list NumPy makes floats
    if not whole or found.ndim != 1 or (test := np.isin(np.arange(count), found)).sum() < len(found):
        raise DataError(
            f"test must be {count} truth values (.astype(bool) makes them of 0 and 1), or different positions of the {count}"
            f" images; got {found.dtype} {found.shape}: {shown(found)}"
        )
    return torch.from_numpy(test)


def _array(name: str, given: object) -> np.ndarray:
    try:
        return np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)
    except (TypeError, ValueError):
        raise DataError(f"{name} must be a list of numbers, got {shown(given)}") from None
