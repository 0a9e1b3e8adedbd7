"""What a run would train on, for ``muscle-plugin data show``."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import TYPE_CHECKING

import torch
from rich.table import Table
from torch import Tensor

from muscle_plugin.data.splits import class_counts
from muscle_plugin.data.views import STRONG
from muscle_plugin.text import shown

if TYPE_CHECKING:
    from muscle_plugin.training.host import Host


def counts_table(algorithm: Host) -> Table:
    """Count labelled, unlabelled and test images per class; subclasses without labels are named."""
    source, split = algorithm.source, algorithm.split
    height, width = source.images.shape[-2:]
    table = Table(
        title=f"{algorithm.settings.dataset}: {len(split.labelled)} labelled, {len(split.unlabelled)} unlabelled,"
        f" {len(source.test)} test images of {height} x {width}, {source.images.shape[1]} channel(s)"
    )
    table.add_column("class", overflow="fold")
    for name in ("labelled", "unlabelled", "test"):
        table.add_column(name, justify="right", no_wrap=True)
    hidden: dict[int, list[str]] = {}
    if split.sequestered and source.subclasses is not None:
        table.add_column("gives no labels", overflow="fold")
        for sub in split.sequestered:
            first = (source.subclasses == sub).nonzero()[0]
            hidden.setdefault(int(source.labels[first]), []).append(source.subclass_names[sub])
    test = source.test_labels
    test_counts = torch.bincount(test[test >= 0], minlength=len(source.classes))
    labelled, unlabelled = class_counts(source, split.labelled), class_counts(source, split.unlabelled)
    for c, name in enumerate(source.classes):
        cells = [shown(name), *(str(int(counts[c])) for counts in (labelled, unlabelled, test_counts))]
        table.add_row(*cells, *([", ".join(hidden.get(c, []))] if hidden else []))
    if unknown := len(split.unlabelled) - int(unlabelled.sum()):
        table.add_row("(class not known)", "", str(unknown), "")
    return table


def views_of_first_batch(algorithm: Host, columns: int = 12) -> dict[str, Tensor]:
    """The views that an algorithm's first step trains on: label -> (columns, channels, H, W) in [0, 1]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        algorithm.epoch = 0
        algorithm.call_hook("before_run")
        with algorithm.computing():
            algorithm.prepare_steps()
    batches = algorithm.batches
    batch = batches.batch(0)
    rows: dict[str, Tensor] = {}
    drawn: Counter[str] = Counter()
    for name, view in sorted(batches.views.items(), key=lambda item: (item[1].images, item[1].strength == STRONG)):
        kind = f"{view.images}, {view.strength}"
        for part in batch[name].split(len(batch[name]) // view.count):
            drawn[kind] += 1
            rows[f"{kind} {drawn[kind]} ({name})"] = batches.normalise.undo(part[:columns])
    return rows
