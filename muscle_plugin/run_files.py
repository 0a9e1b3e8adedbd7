"""Names of the files in a run directory, and the format of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from muscle_plugin.errors import InputError

#: Version of a checkpoint's content, under its key ``format``.
CHECKPOINT_FORMAT = 1

LATEST, BEST = "latest_model.pth", "model_best.pth"
SPLIT_FILE, FAILURE_FILE = "split.json", "failure.json"
#: A directory with this file is a run of ours, and may be deleted by ``overwrite``.
CONFIG_FILE = "config.yaml"


def earlier_checkpoints(run_dir: Path, count: int) -> list[Path]:
    """Where ``count`` checkpoints before the newest are kept, the last one first."""
    return [run_dir / ("previous_model.pth" if i == 1 else f"previous_model_{i}.pth") for i in range(1, count + 1)]


def saved_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    earlier = earlier_checkpoints(run_dir, len(list(run_dir.glob("previous_model_*.pth"))) + 1)
    return [p for p in (run_dir / LATEST, *earlier) if p.is_file()]


def checkpoint_of(path: Path) -> Path:
    """The newest checkpoint of a run's folder; any other path is a checkpoint's own."""
    return path / LATEST if path.is_dir() else path


def refuse_newer(checkpoint: Mapping[str, object], path: str | Path) -> None:
    """Raise InputError for a checkpoint that a newer version of this package wrote."""
    found = checkpoint.get("format")
    if isinstance(found, int) and found > CHECKPOINT_FORMAT:
        raise InputError(
            f"{path}: written by a newer version of this package (checkpoint format {found}; this version reads"
            f" {CHECKPOINT_FORMAT})"
        )
