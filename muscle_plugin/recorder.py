"""Writes what a run measured: ``metrics.jsonl``, TensorBoard events and ``result.json``."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

from muscle_plugin.files import WriteError, write_json, write_text, writing
from muscle_plugin.host.hooks import accuracies
from muscle_plugin.progress import Progress


class Recorder:
    """The logs of one run directory, continued from ``step``: later lines of an earlier attempt are dropped.

    Args:
        run_dir: the run directory.
        step: steps done so far; 0 for a new run.
        tensorboard: whether to write TensorBoard events.
        progress: told of every record.
    """

    def __init__(self, run_dir: Path, step: int, tensorboard: bool, progress: Progress) -> None:
        self.run_dir, self._progress = run_dir, progress
        self._path = run_dir / "metrics.jsonl"
        if self._path.exists():
            rows = self._path.read_text(errors="replace").splitlines()
            write_text(self._path, "".join(f"{row}\n" for row in rows if _step_of(row) <= step))
        self._metrics = self._path.open("ab", buffering=0)
        self._events: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            folder = run_dir / "tensorboard"
            continues = folder.is_dir() and any(folder.iterdir())
            with writing(folder):
                self._events = SummaryWriter(str(folder), purge_step=step + 1 if continues else None)

    def __enter__(self) -> Recorder:
        self._excepthook = threading.excepthook
        threading.excepthook = self._thread_failed
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
            "warnings": list(algorithm.health.warnings),
            "device": str(algorithm.device),
            "processes": args.world_size,
            "precision": algorithm.precision,
        }
        write_json(self.run_dir / "result.json", result)
        return result


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut off in the middle
