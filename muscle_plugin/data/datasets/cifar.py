"""CIFAR-10 and CIFAR-100 from torchvision's files, which are pickles: read without running code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from muscle_plugin.data.datasets.download import find_or_download
from muscle_plugin.data.source import Source, SourceOptions, consecutive
from muscle_plugin.errors import DataError
from muscle_plugin.text import shown

_ROW = 3 * 32 * 32  # bytes of an image


def cifar10(options: SourceOptions) -> Source:
    """Read CIFAR-10 from torchvision's files in ``data_dir`` or ``data_dir/cifar10``, downloaded if absent."""
    files = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
    root = find_or_download("cifar10", options.data_dir, "cifar-10-batches-py", files[-1:])
    return _read_source(root, files, "batches.meta", "label")


def cifar100(options: SourceOptions, kinds: tuple[str, ...] = ("fine_label",)) -> Source:
    """Read CIFAR-100 with its 100 fine labels from torchvision's files in ``data_dir`` or ``data_dir/cifar100``."""
    root = find_or_download("cifar100", options.data_dir, "cifar-100-python", ("test",))
    return _read_source(root, ("train", "test"), "meta", *kinds)


def cifar20(options: SourceOptions) -> Source:
    """Read CIFAR-100 with its 20 superclasses as classes and the fine labels as subclasses, which a split can sequester."""
    return cifar100(options, ("coarse_label", "fine_label"))


def _read_source(root: Path, files: tuple[str, ...], meta: str, *kinds: str) -> Source:
    """The images of all files, of which the last is the test set; ``kinds``: of labels, and of finer ones if wanted."""
    images: np.ndarray = np.empty((60_000, 3, 32, 32), np.uint8)
    labels: dict[str, list[int]] = {f"{kind}s": [] for kind in kinds}
    counts: list[int] = []
    for file in files:
        content, count = _read(root / file, images[sum(counts) :].reshape(-1))
        for key, of_all in labels.items():
            found: Any = content.get(key)
            complete = count and isinstance(found, list) and len(found) == count
            if not complete or not all(type(label) is int and 0 <= label < 100 for label in found):
                raise DataError(f"{root / file}: not a CIFAR file (it lacks data or {key})")
            of_all += found
        counts.append(count)
    members = consecutive(sum(counts[:-1]), counts[-1])
    of_images, *finer = map(torch.tensor, labels.values())
    classes, *finer_names = (_read_names(root / meta, f"{kind}_names") for kind in kinds)
    return Source(torch.from_numpy(images[: sum(counts)]), of_images, *members, classes, *finer, *finer_names)


def _read_names(path: Path, key: str) -> tuple[str, ...]:
    content, _ = _read(path, np.empty(0, np.uint8))
    names = content.get(key)
    if not isinstance(names, list) or not all(isinstance(n, (bytes, str)) for n in names):
        raise DataError(f"{path}: not a CIFAR file (it lacks {key})")
    return tuple(n.decode(errors="replace") if isinstance(n, bytes) else n for n in names)


def _read(path: Path, room: np.ndarray) -> tuple[dict[str, Any], int]:
    """Return a file's content and its number of images, whose pixels go to the beginning of ``room``, (bytes,) uint8."""
    try:
        with path.open("rb") as file:
            raw = _Unpickler(file, encoding="bytes").load()
        content = {k.decode() if isinstance(k, bytes) else k: v for k, v in raw.items()}
        if "data" not in content:
            return content, 0
        _, shape, _, _, pixels = content.pop("data").state
        if len(shape) != 2 or shape[1] != _ROW or shape[0] * _ROW != len(pixels):
            raise ValueError(f"expected rows of {_ROW} pixels, found {shape}")
        room[: len(pixels)] = np.frombuffer(pixels, np.uint8)
        return content, shape[0]
    except FileNotFoundError:
        raise DataError(f"{path}: missing; the other files of the data set are there") from None
    except Exception as e:  # a pickle can make its reader raise anything
        raise DataError(f"{path}: not a CIFAR file ({shown(e)}); download it again") from None


class _Stored:
    """Stands for a NumPy object in a pickle: keeps what it was built from, and runs none of NumPy's code."""

    def __init__(self, *args: object) -> None:
        self.state: tuple[Any, ...] = args

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Reads dictionaries, lists, strings, numbers and one array, and refuses whatever could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return _Stored
        raise pickle.UnpicklingError(f"refused {module}.{name}")


def _latin1(text: str, codec: str) -> bytes:
    """Make bytes as pickle's protocol 2 writes them; other codecs could expand the text."""
    if codec != "latin1":
        raise pickle.UnpicklingError(f"refused codec {codec}")
    return text.encode(codec)
