"""Which training images keep their labels: drawn by seed, or read from the file of an earlier run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from muscle_plugin.data.source import Source
from muscle_plugin.errors import DataError
from muscle_plugin.files import write_text
from muscle_plugin.seeding import derive
from muscle_plugin.text import shown

SPLIT_FORMAT = 1


@dataclass(frozen=True)
class Split:
    """Positions among a source's training images, int64, ascending; ``sequestered``: subclasses that give no labels."""

    labelled: Tensor
    unlabelled: Tensor
    sequestered: tuple[int, ...] = ()


def draw_split(
    source: Source, num_labels: int | None, seed: int, include_labelled: bool = False,
    imbalance: float = 1.0, sequestered: int = 0,
) -> Split:  # fmt: skip
    """Draw ``num_labels`` training images at random, equally many of each class.

    Args:
        num_labels: labelled images in all; None: every image that has a label.
        include_labelled: whether the labelled images are among the unlabelled ones too.
        imbalance: labels of the first class over those of the last, falling geometrically in between.
        sequestered: subclasses per class, drawn at random, that give no labels (paper, "Sequestered Classes"). The
            remaining subclasses share the labels equally.

    Raises:
        DataError: the labels cannot be shared so, or a class has too few images.
    """
    generator = torch.Generator().manual_seed(derive(seed, "split"))
    groups, names = source.train_labels, source.classes
    hidden: tuple[int, ...] = ()
    if sequestered:
        if source.subclasses is None:
            raise DataError("sequestered: this data set has no subclasses; cifar20 has")
        groups, names = source.subclasses[source.train], source.subclass_names
        hidden = _sequester(source, groups, sequestered, generator)
    if num_labels is None:
        if imbalance != 1 or sequestered:
            raise DataError("num_labels: must be given with lb_imb_ratio or sequestered")
        return _with_rest(source, (groups >= 0).nonzero().flatten(), include_labelled)
    chosen = []
    for group, count in _shares(num_labels, {i: n for i, n in enumerate(names) if i not in hidden}, imbalance).items():
        members = (groups == group).nonzero().flatten()
        if len(members) < count:
            raise DataError(
                f"num_labels: {count} labels of class {names[group]!r} asked for, but it has {len(members)} labelled images"
            )
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return _with_rest(source, torch.cat(chosen).sort().values, include_labelled, hidden)


def _sequester(source: Source, fine: Tensor, per_class: int, generator: torch.Generator) -> tuple[int, ...]:
    """Draw subclasses of each class; ``fine``: the training images' subclasses."""
    hidden: list[int] = []
    for c, name in enumerate(source.classes):
        members = fine[source.train_labels == c].unique()
        if len(members) <= per_class:
            raise DataError(f"sequestered: class {name!r} has {len(members)} subclasses; one must remain")
        hidden += members[torch.randperm(len(members), generator=generator)[:per_class]].tolist()
    return tuple(sorted(hidden))


def _shares(num_labels: int, groups: dict[int, str], imbalance: float) -> dict[int, int]:
    """The number of labels of each of the named groups, ``num_labels`` in all."""
    if imbalance == 1:
        each, rest = divmod(num_labels, len(groups))
        if rest or each < 1:
            raise DataError(f"num_labels: {num_labels} cannot be shared equally by {len(groups)} classes")
        return dict.fromkeys(groups, each)
    weights = imbalance ** -np.linspace(0, 1, len(groups))
    exact = num_labels * weights / weights.sum()
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: num_labels - shares.sum()]] += 1  # largest remainders first
    if shares.min() < 1:
        first = list(groups.values())[int(shares.argmin())]
        raise DataError(
            f"num_labels: {num_labels} with lb_imb_ratio {imbalance:g} leaves class {first!r} without a label; give more"
            " labels or a smaller ratio"
        )
    return dict(zip(groups, shares.tolist(), strict=True))


def _with_rest(source: Source, labelled: Tensor, include_labelled: bool, sequestered: tuple[int, ...] = ()) -> Split:
    keep = torch.ones(len(source.train), dtype=torch.bool)
    if not include_labelled:
        keep[labelled] = False
    return Split(labelled, keep.nonzero().flatten(), sequestered)


def fingerprint(source: Source) -> str:
    """Return a digest of the training images' number, order and labels (not of their pixels)."""
    labels = source.train_labels if source.subclasses is None else source.subclasses[source.train]
    head = f"{len(source.train)} {source.classes}".encode()
    return hashlib.sha256(head + labels.numpy().tobytes() + source.train.numpy().tobytes()).hexdigest()[:16]


def write_split(path: Path, split: Split, source: Source, dataset: str = "", seed: int | None = None) -> None:
    """Write a split as JSON, with what identifies the training images that its indices refer to."""
    content = {
        "format": SPLIT_FORMAT,
        "dataset": dataset,
        "seed": seed,
        "training_images": len(source.train),
        "fingerprint": fingerprint(source),
        "labels_per_class": dict(zip(source.classes, class_counts(source, split.labelled).tolist(), strict=True)),
        "sequestered": [source.subclass_names[i] for i in split.sequestered],
        "unlabelled": "all" if len(split.unlabelled) == len(source.train) else "rest",
        "labelled": split.labelled.tolist(),
    }
    head = json.dumps({k: v for k, v in content.items() if k != "labelled"}, indent=2, ensure_ascii=False)
    write_text(path, f'{head[:-2]},\n  "labelled": {json.dumps(content["labelled"])}\n}}\n')  # the indices in one line


def read_split(path: Path, source: Source, include_labelled: bool) -> Split:
    """Read a split that :func:`write_split` wrote, or a NumPy file of labelled indices, such as USB's.

    Raises:
        DataError: the file is neither, or was made for other training images.
    """
    try:
        indices, hidden = (_read_npy if path.suffix == ".npy" else _read_json)(path, source)
    except DataError:
        raise
    except OSError as e:
        raise DataError(f"{path}: cannot be read as a split: {e.strerror or e}") from None
    except Exception as e:  # NumPy parses the head of its files as Python
        raise DataError(f"{path}: cannot be read as a split: {type(e).__name__}: {shown(e)}") from None
    if not isinstance(indices, list) or not indices or not all(type(i) is int for i in indices):
        raise DataError(f"{path}: expected a list of indices of labelled images")
    chosen = sorted(set(indices))
    if len(chosen) != len(indices) or chosen[0] < 0 or chosen[-1] >= len(source.train):
        raise DataError(f"{path}: indices must differ and lie between 0 and {len(source.train) - 1}")
    labelled = torch.tensor(chosen)
    if (source.train_labels[labelled] < 0).any():
        raise DataError(f"{path}: names an image that has no label in this data set")
    counts = class_counts(source, labelled)
    if not counts.min():
        raise DataError(f"{path}: class {source.classes[int(counts.argmin())]!r} has no labelled image")
    return _with_rest(source, labelled, include_labelled, hidden)


def _read_npy(path: Path, source: Source) -> tuple[list[int], tuple[int, ...]]:
    array = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped, so that a head cannot claim more than there is
    most = len(source.train)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" or array.size > most:
        raise DataError(f"{path}: cannot be read as a split: expected an array of at most {most} whole numbers")
    return array.ravel().tolist(), ()


def _read_json(path: Path, source: Source) -> tuple[list[int], tuple[int, ...]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("format") != SPLIT_FORMAT:
        raise DataError(f"{path}: cannot be read as a split: no split of this package")
    if content["fingerprint"] != fingerprint(source):
        raise DataError(
            f"{path}: made for other training images: {content.get('dataset')}, {content['training_images']} images of"
            f" {len(content['labels_per_class'])} classes, drawn by seed {content.get('seed')}; here"
            f" {len(source.train)} of {len(source.classes)}"
        )
    number = {n: i for i, n in enumerate(source.subclass_names)}
    return content["labelled"], tuple(number[n] for n in content["sequestered"])


def class_counts(source: Source, positions: Tensor) -> Tensor:
    """Count the labelled training images of each class, (C,), among those at ``positions``."""
    labels = source.train_labels[positions]
    return torch.bincount(labels[labels >= 0], minlength=len(source.classes))
