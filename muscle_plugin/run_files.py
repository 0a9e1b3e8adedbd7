"""Names of the files in a run directory."""

from __future__ import annotations

from pathlib import Path

LATEST, BEST = "latest_model.pth", "model_best.pth"


#: A directory with this file is a run of ours, and may be deleted by ``overwrite``.
CONFIG_FILE = "config.yaml"


SPLIT_FILE = "split.json"


FAILURE_FILE = "failure.json"


def earlier_checkpoints(run_dir: Path, count: int) -> list[Path]:
    """Where ``count`` checkpoints before the newest are kept, the last one first."""
    return [run_dir / ("previous_model.pth" if i == 1 else f"previous_model_{i}.pth") for i in range(1, count + 1)]


def saved_checkpoints(run_dir: Path) -> list[Path]:
    """Those of a run that are there, the newest first."""
    earlier = earlier_checkpoints(run_dir, len(list(run_dir.glob("previous_model_*.pth"))) + 1)
    return [p for p in (run_dir / LATEST, *earlier) if p.is_file()]


def checkpoint_of(path: Path) -> Path:
    """The newest checkpoint of a run's folder; any other path is a checkpoint's own."""
    return path / LATEST if path.is_dir() else path
