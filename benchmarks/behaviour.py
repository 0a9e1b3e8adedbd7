"""Whether the paper's directions are seen where two cores can look: on scikit-learn's digits with ten labels, and on
CIFAR-10 with 250 labels and a small net for a few hundred steps.

    python benchmarks/behaviour.py [--out results/behaviour] [--seeds 3] [--workers 2] [--data_dir data] [GROUP ...]

Groups: methods (Tables 1 to 3: label propagation, Mean Teacher, MUSCLE and their sums), cifar (the same on CIFAR-10),
ratio (Figure 2 a), dropout (Figure 2 b), contrastive (Figure 2 c), finetune (Figure 2 d). Runs go to runs/behaviour and are
continued if they were cut off; ``OUT`` gets the tables. Every figure is the accuracy at the last step of a run of fixed
length: nothing is chosen by it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console

from muscle_plugin.settings.resolve import load_settings
from muscle_plugin.studies.runs import mean_and_std, read_run

ROOT = Path(__file__).resolve().parent.parent
BASES = ROOT / "benchmark_configs" / "_base"
RUNS = Path("runs/behaviour")

CIFAR = {
    "dataset": "cifar10", "net": "small_cnn", "num_labels": 250, "num_train_iter": 400, "epoch": 4, "num_eval_iter": 400,
    "eval_batch_size": 1000,
}  # fmt: skip
MUSCLE = {"mi_labelled": False}
STAGES = {"lp_k": 20, "lp_class_mass": "none"}  # the paper's
#: group -> name of a row -> settings; ``after`` names the row whose weights it starts from.
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "methods": {
        "supervised": {"algorithm": "fullysupervised"},
        "LP": {"algorithm": "labelprop", **STAGES},
        "MT": {"algorithm": "meanteacher_original"},
        "MT+LP": {"algorithm": "meanteacher_labelprop", **STAGES},
        "MUSCLE": {"algorithm": "muscle", **MUSCLE},
        "MUSCLE+LP": {"algorithm": "muscle_labelprop", **MUSCLE, **STAGES},
        "MUSCLE+MT": {"algorithm": "muscle_meanteacher_original", **MUSCLE},
        "MUSCLE+MT+LP": {"algorithm": "muscle_meanteacher_labelprop", **MUSCLE, **STAGES},
    },
    "cifar": {
        name: {**settings, **CIFAR}
        for name, settings in {
            "supervised": {"algorithm": "fullysupervised"},
            "LP": {"algorithm": "labelprop"},
            "MT": {"algorithm": "meanteacher_original", "ema_m": 0.97},
            "MUSCLE": {"algorithm": "muscle"},
            "MUSCLE+MT": {"algorithm": "muscle_meanteacher_original", "ema_m": 0.97},
            "MUSCLE+MT+LP": {"algorithm": "muscle_meanteacher_labelprop", "ema_m": 0.97},
        }.items()
    },
    "ratio": {
        f"MUSCLE+MT, r = {r:g}": {"algorithm": "muscle_meanteacher_original", **MUSCLE, "ratio": r}
        for r in (0.5, 1, 2, 4, 8)
    },
    "dropout": {
        f"{name}, {what} dropout": {
            **settings, "net": "cnn13", "net_width": 0.125, "net_dropout": p, "num_train_iter": 600,
        }
        for name, settings in {
            "supervised": {"algorithm": "fullysupervised"}, "MUSCLE": {"algorithm": "muscle", **MUSCLE},
        }.items()
        for what, p in (("with", 0.5), ("without", 0.0))
    },
    "contrastive": {
        "supervised": {"algorithm": "fullysupervised"},
        "CL": {"algorithm": "contrastive"},
        "MUSCLE": {"algorithm": "muscle", **MUSCLE},
        "CL+MUSCLE": {"algorithm": "muscle_contrastive", **MUSCLE},
    },
    "finetune": {
        "pre-training by CL": {"algorithm": "contrastive", "stage": "pretrain"},
        "pre-training by CL+MI": {"algorithm": "muscle_contrastive", "stage": "pretrain", **MUSCLE},
        **{
            f"CL{plus}, then {name}": {**settings, "after": f"pre-training by CL{plus}", "num_train_iter": 600}
            for plus in ("", "+MI")
            for name, settings in {
                "supervised": {"algorithm": "fullysupervised"}, "MUSCLE": {"algorithm": "muscle", **MUSCLE},
            }.items()
        },
    },
}  # fmt: skip


def directory(settings: dict[str, Any], seed: int) -> str:
    """The same settings are the same run, in whatever group they stand."""
    words = [f"{k}={v}" for k, v in sorted(settings.items()) if k != "algorithm"]
    text = "_".join([settings["algorithm"], *words]).replace("/", "-").replace(" ", "-")
    return f"{text}_{seed}"


def train(settings: dict[str, Any], seed: int, group: str, data_dir: str) -> None:
    """One run, in a worker process; does nothing if it is finished."""
    from muscle_plugin.runs.train import train as run

    extra = {k: v for k, v in settings.items() if k != "after"}
    if "after" in settings:
        before = directory(GROUPS[group][settings["after"]], seed)
        extra["init_from"] = str(RUNS / before / "latest_model.pth")
    steps = extra.get("num_train_iter", 1200)
    base = BASES / ("cifar10_setting1_muscle.yaml" if "dataset" in settings else "digits.yaml")
    overrides = {
        "data_dir": data_dir, "seed": seed, "save_dir": str(RUNS), "save_name": directory(settings, seed), "resume": "auto",
        "num_threads": 1, "use_tensorboard": False, "num_train_iter": steps, "epoch": steps // 20, "num_eval_iter": 100,
    }  # fmt: skip
    run(load_settings(base, **{**overrides, **extra}), command=["benchmarks/behaviour.py"], quiet=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"{', '.join(GROUPS)} [all]")
    parser.add_argument(
        "--out", type=Path, default=Path("results/behaviour"), help="folder of the tables [%(default)s]"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row [%(default)s]")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time [%(default)s]")
    parser.add_argument("--data_dir", default="data", help="folder of CIFAR's files [%(default)s]")
    options = parser.parse_args()
    unknown = [g for g in options.groups if g not in GROUPS]
    if unknown:
        parser.error(f"unknown group {unknown[0]!r}; known: {', '.join(GROUPS)}")
    chosen = options.groups or list(GROUPS)
    console = Console(highlight=False)
    jobs: dict[str, tuple[dict[str, Any], int, str, str]] = {}
    for group in chosen:
        for settings in GROUPS[group].values():
            for seed in range(options.seeds):
                jobs.setdefault(directory(settings, seed), (settings, seed, group, options.data_dir))
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        for wave in (False, True):  # what starts from another run's weights comes after all others
            futures = {pool.submit(train, *job): name for name, job in jobs.items() if ("after" in job[0]) == wave}
            for number, future in enumerate(as_completed(futures), 1):
                future.result()
                console.print(f"[{number}/{len(futures)}] {futures[future]}", markup=False)
    for group in chosen:
        write_table(group, options)
        console.print((options.out / f"{group}.md").read_text(), markup=False)


def write_table(group: str, options: argparse.Namespace) -> None:
    """Mean and standard deviation of each row, and each seed."""
    lines = ["| | accuracy (%), mean ± std | each seed | steps |", "|---|---|---|---|"]
    environment: dict[str, Any] = {}
    for name, settings in GROUPS[group].items():
        if settings.get("stage") == "pretrain":
            continue
        runs = [read_run(RUNS / directory(settings, seed)) for seed in range(options.seeds)]
        scores = [100 * r.result["last_top1"] for r in runs]
        mean, std = mean_and_std(scores)
        lines.append(
            f"| {name} | {mean:.1f} ± {std:.1f} | {'  '.join(f'{s:.1f}' for s in scores)} | {runs[0].result['steps']} |"
        )
        environment = json.loads((runs[0].path / "environment.json").read_text())
    result = runs[0].result
    what = f"{result['dataset']}, {result['num_labels']} labels, {result['net']}"
    command = f"python benchmarks/behaviour.py {group} --seeds {options.seeds}"
    lines += [
        "",
        f"{what}, accuracy at the last step. `{command}`, {date.today()}, torch"
        f" {environment['torch']}, {environment['device']}, revision {environment['git_revision']}.",
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{group}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
