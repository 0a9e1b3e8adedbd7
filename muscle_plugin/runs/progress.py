"""What a run shows while it trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 10.0
T = TypeVar("T")


class Progress:
    """Progress of one run.

    Args:
        settings: the run's settings.
        quiet: show nothing.
    """

    def __init__(self, settings: Any, quiet: bool = False) -> None:
        # bound to today's stdout: while training, sys.stdout leads to the log file
        self._console = Console(file=sys.stdout, quiet=quiet, highlight=False, markup=False, soft_wrap=True)
        self._settings = settings
        self._bar: Bar | None = None
        self._task: Any = None
        self._accuracy = float("nan")
        self._began = (0, 0.0)
        self._last_line = 0.0
        self._total = 0

    def start(self, algorithm: Any) -> None:
        """Say what is about to train."""
        self._total = algorithm.num_train_iter
        self._began = (algorithm.it, time.perf_counter())
        labelled, unlabelled = algorithm.batch_sizes
        parameters = sum(p.numel() for p in algorithm.model.parameters())
        s = self._settings
        world = algorithm.args.world_size
        processes = f"{world} processes on " if world > 1 else ""
        resumed = f", from step {algorithm.it}" if algorithm.it else ""
        unused = " (not used)" if s.stage == "pretrain" else ""
        images = f"{len(algorithm.split.labelled)} labels{unused}, {len(algorithm.split.unlabelled)} unlabelled"
        self._console.print(
            f"{s.algorithm} on {s.dataset}: {images}, {len(algorithm.source.test)} test images; {s.net} ({parameters:,}"
            f" parameters); {labelled} + {unlabelled} images a step; {processes}{algorithm.device}, {algorithm.precision};"
            f" seed {s.seed}; {self._total} steps{resumed}"
        )
        for note in algorithm.notes:
            self._console.print(f"note: {note}", markup=False)
        if self._bar is not None:
            self._task = self._bar.add_task("", total=self._total, completed=algorithm.it, text="")

    def __enter__(self) -> Progress:
        if self._console.is_terminal and not self._console.quiet:
            columns = (BarColumn(24), TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[text]}"))
            self._bar = Bar(
                *columns, TimeRemainingColumn(), console=self._console, redirect_stdout=False, redirect_stderr=False
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def finish(self, result: dict[str, Any], run_dir: Path) -> None:
        """Say how the run ended."""
        if self._settings.stage == "pretrain":
            self._console.print(
                f"pre-trained without labels, so accuracies mean nothing; --init_from {run_dir / 'latest_model.pth'} starts"
                f" from its weights; {_clock(result['seconds'])} of training"
            )
            return
        if result["last_top1"] is None:
            self._console.print(
                f"no test images, so no accuracy; {_clock(result['seconds'])} of training; {run_dir / 'result.json'}"
            )
            return
        last, best, median = (100 * result[k] for k in ("last_top1", "best_top1", "median20_top1"))
        self._console.print(
            f"test accuracy: last {last:.2f} %, median of the last {min(20, result['evaluations'])} evaluations {median:.2f} %,"
            f" best {best:.2f} %"
            f" (step {result['best_step']}); {_clock(result['seconds'])} of training; {run_dir / 'result.json'}"
        )
        seen = result["last_evaluation"]
        if "unlabelled_classes/top-1-acc" in seen:
            self._console.print(
                "last, by kind of class: "
                + "; ".join(
                    f"{name} {100 * seen[f'{key}top-1-acc']:.2f} %, prediction entropy {seen[f'{key}entropy']:.2f} nats"
                    for name, key in (
                        ("labelled", "labelled_classes/"),
                        ("unlabelled", "unlabelled_classes/"),
                        ("all", ""),
                    )
                )
            )

    def warn(self, text: str) -> None:
        """Show a line that stays."""
        self._console.print(f"warning: {text}", markup=False)

    def update(self, algorithm: Any, step: int, values: dict[str, float]) -> None:
        """Show the state after ``step`` steps."""
        evaluated = "eval/top-1-acc" in values
        if evaluated:
            self._accuracy = values["eval/top-1-acc"]
        first, since = self._began
        elapsed = time.perf_counter() - since
        speed = (step - first) * sum(algorithm.batch_sizes) / max(elapsed, 1e-9)
        loss = values.get("train/total_loss", values.get("train/sup_loss", float("nan")))
        text = f"loss {loss:.3f}"
        if hasattr(algorithm, "stage"):
            text = f"stage {algorithm.stage}  {text}"
        if "train/mi" in values:
            text += f"  MI {values['train/mi']:.2f}  H {values['train/entropy']:.2f}"
        text += f"  accuracy {100 * self._accuracy:.1f} %" if self._accuracy == self._accuracy else ""
        text += f"  {speed:,.0f} images/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif step == self._total or time.perf_counter() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.perf_counter()
            left = elapsed / max(1, step - first) * (self._total - step)
            self._console.print(f"step {step}/{self._total}  {text}  {_clock(left)} left")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
