"""Reads run directories."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """One run directory: the content of ``result.json`` and the lines of ``metrics.jsonl``."""

    path: Path
    result: dict[str, Any]
    metrics: list[dict[str, float]]

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps at which ``key`` was logged, and its values."""
        points = [(m["step"], m[key]) for m in self.metrics if key in m]
        return [p[0] for p in points], [p[1] for p in points]


def read_run(path: Path) -> Run:
    """The run in a directory.

    Raises:
        OSError, ValueError: it holds no run.
    """
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return Run(path, json.loads((path / "result.json").read_text()), [json.loads(line) for line in lines])


def mean_and_std(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    v = list(values)
    return statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0


def by_algorithm(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs grouped by algorithm, in order of appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.result["algorithm"], []).append(run)
    return groups
