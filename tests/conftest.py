"""Shared helpers: short digits runs that take seconds on one core."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "benchmark_configs"

#: A digits run of a few small steps.
SHORT: dict[str, Any] = {
    "dataset": "digits",
    "num_labels": 10,
    "img_size": 16,
    "total_batch": 16,
    "num_train_iter": 6,
    "epoch": 2,
    "num_eval_iter": 3,
    "num_log_iter": 2,
    "lr": 0.05,
    "ema_m": 0.9,
    "use_tensorboard": False,
    "num_threads": 1,
}


@pytest.fixture(autouse=True)
def _quiet_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def short_run(tmp_path: Path) -> Any:
    """A function that trains a short digits run in ``tmp_path`` and returns its result; keyword arguments override."""

    def run(**settings: Any) -> dict[str, Any]:
        from muscle_plugin.config import load_settings
        from muscle_plugin.run import train

        return train(load_settings(None, **{**SHORT, "save_dir": str(tmp_path), **settings}), quiet=True)

    return run


@pytest.fixture
def build_short(tmp_path: Path) -> Any:
    """A function that builds, without training, the algorithm of a short digits run."""

    def make(**settings: Any) -> Any:
        from muscle_plugin.config import load_settings
        from muscle_plugin.run import build

        return build(load_settings(None, **{**SHORT, "save_dir": str(tmp_path), **settings}))

    return make
