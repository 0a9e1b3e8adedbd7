"""What a run shows while it trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from muscle_plugin import distributed
from muscle_plugin.registry.catalogue import FITTED
from muscle_plugin.run_files import LATEST
from muscle_plugin.text import duration
from muscle_plugin.training import Host
from muscle_plugin.training.nets import count_parameters

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Progress of one run; ``quiet`` shows nothing."""

    def __init__(self, quiet: bool = False) -> None:
        # bound to today's stdout: while training, sys.stdout leads to the log file
        self._console = Console(file=sys.stdout, quiet=quiet, highlight=False, markup=False, soft_wrap=True)
        self._bar: Bar | None = None
        self._began = (0, 0.0)
        self._last_line = 0.0

    def start(self, algorithm: Host) -> None:
        """Show what is about to train."""
        self._began = (algorithm.it, time.perf_counter())
        labelled, unlabelled = algorithm.batch_sizes
        frozen, trained = count_parameters(algorithm.model, algorithm.encoder)
        parameters = f"{frozen:,} frozen + {trained:,} trained" if algorithm.backbone else f"{frozen + trained:,}"
        s = algorithm.settings
        world = distributed.world_size()
        processes = f"{world} processes on " if world > 1 else ""
        resumed = f", from step {algorithm.it}" if algorithm.it else ""
        as_net = algorithm.batches.preprocessing
        of_net = f"{parameters} parameters"
        of_net += f", at {as_net.size} x {as_net.size} pixels" if as_net.size else ""
        of_net += ", normalised as for its pretrained weights" if as_net.statistics else ""
        unused = " (not used)" if s.stage == "pretrain" else ""
        images = f"{len(algorithm.split.labelled)} labels{unused}, {len(algorithm.split.unlabelled)} unlabelled"
        per_step = (
            f"{labelled} labelled + {unlabelled} unlabelled images per step; " if s.algorithm not in FITTED else ""
        )
        self._console.print(
            f"{s.algorithm} on {s.dataset}: {images}, {len(algorithm.source.test)} test images; {s.net} ({of_net});"
            f" {per_step}{processes}{algorithm.device},"
            f" {algorithm.precision}; seed {s.seed}; {algorithm.num_train_iter} steps{resumed}"
        )
        for note in algorithm.notes:
            self._console.print(f"note: {note}")
        if self._console.is_terminal and not self._console.quiet:
            self._bar = Bar(
                BarColumn(24), TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(), console=self._console, redirect_stdout=False, redirect_stderr=False,
            )  # fmt: skip
            self._bar.add_task("", total=algorithm.num_train_iter, completed=algorithm.it, text="")
            self._bar.start()

    def stop(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.stop()

    def finish(self, result: Mapping[str, Any], run_dir: Path) -> None:
        """Show how the run ended."""
        trained = f"{duration(result['seconds'])} of training"
        if result["stage"] == "pretrain":
            self._console.print(
                f"pre-trained without labels, so accuracies mean nothing; --init_from {run_dir / LATEST} starts from its"
                f" weights; {trained}"
            )
            return
        if result["last_top1"] is None:
            self._console.print(f"no test images, so no accuracy; {trained}; {run_dir / 'result.json'}")
            return
        last, best, median = (100 * result[k] for k in ("last_top1", "best_top1", "median20_top1"))
        self._console.print(
            f"test accuracy: last {last:.2f} %, median of the last {min(20, result['evaluations'])} evaluations"
            f" {median:.2f} %, best {best:.2f} % (step {result['best_step']}); {trained}; {run_dir / 'result.json'}"
        )
        seen = result["last_evaluation"]
        if "unlabelled_classes/top-1-acc" in seen:
            kinds = {"labelled": "labelled_classes/", "unlabelled": "unlabelled_classes/", "all": ""}
            parts = (
                f"{name} {100 * seen[f'{key}top-1-acc']:.2f} %, prediction entropy {seen[f'{key}entropy']:.2f} nats"
                for name, key in kinds.items()
            )
            self._console.print(f"last, by kind of class: {'; '.join(parts)}")

    def warn(self, text: str) -> None:
        """Show a line that stays."""
        self._console.print(f"warning: {text}")

    def update(self, algorithm: Host, step: int, values: Mapping[str, float]) -> None:
        """Show the state after ``step`` steps."""
        (first, since), total = self._began, algorithm.num_train_iter
        elapsed = time.perf_counter() - since
        speed = (step - first) * sum(algorithm.batch_sizes) / max(elapsed, 1e-9)
        loss = values.get("train/total_loss", values.get("train/sup_loss", float("nan")))
        stage = f"stage {algorithm.stage}  " if hasattr(algorithm, "stage") else ""
        text = f"{stage}loss {loss:.3f}"
        if "train/mi" in values:
            text += f"  MI {values['train/mi']:.2f}  H {values['train/entropy']:.2f}"
        if "eval/top-1-acc" in algorithm.last_metrics:
            text += f"  accuracy {100 * algorithm.last_metrics['eval/top-1-acc']:.1f} %"
        text += f"  {speed:,.0f} images/s"
        if self._bar is not None:
            self._bar.update(TaskID(0), completed=step, text=text)
        elif step == total or time.perf_counter() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.perf_counter()
            left = elapsed / max(1, step - first) * (total - step)
            self._console.print(f"step {step}/{total}  {text}  {duration(left)} left")
