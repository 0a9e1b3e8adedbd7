"""Writes what a run measured: ``metrics.jsonl``, TensorBoard events and ``result.json``."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

from muscle_plugin.files import (atomic_write, write_json, writing)
from muscle_plugin.errors import WriteError
from muscle_plugin.training.hooks import accuracies
from muscle_plugin.runs.progress import Progress

#: TensorBoard's name of a file of events: the second of its beginning, and the rest.
_EVENTS = re.compile(r"events\.out\.tfevents\.(\d+)\.(.*)", re.DOTALL)


class Recorder:
    """The logs of one run directory, continued from ``step``: later lines of an earlier attempt are dropped.

    Args:
        run_dir: the run directory.
        step: steps done so far; 0 for a new run.
        tensorboard: whether to write TensorBoard events.
        progress: told of every record.

    Attributes:
        notes: what a user should know of the lines that were there.
    """

    def __init__(self, run_dir: Path, step: int, tensorboard: bool, progress: Progress) -> None:
        self.run_dir, self._progress = run_dir, progress
        self._path = run_dir / "metrics.jsonl"
        self.notes: list[str] = []
        self._last = 0.0
        if self._path.exists():
            self._drop_lines_after(step)
        self._metrics = self._path.open("ab", buffering=0)
        self._events: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            folder = run_dir / "tensorboard"
            continues = folder.is_dir() and any(folder.iterdir())
            # before the writer, whose thread may fail at once, and then after this has been left by an exception
            self._excepthook, threading.excepthook = threading.excepthook, self._thread_failed
            with writing(folder):
                _name_before_now(folder)
                self._events = SummaryWriter(str(folder), purge_step=step + 1 if continues else None)

    def _drop_lines_after(self, step: int) -> None:
        kept, wrong = [], []
        rows = self._path.read_bytes().split(b"\n")
        for number, row in enumerate(rows, 1):
            at = _step_of(row)
            if self._last < at <= step:
                kept.append(row + b"\n")
                self._last = at
            elif not at > self._last or (at == math.inf and number < len(rows)):  # a kill may have cut off the last one
                wrong.append(number)
        with atomic_write(self._path) as f:
            f.writelines(kept)
        if wrong:
            which = f"line {wrong[0]}" + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "")
            self.notes.append(f"{self._path}: {which}: damaged or out of order; left out")

    def note_missing(self, step: int) -> None:
        """Note that lines are absent, if the last one of those that were there is not of ``step``."""
        if self._last < step:
            first = math.floor(self._last) + 1
            self.notes.append(f"{self._path}: has no lines of steps {first} to {step}, which had been logged")

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()
        if self._events is not None:
            with contextlib.suppress(OSError):  # a full disk has been reported by then
                self._events.close()
            threading.excepthook = self._excepthook

    def _thread_failed(self, what: Any) -> None:
        """TensorBoard writes in a thread: what the disk refuses there comes up at the next record."""
        if not issubclass(what.exc_type, OSError):
            self._excepthook(what)

    def record(self, algorithm: Any, values: dict[str, float]) -> None:
        """One line of metrics; the step is counted from 1, seconds are training time.

        Raises:
            WriteError: it cannot be written.
        """
        step = algorithm.it + 1
        line = {"step": step, "epoch": algorithm.epoch, **values, "seconds": round(algorithm.seconds(), 3)}
        data = json.dumps(line).encode() + b"\n"
        with writing(self._path):
            if self._metrics.write(data) != len(data):  # the rest would be refused
                raise WriteError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        if self._events is not None:
            with writing(self.run_dir / "tensorboard"):
                for key, value in values.items():
                    self._events.add_scalar(key, value, step)
        self._progress.update(algorithm, step, values)

    def flush(self) -> None:
        """Bring what has been recorded to the disk: a checkpoint that says so may come.

        Raises:
            WriteError: it cannot be.
        """
        with writing(self._path):
            os.fsync(self._metrics.fileno())
        if self._events is not None:
            with writing(self.run_dir / "tensorboard"):
                self._events.flush()

    def warn(self, text: str) -> None:
        """Show a warning."""
        self._progress.warn(text)

    def write_result(self, algorithm: Any) -> dict[str, Any]:
        """Replace ``result.json`` by the present state of the run, and return it."""
        args, seconds = algorithm.args, algorithm.seconds()
        scores = accuracies(algorithm.evaluations) or dict.fromkeys(("best_top1", "last_top1", "median20_top1"))
        images = sum(algorithm.batch_sizes) * algorithm.it
        result = {
            "algorithm": args.algorithm,
            "dataset": args.dataset,
            "num_labels": args.num_labels,
            "seed": args.seed,
            "net": args.net,
            "stage": args.stage,
            "complete": algorithm.it >= algorithm.num_train_iter,
            "steps": algorithm.it,
            "num_train_iter": algorithm.num_train_iter,
            **scores,
            "best_step": algorithm.best_it + 1 if algorithm.evaluations else None,
            "last_evaluation": {k.removeprefix("eval/"): v for k, v in algorithm.last_metrics.items()},
            "evaluations": len(algorithm.evaluations),
            "seconds": round(seconds, 3),
            "images_per_second": round(images / seconds, 1) if seconds else None,
            "warnings": list(algorithm.monitor.warnings),
            "device": str(algorithm.device),
            "processes": args.world_size,
            "precision": algorithm.precision,
        }
        write_json(self.run_dir / "result.json", result)
        return result


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf  # a line cut off in the middle


def _name_before_now(folder: Path) -> None:
    """Rename event files whose names say a second that has not passed: readers take files by it, and a later attempt takes
    back what an earlier one logged after its first step. Clocks are set back, and differ between machines."""
    found = sorted(p for p in folder.glob("events.out.tfevents.*") if _EVENTS.match(p.name))
    for i, path in enumerate(found):
        latest = max(0, int(time.time()) - len(found) + i)
        second, rest = _EVENTS.match(path.name).groups()  # type: ignore[union-attr]
        if int(second) > latest:
            os.replace(path, folder / f"events.out.tfevents.{latest:010d}.{rest}")
