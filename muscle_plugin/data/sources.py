"""Sources: each reads a data set into one array of images. A new one is a function and a line in ``SOURCES``.

Image folders and Mini-ImageNet are in ``folders.py``.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from muscle_plugin.errors import DataError
from muscle_plugin.registry.extension import PLUGIN_DATASETS
from muscle_plugin.registry.names import DATASETS
from muscle_plugin.text import shown

__all__ = ["SOURCES", "DataError", "Source", "SourceOptions", "load_source"]


@dataclass(frozen=True)
class Source:
    """A classification data set.

    Attributes:
        images: (P, channels, H, W) uint8, all of them, in memory or mapped from a file.
        labels: (P,) int64; -1 where the data set gives none.
        train: (N,) int64, which images are for training, labelled or not.
        test: (M,) int64, which are for testing; may be empty. Never seen in training.
        classes: class names, in the order of the labels.
        subclasses: (P,) int64 finer labels, where the data set has them (CIFAR-20).
        subclass_names: their names.
        notes: what a user should know of how it was read.
        names: (P,) names of the images, where they come from files of their own.
    """

    images: Tensor
    labels: Tensor
    train: Tensor
    test: Tensor
    classes: tuple[str, ...]
    subclasses: Tensor | None = None
    subclass_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    names: Sequence[str] = ()

    @property
    def train_labels(self) -> Tensor:
        """(N,) labels of the training images."""
        return self.labels[self.train]

    @property
    def test_labels(self) -> Tensor:
        """(M,) labels of the test images."""
        return self.labels[self.test]

    def name_of(self, image: int) -> str:
        """What to call an image in a message: its file, or its place among the training or test images."""
        if self.names:
            return self.names[image]
        for kind, members in (("training", self.train), ("test", self.test)):
            found = (members == image).nonzero()
            if len(found):
                return f"{kind} image {int(found[0])}"
        return f"image {image}"

    def resized(self, size: int) -> Source:
        """The same with images of ``size`` x ``size`` pixels (bilinear, antialiased)."""
        return replace(self, images=_resized(self.images, size))


def _resized(images: Tensor, size: int) -> Tensor:
    """(N, channels, size, size) uint8; the images themselves if they have this size."""
    if images.shape[-2:] == (size, size):
        return images
    out = torch.empty((*images.shape[:2], size, size), dtype=torch.uint8)
    for start in range(
        0, len(images), 1024
    ):  # a part at a time: as floats, all of them would need four times the memory
        part = images[start : start + 1024].float()
        scaled = F.interpolate(part, (size, size), mode="bilinear", align_corners=False, antialias=True)
        out[start : start + 1024] = scaled.round_().clamp_(0, 255)
    return out


@dataclass(frozen=True)
class SourceOptions:
    """What a source may need besides its name.

    Attributes:
        data_dir: folder of the data files.
        img_size: side to which images of any size are resized.
        seed: of the division into training and test images, where the data set has no fixed one (Mini-ImageNet).
        labels_csv: table of labels of an image folder.
        skip_bad_images: leave out image files that cannot be read, instead of refusing.
        cache_dirs: folders for array files, by preference.
        allow_outside: image files may be links out of ``data_dir``, and ``labels_csv`` may name others than those in it.
    """

    data_dir: Path
    img_size: int
    seed: int = 0
    labels_csv: Path | None = None
    skip_bad_images: bool = False
    cache_dirs: Sequence[Path] = ()
    allow_outside: bool = False


def _division(train: int, test: int) -> tuple[Tensor, Tensor]:
    """Indices of the first ``train`` images, and of the ``test`` ones after them."""
    return torch.arange(train), torch.arange(train, train + test)


# ------------------------------------------------------------------------------------------------------------- digits


def digits(options: SourceOptions) -> Source:
    """scikit-learn's digits: 1,797 scans of 8 x 8 pixels, one channel; 1,437 to train on and 360 to test, stratified.

    The division is the same for every seed. ``data_dir`` is not used: the images come with scikit-learn.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=bunch.target, random_state=0)
    return Source(images, labels, torch.from_numpy(train), torch.from_numpy(test), tuple("0123456789"))


# -------------------------------------------------------------------------------------------------------------- CIFAR


class _Stored:
    """Stands for a NumPy object in a pickle: remembers what it was built from, and runs nothing of NumPy's."""

    def __init__(self, *args: Any) -> None:
        self.state: tuple[Any, ...] = args

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state


def _latin1(text: str, codec: str) -> bytes:
    """How pickle writes bytes; other codecs would make more of them."""
    if codec != "latin1":
        raise pickle.UnpicklingError(f"refused codec {codec}")
    return text.encode(codec)


class _CifarUnpickler(pickle.Unpickler):
    """Reads CIFAR's pickles (dictionaries, lists, strings, numbers, one array) and refuses all that could run code."""

    _NUMPY = frozenset(["_reconstruct", "ndarray", "dtype"])

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        if module.split(".")[0] == "numpy" and name in self._NUMPY:
            return _Stored
        raise pickle.UnpicklingError(f"refused {module}.{name}")


class _CifarStream:
    """A CIFAR file for an unpickler, with the pixels led past it: the one long string of the file goes straight to
    ``room``, and an empty one takes its place. Otherwise the pixels would be in memory three times.

    Args:
        room: (at least the file's pixels,) uint8.
    """

    def __init__(self, file: BinaryIO, room: np.ndarray) -> None:
        self._file, self._room, self._last = file, room, b""
        self.readline = file.readline
        self.taken = 0

    def read(self, n: int) -> bytes:
        data = self._file.read(n)
        # opcode T: a string, whose length are the next four bytes
        if n == 4 and self._last == b"T" and (size := int.from_bytes(data, "little")) > 1 << 20:
            if self.taken or size > len(self._room):
                raise ValueError(f"{size} bytes of pixels")
            self.taken = self._file.readinto(self._room[:size])  # type: ignore[attr-defined]
            if self.taken < size:
                raise EOFError("cut off")
            data = bytes(4)
        self._last = data
        return data


def _are_labels(found: Any, count: int) -> bool:
    return isinstance(found, list) and len(found) == count and all(type(x) is int and 0 <= x < 100 for x in found)


@dataclass(frozen=True)
class _CifarFiles:
    """Where a CIFAR keeps what: files of training images, of test images, of names; keys within them."""

    name: str
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    label_names: str

    def read(self, root: Path, file: str, room: np.ndarray) -> dict[str, Any]:
        """The content of a file, as ``{name: value}``; its pixels go to ``room``, and their number is ``"data"``."""
        try:
            with (root / file).open("rb") as f:
                stream = _CifarStream(f, room)
                content = _CifarUnpickler(stream, encoding="bytes").load()  # type: ignore[arg-type]
            content = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
            if "data" in content:
                _, shape, _, _, pixels = content["data"].state
                if pixels:  # written by another pickler
                    stream.taken = len(pixels)
                    room[: len(pixels)] = np.frombuffer(pixels, np.uint8)
                if len(shape) != 2 or shape[1] != 3072 or shape[0] * 3072 != stream.taken:
                    raise ValueError(f"expected rows of 3072 pixels, found {shape}")
                content["data"] = shape[0]
            return content
        except FileNotFoundError:
            raise DataError(f"{root / file}: missing; the other files of {self.name} are there") from None
        except Exception as e:  # a pickle can make its reader raise anything
            raise DataError(f"{root / file}: not a file of {self.name} ({shown(e)}); fetch it again") from None

    def names(self, root: Path, key: str) -> tuple[str, ...]:
        names = self.read(root, self.meta, np.empty(0, np.uint8)).get(key, [])
        try:
            return tuple(n.decode() if isinstance(n, bytes) else str(n) for n in names)
        except (TypeError, UnicodeDecodeError):
            raise DataError(f"{root / self.meta}: not a file of {self.name}; fetch it again") from None

    def load(self, options: SourceOptions) -> Source:
        root = _find_or_download(self.name, options.data_dir, self.folder, self.test)
        keys = ("coarse_labels", "fine_labels") if self.labels == "coarse_labels" else (self.labels,)
        columns: dict[str, list[int]] = {k: [] for k in keys}
        counts: list[int] = []
        images: np.ndarray = np.empty((60_000, 3, 32, 32), np.uint8)
        for file in (*self.train, self.test):
            content = self.read(root, file, images[sum(counts) :].reshape(-1))
            lists = [content.get(k) for k in keys]
            if "data" not in content or any(not _are_labels(x, content["data"]) for x in lists):
                raise DataError(f"{root / file}: not a file of {self.name} (it lacks data or {self.labels})")
            counts.append(content["data"])
            for key in keys:
                columns[key] += content[key]
        train, test = _division(sum(counts[:-1]), counts[-1])
        fine = torch.tensor(columns["fine_labels"]) if len(keys) == 2 else None
        fine_names = self.names(root, "fine_label_names") if len(keys) == 2 else ()
        return Source(
            torch.from_numpy(images[: sum(counts)]), torch.tensor(columns[self.labels]), train, test,
            self.names(root, self.label_names), fine, fine_names,
        )  # fmt: skip


_CIFAR10 = _CifarFiles(
    "cifar10", "cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta",
    "labels", "label_names",
)  # fmt: skip
_CIFAR100 = _CifarFiles("cifar100", "cifar-100-python", ("train",), "test", "meta", "fine_labels", "fine_label_names")
_CIFAR20 = replace(_CIFAR100, labels="coarse_labels", label_names="coarse_label_names")


def cifar10(options: SourceOptions) -> Source:
    """CIFAR-10 from torchvision's files in ``data_dir`` (or ``data_dir/cifar10``), downloaded if absent."""
    return _CIFAR10.load(options)


def cifar100(options: SourceOptions) -> Source:
    """CIFAR-100, 100 fine labels, from torchvision's files in ``data_dir`` (or ``data_dir/cifar100``)."""
    return _CIFAR100.load(options)


def cifar20(options: SourceOptions) -> Source:
    """CIFAR-100 by its 20 superclasses; the fine labels are the subclasses, of which a split can sequester some."""
    return _CIFAR20.load(options)


# ------------------------------------------------------------------------------------------------------- STL-10, SVHN


def stl10(options: SourceOptions) -> Source:
    """STL-10: 5,000 training images with labels, 100,000 without, 8,000 test images, 96 x 96; torchvision's files.

    Read from the binary files in parts: the images are 3.1 GB.
    """
    root = _find_or_download("stl10", options.data_dir, "stl10_binary", "train_X.bin")

    def binary(file: str, kind: str) -> np.ndarray:
        try:
            return np.memmap(root / file, np.uint8, "r")
        except (OSError, ValueError) as e:
            raise DataError(f"{root / file}: {kind} of STL-10 cannot be read ({e})") from None

    parts = [binary(f"{p}_X.bin", "images") for p in ("train", "unlabeled", "test")]
    per_image = 3 * 96 * 96
    for part, file in zip(parts, ("train", "unlabeled", "test"), strict=True):
        if len(part) % per_image:
            raise DataError(f"{root / file}_X.bin: {len(part)} bytes are no whole number of 96 x 96 images")
    counts = [len(p) // per_image for p in parts]
    size = options.img_size
    images = torch.empty((sum(counts), 3, size, size), dtype=torch.uint8)
    start = 0
    for part in parts:
        for first in range(0, len(part), 1024 * per_image):
            # columns come before rows in the file
            chunk = torch.from_numpy(part[first : first + 1024 * per_image].reshape(-1, 3, 96, 96).copy())
            shown = _resized(chunk.transpose(2, 3).contiguous(), size)
            images[start : start + len(shown)] = shown
            start += len(shown)
    labels = torch.full((sum(counts),), -1)
    for file, begin in (("train_y.bin", 0), ("test_y.bin", counts[0] + counts[1])):
        y = torch.from_numpy(binary(file, "labels").astype(np.int64)) - 1  # from 1 in the file
        expected = counts[0] if begin == 0 else counts[2]
        if len(y) != expected or y.min() < 0 or y.max() > 9:
            raise DataError(f"{root / file}: expected {expected} labels from 1 to 10")
        labels[begin : begin + len(y)] = y
    try:
        names = tuple((root / "class_names.txt").read_text().split())
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{root / 'class_names.txt'}: cannot be read ({shown(e)})") from None
    return Source(images, labels, *_division(counts[0] + counts[1], counts[2]), names)


def _svhn(options: SourceOptions, train: tuple[str, ...]) -> Source:
    from scipy.io import loadmat

    root = _find_or_download("svhn", options.data_dir, "", "test_32x32.mat", tuple(f"{t}_32x32.mat" for t in train))
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for part in (*train, "test"):
        path = root / f"{part}_32x32.mat"
        try:
            content = loadmat(path, variable_names=["X", "y"])
            pixels = torch.from_numpy(content["X"]).permute(3, 2, 0, 1)  # the file has (32, 32, 3, N)
            if pixels.shape[1:] != (3, 32, 32) or pixels.dtype != torch.uint8:
                raise ValueError(f"expected (32, 32, 3, N) uint8 images, found {content['X'].shape}")
            images.append(pixels)
            labels.append(torch.from_numpy(content["y"].astype(np.int64).ravel()) % 10)  # zero is 10 in the file
        except Exception as e:  # SciPy raises what it meets
            raise DataError(f"{path}: not a file of SVHN ({str(e).splitlines()[0]}); fetch it again") from None
    pool = torch.empty((sum(map(len, images)), 3, 32, 32), dtype=torch.uint8)
    torch.cat(images, out=pool)
    return Source(pool, torch.cat(labels), *_division(sum(map(len, labels[:-1])), len(labels[-1])), tuple("0123456789"))


def svhn(options: SourceOptions) -> Source:
    """SVHN as USB takes it: 73,257 training and 531,131 extra images, 26,032 test images; torchvision's files."""
    return _svhn(options, ("train", "extra"))


def svhn_noextra(options: SourceOptions) -> Source:
    """SVHN without its extra images: 73,257 training and 26,032 test images."""
    return _svhn(options, ("train",))


# ----------------------------------------------------------------------------------------------------------- download


def _find_or_download(name: str, data_dir: Path, folder: str, file: str, more: tuple[str, ...] = ()) -> Path:
    """The folder that holds torchvision's files: ``data_dir/folder``, or in ``data_dir/name`` as USB has it."""
    places = [data_dir / folder, data_dir / name / folder]
    for place in places:
        if all((place / f).is_file() for f in (file, *more)):
            return place
    try:
        _download(name, data_dir, more)
    except Exception as e:
        what = f"folder {folder}" if folder else "files " + ", ".join((*more, file))
        reason = re.sub(r"\s+", " ", str(e))[:120] or type(e).__name__
        raise DataError(
            f"{name} is not in {data_dir} and could not be downloaded ({reason}). Without a network: put torchvision's"
            f" {what} there, or give the folder that holds {'it' if folder else 'them'} as --data_dir"
        ) from None
    return places[0]


def _download(name: str, data_dir: Path, files: tuple[str, ...]) -> None:
    from torchvision import datasets

    if name == "svhn":
        for split in ("train", "extra", "test"):
            if split == "test" or f"{split}_32x32.mat" in files:
                datasets.SVHN(str(data_dir), split=split, download=True)
    elif name == "stl10":
        datasets.STL10(str(data_dir), split="train", download=True)
    else:
        {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name](str(data_dir), download=True)


# -------------------------------------------------------------------------------------------------------------- table


def _folder(options: SourceOptions) -> Source:
    from muscle_plugin.data.folders import image_folder

    return image_folder(options)


def _miniimagenet(options: SourceOptions) -> Source:
    from muscle_plugin.data.folders import miniimagenet

    return miniimagenet(options)


def _eurosat(options: SourceOptions) -> Source:
    from muscle_plugin.data.folders import eurosat

    return eurosat(options)


SOURCES: dict[str, Callable[[SourceOptions], Source]] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "cifar20": cifar20,
    "miniimagenet": _miniimagenet,
    "stl10": stl10,
    "svhn": svhn,
    "svhn_noextra": svhn_noextra,
    "eurosat": _eurosat,
    "folder": _folder,
}

assert SOURCES.keys() | PLUGIN_DATASETS.keys() == DATASETS.keys()


def load_source(dataset: str, options: SourceOptions) -> Source:
    """The data set of this name, at this image size.

    Raises:
        DataError: its files are absent, damaged, and cannot be downloaded.
    """
    options = replace(options, data_dir=options.data_dir.expanduser())
    if dataset in SOURCES:
        return SOURCES[dataset](options).resized(options.img_size)
    from muscle_plugin.data.plugged import read_plugged

    return read_plugged(dataset, options).resized(options.img_size)
