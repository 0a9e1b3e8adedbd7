"""What can be wrong with data before training: labels out of range, classes without images, duplicates, too few images."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from muscle_plugin.data.source import Source
from muscle_plugin.data.splits import Split, class_counts
from muscle_plugin.errors import DataError
from muscle_plugin.registry.catalogue import sees_unlabelled
from muscle_plugin.text import plural

#: Bytes of pixels up to which duplicates are looked for: reading more takes several seconds.
COMPARED_BYTES = 4 << 30
#: A step that holds each image so many times, and epochs that make fewer steps than this, are noted.
MANY_TIMES, FEW_STEPS = 8, 100


def check_labels(source: Source, dataset: str) -> None:
    """Raise DataError if a training image's label is not -1 (none) to C - 1, or a test image's not 0 to C - 1."""
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
    """Describe classes without images, and duplicate images."""
    kinds = {"labelled image": class_counts(source, split.labelled)}
    if len(source.test):
        kinds["test image"] = source.test_labels.bincount(minlength=len(source.classes))
    notes = []
    for kind, counts in kinds.items():
        empty = [repr(c) for c, n in zip(source.classes, counts.tolist(), strict=True) if not n]
        if empty:
            more = f" (and {len(empty) - 5} more)" if len(empty) > 5 else ""
            notes.append(f"no {kind} of class {', '.join(empty[:5])}{more}")
    return notes + _duplicates(source, split)


def find_shortage(
    split: Split, algorithm: str, labelled: int, unlabelled: int, epochs: int, steps: int | None
) -> list[str]:
    """Describe too few images for a step of ``labelled`` + ``unlabelled`` ones, or for a run whose ``steps`` follow from
    its epochs (else None)."""
    notes = []
    if split.unlabelled is split.labelled:
        notes.append(f"no unlabelled images; {algorithm} uses none, so an epoch is one pass over the labelled images")
    kinds = [("labelled", labelled, split.labelled, "a larger --ratio")]
    if sees_unlabelled(algorithm):
        kinds.append(("unlabelled", unlabelled, split.unlabelled, f"a smaller --total_batch ({labelled + unlabelled})"))
    for kind, size, images, less in kinds:
        if size >= MANY_TIMES * (n := len(images)):
            notes.append(
                f"each step repeats every {kind} image {size / n:.3g} times (only {n} exist); {less} trains faster"
            )
    if steps and steps < FEW_STEPS:
        of = f"{plural(epochs, 'epoch')} over {plural(len(split.unlabelled), 'image')}"
        notes.append(f"the run has only {plural(steps, 'step')} ({of}); a larger --epoch trains longer")
    return notes


def _duplicates(source: Source, split: Split) -> list[str]:
    size = source.images.nbytes
    if size > COMPARED_BYTES:
        return [f"duplicate images were not looked for: {size / 1e9:.0f} GB of pixels are too much to compare"]
    same = equal_images(source.images)
    labelled, unlabelled = source.train[split.labelled], source.train[split.unlabelled]
    unlabelled = unlabelled[~torch.isin(unlabelled, labelled)]  # include_lb_to_ulb puts the labelled ones among them
    notes = []
    for one, first, other, second, warning in (
        ("test", source.test, "training", source.train, "; accuracy on these says nothing of new images"),
        ("unlabelled", unlabelled, "labelled", labelled, ""),
    ):
        twice = first[torch.isin(same[first], same[second])]
        if len(twice):
            a, b = int(twice[0]), int(second[same[second] == same[twice[0]]][0])
            notes.append(
                f"{len(twice)} {one} image(s) of {len(first)} are, pixel by pixel, {other} images too (first:"
                f" {source.name_of(a)} and {source.name_of(b)}){warning}"
            )
    ordered = labelled[same[labelled].argsort(stable=True)]
    left, right = ordered[:-1], ordered[1:]
    differ = (same[left] == same[right]) & (source.labels[left] != source.labels[right])
    if differ.any():
        a, b = int(left[differ][0]), int(right[differ][0])
        classes = " and ".join(repr(source.classes[int(source.labels[i])]) for i in (a, b))
        notes.append(
            f"{int(differ.sum())} pair(s) of labelled images are the same pixel by pixel, but have different labels (first:"
            f" {source.name_of(a)} and {source.name_of(b)}, {classes})"
        )
    return notes


def equal_images(images: Tensor) -> Tensor:
    """Number groups of equal uint8 images: (P,) int64, the same for two images if all their pixels are equal."""
    groups: dict[bytes, int] = {}
    rows = images.numpy().reshape(len(images), -1)
    return torch.tensor([groups.setdefault(hashlib.sha256(row).digest(), len(groups)) for row in rows])
