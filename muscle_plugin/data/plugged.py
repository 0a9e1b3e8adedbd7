"""Data sets of plugins: what their function returns is checked, and becomes a :class:`Source`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from muscle_plugin.data.sources import Source, SourceOptions
from muscle_plugin.errors import DataError
from muscle_plugin.registry.extension import PLUGIN_DATASETS
from muscle_plugin.registry.names import DATASETS
from muscle_plugin.text import fault_in, shown


def read_plugged(name: str, options: SourceOptions) -> Source:
    """The data set that a plugin registered.

    Raises:
        DataError: its function fails, or returns something else than :class:`muscle_plugin.extend.Images` should hold; one
            line that names the plugin.
    """
    entry = PLUGIN_DATASETS[name]
    what = f"{entry.place}: data set {name!r}"
    try:
        found = entry.read(options)
    except DataError as e:
        raise DataError(f"{what}: {e}") from e
    except Exception as e:
        raise DataError(fault_in(e, entry.place, what)) from e
    return _Checked(what, name, entry.channels, options).source(found)


class _Checked:
    """Makes a source of what a function returned; each fault is a line that begins with ``what``."""

    def __init__(self, what: str, name: str, channels: int, options: SourceOptions) -> None:
        self.what, self.name, self.channels, self.options = what, name, channels, options

    def fault(self, text: str) -> NoReturn:
        raise DataError(f"{self.what}: {text}")

    def source(self, found: Any) -> Source:
        missing = [n for n in ("images", "labels", "test", "classes") if not hasattr(found, n)]
        if missing:
            self.fault(f"returns {type(found).__name__}, which has no {', '.join(missing)}; return Images(...)")
        classes = self.classes(found.classes)
        files = isinstance(found.images, (list, tuple)) and all(isinstance(x, (str, os.PathLike)) for x in found.images)
        if files:
            images, names = self.decoded([Path(x) for x in found.images])
        else:
            images, names = self.array(found.images), []
        if not len(images):
            self.fault("returns no image")
        labels = self.labels(found.labels, len(images), classes)
        test = self.test(found.test, len(images))
        if bool((labels[test] < 0).any()):
            self.fault(f"test image {int((test & (labels < 0)).nonzero()[0])} has no label")
        if not bool((labels[~test] >= 0).any()):
            self.fault("no image for training has a label")
        train = (~test).nonzero().flatten()
        return Source(images, labels, train, test.nonzero().flatten(), classes, names=names)

    def classes(self, given: Any) -> tuple[str, ...]:
        if isinstance(given, str) or not hasattr(given, "__iter__"):
            self.fault(f"classes must be a list of names, got {shown(repr(given))}")
        names = tuple(given)
        if not all(isinstance(n, str) for n in names) or len(set(names)) < max(2, len(names)):
            self.fault(f"classes must be two or more different names, got {shown(repr(names))}")
        expected = DATASETS[self.name].num_classes
        if expected not in (None, len(names)):
            self.fault(f"returns {len(names)} classes, but was registered with num_classes={expected}")
        return names

    def array(self, given: Any) -> Tensor:
        found = given.detach().cpu().numpy() if isinstance(given, Tensor) else given
        wanted = f"images must be uint8 of shape (N, {self.channels}, H, W), or a list of files"
        if not isinstance(found, np.ndarray):
            self.fault(f"{wanted}; got {type(given).__name__}")
        got = f"{wanted}; got {found.dtype} {found.shape}"
        if found.dtype.kind == "f":
            self.fault(f"{got}: pixels from 0 to 1 become so by (255 * images).round().astype('uint8')")
        if found.dtype != np.uint8:
            self.fault(got)
        if found.ndim == 3 and self.channels == 1:
            self.fault(f"{got}: images[:, None] has the channel")
        if found.ndim == 4 and found.shape[1] != self.channels and found.shape[3] == self.channels:
            self.fault(f"{got}: images.transpose(0, 3, 1, 2) has the channels second")
        if found.ndim == 4 and found.shape[1] in (1, 3) and found.shape[1] != self.channels:
            self.fault(f"{got}: register it with channels={found.shape[1]}")
        if found.ndim != 4 or found.shape[1] != self.channels or not all(found.shape[2:]):
            self.fault(got)
        return torch.from_numpy(np.require(found, requirements=["C", "W"]))

    def decoded(self, files: list[Path]) -> tuple[Tensor, list[str]]:
        from muscle_plugin.data.images import name_below, pack

        if self.channels != 3:
            self.fault("image files are read as RGB: register it with channels=3")
        root, options = self.options.data_dir, self.options
        paths = [root / f.expanduser() for f in files]
        packed = pack(self.name, root, paths, options.img_size, options.cache_dirs)
        if packed.bad:
            self.fault(f"{len(packed.bad)} image file(s) cannot be used: {packed.faults()}")
        return packed.images, [str(name_below(root, p)) for p in paths]

    def labels(self, given: Any, count: int, classes: tuple[str, ...]) -> Tensor:
        found = self.numbers("labels", given)
        if found.shape != (count,) or found.dtype.kind not in "iu":
            self.fault(f"labels must be {count} whole numbers, one for each image, got {found.dtype} {found.shape}")
        wrong = np.flatnonzero((found.astype(object) < -1) | (found >= len(classes)))
        if len(wrong):
            self.fault(
                f"{len(wrong)} label(s) are not from 0 to {len(classes) - 1}, nor -1 for none; first: image {wrong[0]},"
                f" {found[wrong[0]]}"
            )
        return torch.from_numpy(found.astype(np.int64))

    def test(self, given: Any, count: int) -> Tensor:
        found = self.numbers("test", given)
        wanted = f"test must be {count} truth values (bool), or positions of images"
        if found.dtype == bool:
            if found.shape != (count,):
                self.fault(f"{wanted}; got {found.shape} truth values")
            return torch.from_numpy(found.copy())
        if found.ndim != 1 or (len(found) and found.dtype.kind not in "iu"):
            self.fault(f"{wanted}; got {found.dtype} {found.shape}")
        positions: np.ndarray = found.astype(np.int64)
        if len(positions) and (positions.min() < 0 or positions.max() >= count):
            self.fault(f"{wanted}; got positions from {positions.min()} to {positions.max()} of {count} images")
        if len(set(positions.tolist())) < len(positions):
            self.fault(f"{wanted}; got a position twice (is it a mask of 0 and 1? give .astype(bool))")
        mask = torch.zeros(count, dtype=torch.bool)
        mask[torch.from_numpy(positions)] = True
        return mask

    def numbers(self, name: str, given: Any) -> np.ndarray:
        try:
            return np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)
        except (TypeError, ValueError):
            self.fault(f"{name} must be a list of numbers, got {shown(given)}")
