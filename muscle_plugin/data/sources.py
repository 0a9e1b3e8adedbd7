"""Sources: each returns a data set's images and labels as arrays. A new one is a function and a line in ``SOURCES``."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class DataError(RuntimeError):
    """The data of a run cannot be had. The message says what is missing and how to provide it."""


@dataclass(frozen=True)
class Source:
    """A classification data set in memory.

    Attributes:
        train: (N, channels, H, W) uint8 training images.
        train_labels: (N,) int64.
        test: (M, channels, H, W) uint8 test images, never seen in training.
        test_labels: (M,) int64.
        classes: class names, in the order of the labels.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]

    def resized(self, size: int) -> Source:
        """The same with images of ``size`` x ``size`` pixels (bilinear, antialiased)."""
        if self.train.shape[-2:] == (size, size):
            return self
        return Source(
            _resize(self.train, size), self.train_labels, _resize(self.test, size), self.test_labels, self.classes
        )


def _resize(images: Tensor, size: int) -> Tensor:
    scaled = F.interpolate(images.float(), (size, size), mode="bilinear", align_corners=False, antialias=True)
    return scaled.round().clamp(0, 255).to(torch.uint8)


def digits(data_dir: Path) -> Source:
    """scikit-learn's digits: 1,797 scans of 8 x 8 pixels, one channel; 1,437 to train on and 360 to test, stratified.

    The division is the same for every seed. ``data_dir`` is not used: the images come with scikit-learn.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=bunch.target, random_state=0)
    return Source(images[train], labels[train], images[test], labels[test], tuple("0123456789"))


class _ArraysOnly(pickle.Unpickler):
    """Reads CIFAR's pickles, which hold arrays, lists, strings and numbers, and refuses anything that could run code."""

    _ALLOWED = {("_reconstruct", "numpy"), ("ndarray", "numpy"), ("dtype", "numpy"), ("_codecs", "encode")}  # noqa: RUF012

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        if module.split(".")[0] == "numpy" and (name, "numpy") in self._ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"refused {module}.{name}")


def _cifar(data_dir: Path, name: str, folder: str, train: tuple[str, ...], test: str, labels: str, meta: str) -> Source:
    places = [data_dir / folder, data_dir / name / folder]
    root = next((p for p in places if (p / test).is_file()), None)
    if root is None:
        _download_cifar(name, data_dir)
        root = places[0]

    def read(file: str) -> dict[str, Any]:
        try:
            with (root / file).open("rb") as f:
                return _ArraysOnly(f, encoding="latin1").load()
        except FileNotFoundError:
            raise DataError(f"{root / file}: missing; the other files of {name} are there") from None
        except (pickle.UnpicklingError, EOFError, ValueError, ImportError) as e:
            raise DataError(f"{root / file}: not a file of {name} ({e}); fetch it again") from None

    def images(parts: list[dict[str, Any]]) -> Tensor:
        return torch.from_numpy(np.concatenate([p["data"] for p in parts]).reshape(-1, 3, 32, 32))

    def targets(parts: list[dict[str, Any]]) -> Tensor:
        return torch.tensor([y for p in parts for y in p[labels]], dtype=torch.int64)

    parts, held_out = [read(f) for f in train], [read(test)]
    names = tuple(read("batches.meta" if labels == "labels" else "meta")[meta])
    return Source(images(parts), targets(parts), images(held_out), targets(held_out), names)


def _download_cifar(name: str, data_dir: Path) -> None:
    from torchvision import datasets

    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        cls(str(data_dir), download=True)
    except Exception as e:
        raise DataError(
            f"{name} is not in {data_dir} and could not be downloaded ({type(e).__name__}). Without a network: put"
            f" torchvision's folder {cls.base_folder} there, or give the folder that holds it as --data_dir"
        ) from None


def cifar10(data_dir: Path) -> Source:
    """CIFAR-10 from torchvision's files in ``data_dir`` (or ``data_dir/cifar10``), downloaded if absent."""
    train = tuple(f"data_batch_{i}" for i in range(1, 6))
    return _cifar(data_dir, "cifar10", "cifar-10-batches-py", train, "test_batch", "labels", "label_names")


def cifar100(data_dir: Path) -> Source:
    """CIFAR-100, fine labels, from torchvision's files in ``data_dir`` (or ``data_dir/cifar100``)."""
    return _cifar(data_dir, "cifar100", "cifar-100-python", ("train",), "test", "fine_labels", "fine_label_names")


SOURCES: dict[str, Callable[[Path], Source]] = {"digits": digits, "cifar10": cifar10, "cifar100": cifar100}


def load_source(dataset: str, data_dir: str | Path, img_size: int) -> Source:
    """The data set of this name, at this image size.

    Raises:
        DataError: its files are absent, damaged, and cannot be downloaded.
    """
    return SOURCES[dataset](Path(data_dir).expanduser()).resized(img_size)
