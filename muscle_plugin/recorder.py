"""Writes what a run measured: ``metrics.jsonl``, TensorBoard events and ``result.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from muscle_plugin.files import write_json, write_text
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
        path = run_dir / "metrics.jsonl"
        if path.exists():
            write_text(path, "".join(line for line in path.read_text().splitlines(True) if _step_of(line) <= step))
        self._metrics = path.open("a")
        self._events: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()
        if self._events is not None:
            self._events.close()

    def record(self, algorithm: Any, values: dict[str, float]) -> None:
        """One line of metrics; the step is counted from 1, seconds are training time."""
        step = algorithm.it + 1
        line = {"step": step, "epoch": algorithm.epoch, **values, "seconds": round(algorithm.seconds(), 3)}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        if self._events is not None:
            for key, value in values.items():
                self._events.add_scalar(key, value, step)
        self._progress.update(algorithm, step, values)

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
