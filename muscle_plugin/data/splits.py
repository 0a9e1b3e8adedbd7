"""Which training images keep their label."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from muscle_plugin.data.sources import DataError
from muscle_plugin.seeding import derive


@dataclass(frozen=True)
class Split:
    """Indices into the training images: (num_labels,) labelled ones, and the unlabelled ones; int64, ascending."""

    labelled: Tensor
    unlabelled: Tensor


def balanced_split(labels: Tensor, num_labels: int, num_classes: int, seed: int, include_labelled: bool) -> Split:
    """num_labels / num_classes random images of every class, drawn by ``seed``.

    Args:
        labels: (N,) int64 labels of the training images.
        include_labelled: whether the labelled images are among the unlabelled ones as well.

    Raises:
        DataError: a class has too few images, or no image is left unlabelled.
    """
    per_class, rest = divmod(num_labels, num_classes)
    if rest or per_class < 1:
        raise DataError(f"num_labels: {num_labels} cannot be shared equally by {num_classes} classes")
    counts = torch.bincount(labels, minlength=num_classes)
    if int(counts.min()) < per_class:
        c = int(counts.argmin())
        raise DataError(
            f"num_labels: {per_class} labels per class asked for, but class {c} has {int(counts[c])} images"
        )
    generator = torch.Generator().manual_seed(derive(seed, "split"))
    chosen = []
    for c in range(num_classes):
        members = (labels == c).nonzero().flatten()
        chosen.append(members[torch.randperm(len(members), generator=generator)[:per_class]])
    labelled = torch.cat(chosen).sort().values
    keep = torch.ones(len(labels), dtype=torch.bool)
    if not include_labelled:
        keep[labelled] = False
    unlabelled = keep.nonzero().flatten()
    if not len(unlabelled):
        raise DataError(f"num_labels: {num_labels} leaves no unlabelled image; the data set has {len(labels)}")
    return Split(labelled, unlabelled)
