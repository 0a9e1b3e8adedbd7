"""Shared helpers: short digits runs that take seconds on one core."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several tests run at a time
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes
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


#: What is left of waiting in a step, as docs/performance.md lists it; an algorithm not named has none.
KNOWN = {
    # pytorch-metric-learning selects pairs by their labels
    "contrastive": 9,
    # its class takes the confident rows out, asks whether there are any, and counts their classes by bincount
    "freematch": 6,
    # its class normalises the perturbation with NumPy
    "vat": 2,
}
SPECIAL = {"crmatch": {"net": "wrn_28_2", "img_size": 32, "total_batch": 4}, "dash": {"num_wu_iter": 2}}


def of_base(table, name):
    return table.get(name.removeprefix("muscle_"))


#: Files that take minutes. Begun last, one of them would run alone on one core at the end.
LONG = ("test_sweep", "test_processes", "test_checkpoints", "test_host")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(autouse=True)
def _quiet_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def short_run(tmp_path: Path) -> Any:
    """A function that trains a short digits run in ``tmp_path`` and returns its result; keyword arguments override."""

    def run(**settings: Any) -> dict[str, Any]:
        from muscle_plugin.runs.train import train
        from muscle_plugin.settings.resolve import load_settings

        return train(load_settings(None, **{**SHORT, "save_dir": str(tmp_path), **settings}), quiet=True)

    return run


@pytest.fixture
def whole_and_resumed(short_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that trains a run to its end (``whole``) and once more with a stop after step 3 and a continuation
    (``resumed``), checks that nets and averages are equal to the bit, and returns both last checkpoints."""

    def run(**settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        import torch

        from muscle_plugin.errors import Interrupted
        from muscle_plugin.files import load_tensors
        from muscle_plugin.training.host import Host

        short_run(save_name="whole", **settings)
        save = Host._save_if_due
        with monkeypatch.context() as patch:
            patch.setattr(Host, "_save_if_due", lambda self: (self.it == 3 and self.request_stop(), save(self)))
            with pytest.raises(Interrupted):
                short_run(save_name="resumed", **settings)
        short_run(save_name="resumed", resume="yes", **settings)
        whole, resumed = (load_tensors(tmp_path / n / "latest_model.pth") for n in ("whole", "resumed"))
        for net in ("model", "ema_model"):
            assert [k for k, v in whole[net].items() if not torch.equal(v, resumed[net][k])] == []
        return whole, resumed

    return run


@pytest.fixture
def build_short(tmp_path: Path) -> Any:
    """A function that builds, without training, the algorithm of a short digits run."""

    def make(**settings: Any) -> Any:
        from muscle_plugin.runs.build import build
        from muscle_plugin.settings.resolve import load_settings

        return build(load_settings(None, **{**SHORT, "save_dir": str(tmp_path), **settings}))

    return make


@pytest.fixture
def make_run(tmp_path: Path) -> Any:
    """A function that writes the directory of a run that was never trained: what a report reads, with figures made up."""
    import json

    def make(config: str, seed: int = 0, score: float = 0.5, where: str = "runs", **settings: Any) -> Path:
        from muscle_plugin.settings.resolve import load_settings

        unfinished = settings.pop("stopped_at", None)
        resolved = load_settings(config, seed=seed, **settings)
        s = resolved.settings
        path = tmp_path / where / f"{config.replace('/', '-')}_{seed}"
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(resolved.to_yaml(leave_out=("resume", "overwrite", "load_path")))
        steps = s.num_train_iter or 1000
        curve = [(steps * i // 4, score * i / 4) for i in range(1, 5)]
        fixed = {"epoch": 0, "lr": 0.1, "eval/loss": 1.0}
        lines = [
            {"step": n, **fixed, "eval/top-1-acc": v, "eval/top-5-acc": (v + 1) / 2, "seconds": 0.1 * n}
            for n, v in curve
        ]
        (path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        groups = {f"{g}_classes/{m}": score for g in ("labelled", "unlabelled") for m in ("top-1-acc", "entropy")}
        result = {
            "algorithm": s.algorithm, "dataset": s.dataset, "num_labels": s.num_labels, "seed": seed, "net": s.net,
            "stage": s.stage, "complete": unfinished is None, "steps": unfinished or steps, "num_train_iter": steps,
            "best_top1": score + 0.01, "last_top1": score, "median20_top1": score - 0.01, "best_step": steps,
            "last_evaluation": {"top-1-acc": score, "top-5-acc": (score + 1) / 2, "entropy": 0.3, **groups},
            "evaluations": 4, "seconds": 0.1 * steps, "images_per_second": 100.0, "device": "cpu", "precision": "fp32",
        }  # fmt: skip
        (path / "result.json").write_text(json.dumps(result))
        environment = {
            "config": resolved.name, "torch": "2.9", "semilearn": "0.3.2", "python": "3.11", "device": "cpu", "gpu": None,
            "processor": "x86_64", "threads": 1, "precision": "fp32", "git_revision": "abc", "command": ["train.py"],
            "started": "2026-11-01T10:00:00+00:00",
        }  # fmt: skip
        (path / "environment.json").write_text(json.dumps(environment))
        return path

    return make
