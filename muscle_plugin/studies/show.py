"""``muscle-plugin data show``: what a run would train on."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from muscle_plugin.data.load import split_seed
from muscle_plugin.data.splits import class_counts, write_split
from muscle_plugin.data.views import STRONG
from muscle_plugin.runs.build import build
from muscle_plugin.settings.resolve import Resolved

if TYPE_CHECKING:
    from muscle_plugin.training.host import Host


def show(resolved: Resolved, picture: Path | None, split_file: Path | None) -> None:
    """Print images per class; write a contact sheet of the first step's views, and the split."""
    algorithm = build(resolved)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 160
    console.print(counts_table(algorithm))
    for note in algorithm.notes:
        console.print(f"note: {note}")
    if picture is not None:
        from muscle_plugin.studies.plots import contact_sheet  # matplotlib

        contact_sheet(views_of_first_batch(algorithm), picture)
        console.print(f"views of the first step: {picture}")
    if split_file is not None:
        s = algorithm.settings
        write_split(split_file, algorithm.split, algorithm.source, dataset=s.dataset, seed=split_seed(s))
        console.print(f"labelled images: {split_file}; --split_file takes it")


def counts_table(algorithm: Host) -> Table:
    """Count labelled, unlabelled and test images per class; subclasses without labels are named."""
    source, split = algorithm.source, algorithm.split
    height, width = source.images.shape[-2:]
    table = Table(
        title=f"{algorithm.settings.dataset}: {len(split.labelled)} labelled, {len(split.unlabelled)} unlabelled,"
        f" {len(source.test)} test images of {height} x {width}, {source.images.shape[1]} channel(s)"
    )
    table.add_column("class", no_wrap=True)
    for name in ("labelled", "unlabelled", "test"):
        table.add_column(name, justify="right")
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
        cells = [name, *(str(int(counts[c])) for counts in (labelled, unlabelled, test_counts))]
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
