"""What can be wrong with data before training: labels out of range, classes without images, images that occur twice."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from muscle_plugin.data.sources import Source
from muscle_plugin.data.splits import Split, class_counts
from muscle_plugin.errors import DataError

#: Bytes of pixels up to which copies are looked for: reading more takes several seconds.
COMPARED_BYTES = 4 << 30
_ROWS = 4096  # images hashed at a time
_SHOWN = 5  # classes in a note


def check_labels(source: Source, dataset: str) -> None:
    """Refuse labels that name no class.

    Raises:
        DataError: a label of a training image is not -1 (none) or 0 to C - 1, or one of a test image not 0 to C - 1.
    """
    for kind, members, least in (("training", source.train, -1), ("test", source.test, 0)):
        labels = source.labels[members]
        wrong = ((labels < least) | (labels >= len(source.classes))).nonzero().flatten()
        if len(wrong):
            where, label = source.name_of(int(members[wrong[0]])), int(labels[wrong[0]])
            raise DataError(
                f"{dataset}: {len(wrong)} {kind} image(s) have labels out of range, first {where}: {label}; there are"
                f" {len(source.classes)} classes, 0 to {len(source.classes) - 1}"
            )


def find_oddities(source: Source, split: Split) -> list[str]:
    """Notes on classes without images, and on images that occur twice."""
    return [*_empty_classes(source, split), *_copies(source, split)]


def _empty_classes(source: Source, split: Split) -> list[str]:
    test = source.test_labels.bincount(minlength=len(source.classes))
    kinds = {"labelled image": class_counts(source, split.labelled)}
    if len(source.test):
        kinds["test image"] = test
    notes = []
    for kind, counts in kinds.items():
        empty = [
            repr(c)
            for c, n in zip(source.classes, counts.tolist(), strict=True)
            if not n and not any(repr(c) in note for note in source.notes)  # of which it says so itself
        ]
        if empty:
            more = f" (and {len(empty) - _SHOWN} more)" if len(empty) > _SHOWN else ""
            notes.append(f"no {kind} of class {', '.join(empty[:_SHOWN])}{more}")
    return notes


def _copies(source: Source, split: Split) -> list[str]:
    size = source.images.nbytes
    if size > COMPARED_BYTES:
        return [f"not looked for images that occur twice: {size / 1e9:.0f} GB of pixels are much to compare"]
    same = equal_images(source.images)
    labelled, unlabelled = source.train[split.labelled], source.train[split.unlabelled]
    unlabelled = unlabelled[
        ~torch.isin(unlabelled, labelled)
    ]  # the labelled ones may be among them, without their labels
    notes = []
    for one, first, other, second, so in (
        ("test", source.test, "training", source.train, "; accuracy on these says nothing of new images"),
        ("unlabelled", unlabelled, "labelled", labelled, ""),
    ):
        twice = torch.isin(same[first], same[second]).nonzero().flatten()
        if len(twice):
            a = int(first[twice[0]])
            b = int(second[(same[second] == same[a]).nonzero()[0]])
            notes.append(
                f"{len(twice)} {one} image(s) of {len(first)} are, pixel by pixel, {other} images too (first:"
                f" {source.name_of(a)} and {source.name_of(b)}){so}"
            )
    groups, labels = same[labelled], source.labels[labelled]
    order = groups.argsort(stable=True)
    groups, labels = groups[order], labels[order]
    differ = ((groups[1:] == groups[:-1]) & (labels[1:] != labels[:-1])).nonzero().flatten()
    if len(differ):
        a, b = (int(labelled[order[differ[0] + i]]) for i in (0, 1))
        classes = " and ".join(repr(source.classes[int(source.labels[i])]) for i in (a, b))
        notes.append(
            f"{len(differ)} pair(s) of labelled images are the same pixel by pixel, but have different labels (first:"
            f" {source.name_of(a)} and {source.name_of(b)}, {classes})"
        )
    return notes


def equal_images(images: Tensor) -> Tensor:
    """(P,) int64, equal for images whose pixels are all equal, and different for others.

    A random projection of each image's bytes, taken as 64-bit words modulo 2^64, finds candidates as fast as memory is read;
    a cryptographic digest of these few decides.

    Args:
        images: (P, ...) uint8.
    """
    flat = images.numpy().reshape(len(images), -1)
    words = -(-flat.shape[1] // 8)
    factors = np.random.default_rng(0).integers(0, 2**64, words, np.uint64) | np.uint64(1)
    keys: np.ndarray = np.empty(len(flat), np.uint64)
    for start in range(0, len(flat), _ROWS):
        part = flat[start : start + _ROWS]
        if part.shape[1] % 8:
            part = np.pad(part, ((0, 0), (0, 8 * words - part.shape[1])))
        part = np.ascontiguousarray(part).view(np.uint64)
        keys[start : start + _ROWS] = (part ^ (part >> np.uint64(29))) @ factors
    _, groups, counts = np.unique(keys, return_inverse=True, return_counts=True)
    seen: dict[tuple[int, bytes], int] = {}
    new = len(counts)
    for i in np.flatnonzero(counts[groups] > 1).tolist():
        key = (int(groups[i]), hashlib.blake2b(flat[i].tobytes(), digest_size=16).digest())
        if key not in seen:
            seen[key], new = new, new + 1
        groups[i] = seen[key]
    return torch.from_numpy(groups.astype(np.int64))
