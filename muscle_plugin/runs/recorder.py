"""The measurements of a run: ``metrics.jsonl``, TensorBoard events and ``result.json``."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muscle_plugin import distributed
from muscle_plugin.errors import WriteError
from muscle_plugin.files import atomic_write, to_json, write_json, writing
from muscle_plugin.runs.progress import Progress
from muscle_plugin.training import Host
from muscle_plugin.training.hooks import accuracies
from muscle_plugin.training.nets import count_parameters

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Recorder:
    """The logs of one run directory, continued from ``step``; ``notes`` tell of damaged lines that were there."""

    def __init__(self, run_dir: Path, step: int, tensorboard: bool, progress: Progress) -> None:
        self.run_dir, self._progress = run_dir, progress
        self._path, self._folder = run_dir / "metrics.jsonl", run_dir / "tensorboard"
        self.notes: list[str] = []
        if self._path.exists():
            self._drop_lines_after(step)
        self._events: SummaryWriter | None = None
        with contextlib.ExitStack() as stack:
            self._metrics = stack.enter_context(self._path.open("ab", buffering=0))
            if tensorboard:
                self._events = stack.enter_context(_event_writer(self._folder, step))
            self._resources = stack.pop_all()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def _drop_lines_after(self, step: int) -> None:
        kept, wrong, last = [], [], 0.0
        rows = self._path.read_bytes().split(b"\n")
        for number, row in enumerate(rows, 1):
            try:
                at = float(json.loads(row)["step"])
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                at = math.inf  # cut off in the middle
            if last < at <= step:
                kept.append(row + b"\n")
                last = at
            elif not at > last or (at == math.inf and number < len(rows)):  # a kill may have cut off the last one
                wrong.append(number)
        with atomic_write(self._path) as f:
            f.writelines(kept)
        if wrong:
            which = f"line {wrong[0]}" + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "")
            self.notes.append(f"{self._path}: {which}: damaged or out of order; left out")

    def record(self, algorithm: Host, values: Mapping[str, float]) -> None:
        """Append a line of metrics; the step is counted from 1, seconds are training time."""
        step = algorithm.it + 1
        line = {"step": step, "epoch": algorithm.epoch, **values, "seconds": round(algorithm.clock.seconds(), 3)}
        data = to_json(line).encode() + b"\n"
        with writing(self._path):
            if self._metrics.write(data) != len(data):  # the rest would be refused
                raise WriteError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        if self._events is not None:
            with writing(self._folder):
                for key, value in values.items():
                    self._events.add_scalar(key, value, step)
        self._progress.update(algorithm, step, values)

    def flush(self) -> None:
        """Bring all records to the disk, before a checkpoint of a later step."""
        with writing(self._path):
            os.fsync(self._metrics.fileno())
        if self._events is not None:
            with writing(self._folder):
                self._events.flush()

    def warn(self, text: str) -> None:
        """Show a warning."""
        self._progress.warn(text)

    def write_result(self, algorithm: Host) -> dict[str, Any]:
        """Replace ``result.json`` by the present state of the run, and return it."""
        s, seconds = algorithm.settings, algorithm.clock.seconds()
        scores = accuracies(algorithm.evaluations) or dict.fromkeys(("best_top1", "last_top1", "median20_top1"))
        images = sum(algorithm.batch_sizes) * algorithm.it
        frozen, trained = count_parameters(algorithm.model, algorithm.encoder)
        result = {
            "algorithm": s.algorithm,
            "dataset": s.dataset,
            "num_labels": len(algorithm.split.labelled),
            "seed": s.seed,
            "net": s.net,
            "parameters": frozen + trained,
            "trained_parameters": trained,
            "stage": s.stage,
            "complete": algorithm.it >= algorithm.num_train_iter,
            "steps": algorithm.it,
            "num_train_iter": algorithm.num_train_iter,
            **scores,
            "best_step": algorithm.best_it + 1 if algorithm.evaluations else None,
            "last_evaluation": {k.removeprefix("eval/"): v for k, v in algorithm.last_metrics.items()},
            "evaluations": len(algorithm.evaluations),
            "seconds": round(seconds, 3),
            "images_per_second": round(images / seconds, 1) if seconds else None,
            "warnings": [*algorithm.monitor.state.told.values()],
            "device": str(algorithm.device),
            "processes": distributed.world_size(),
            "precision": algorithm.precision,
        }
        write_json(self.run_dir / "result.json", result)
        return result


@contextlib.contextmanager
def _event_writer(folder: Path, step: int) -> Iterator[SummaryWriter]:
    """TensorBoard's writer, continued from ``step``. It writes in a thread: what the disk refuses there is raised by the next
    record, and not printed."""
    from torch.utils.tensorboard import SummaryWriter

    others = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not issubclass(failure.exc_type, OSError):
            others(failure)

    continues = folder.is_dir() and any(folder.iterdir())
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, threading, "excepthook", others)
        threading.excepthook = hook  # before the writer begins its thread
        try:
            with writing(folder):
                events = SummaryWriter(str(folder), purge_step=step + 1 if continues else None)
        except WriteError:
            for thread in threading.enumerate():
                if type(thread).__module__.startswith("tensorboard."):
                    thread.join(1)  # it fails too, and is not to print that
            raise
        try:
            yield events
        finally:
            with contextlib.suppress(OSError):  # a full disk has been reported by then
                events.close()
