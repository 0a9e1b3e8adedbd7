"""Train MUSCLE and its baselines on scikit-learn's digits with ten labels.

The table gives the accuracy at the last step of runs of fixed length. Test labels are never used for training or model
selection.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from muscle_plugin.errors import EXIT_FAILED, EXIT_INTERRUPTED
from muscle_plugin.settings.resolve import load_settings
from muscle_plugin.settings.schema import RunSettings
from muscle_plugin.settings.sources import Layer
from muscle_plugin.studies.jobs import jobs_of, refuse_other_settings
from muscle_plugin.studies.pool import LocalPool
from muscle_plugin.studies.runs import Run, mean_and_std, read_run
from muscle_plugin.studies.sweep import run_all
from muscle_plugin.text import plural

NAMES = {
    "supervised": "supervised only",
    "fixmatch": "FixMatch (USB)",
    "muscle": "MUSCLE",
    "muscle_fixmatch": "MUSCLE + FixMatch",
}


def main(argv: Sequence[str], prog: str = "muscle-plugin demo") -> int:
    """Train, then print the table and write ``table.md``, ``curves.png`` and ``views.png``."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/demo"), help="folder for runs, table and pictures [%(default)s]")
    add("--seeds", type=int, default=3, help="runs of each method [%(default)s]")
    add("--steps", type=int, help="shorten the runs to this many steps")
    add("--workers", type=int, default=min(4, os.cpu_count() or 1), help="runs at a time [%(default)s]")
    options = parser.parse_args(list(argv))
    if min(options.seeds, options.workers, options.steps or 1) < 1:
        parser.error("--seeds, --steps and --workers must be at least 1")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    length: dict[str, Any] = {"num_train_iter": options.steps, "epoch": 1} if options.steps else {}
    layer = Layer("demo", {"save_dir": str(options.out), "use_tensorboard": False, **length})
    jobs = jobs_of([f"{a}_digits_10" for a in NAMES], options.seeds, layer)
    refuse_other_settings(jobs, "Give another --out")
    jobs.sort(key=lambda j: "muscle" not in j.resolved.settings.algorithm)  # the longest first
    first = jobs[0].resolved.settings
    console.print(
        f"{len(jobs)} runs of {first.num_train_iter} steps on scikit-learn's digits, {first.num_labels} labels,"
        f" {options.workers} at a time. Interrupted runs resume when this is started again."
    )
    began = time.perf_counter()
    endings = run_all(jobs, LocalPool(options.workers), [prog, *argv], console.print)
    if any(e.state == "stopped" for e in endings):
        console.print("stopped; start it again to resume")
        return EXIT_INTERRUPTED
    if failed := sum(e.state == "failed" for e in endings):
        console.print(f"{failed} of {len(jobs)} runs failed; their logs are in {options.out}/<run>/log.txt")
        return EXIT_FAILED
    runs = {
        name: [read_run(options.out / f"{algorithm}_digits_10_{seed}") for seed in range(options.seeds)]
        for algorithm, name in NAMES.items()
    }
    splits = [
        j.resolved.settings for j in sorted(jobs, key=lambda j: j.seed) if j.resolved.settings.algorithm == "muscle"
    ]
    files = _write(runs, splits, options.out, console)
    console.print(f"{time.perf_counter() - began:.0f} s. Written: {', '.join(map(str, files))}")
    return 0


def _write(runs: Mapping[str, Sequence[Run]], splits: Sequence[RunSettings], out: Path, console: Console) -> list[Path]:
    """Print the table, and write it with the pictures; returns the files."""
    from muscle_plugin.runs.build import build  # torch
    from muscle_plugin.studies.graph_baseline import METHODS, on_pixels
    from muscle_plugin.studies.plots import contact_sheet, learning_curves  # matplotlib
    from muscle_plugin.studies.show import views_of_first_batch

    table = "| method | accuracy (%), mean ± std | each seed | seconds a run |\n|---|---|---|---|\n"
    untrained = [on_pixels(s) for s in splits]
    rows = {name: [(100 * r.result["last_top1"], r.result["seconds"]) for r in group] for name, group in runs.items()}
    for name, measured in (rows | {name: [of_seed[name] for of_seed in untrained] for name in METHODS}).items():
        scores = [score for score, _ in measured]
        mean, std = mean_and_std(scores)
        seconds, _ = mean_and_std(s for _, s in measured)
        each = "  ".join(f"{s:.1f}" for s in scores)
        spread = f" ± {std:.1f}" if len(scores) > 1 else ""
        table += f"| {name} | {mean:.1f}{spread} | {each} | {seconds:.1f} |\n"
    first = runs["MUSCLE"][0].result
    title = f"digits, {first['num_labels']} labels, {first['steps']} steps, {plural(len(runs['MUSCLE']), 'seed')}"
    console.print(f"\nTest accuracy at the last step: {title}", Markdown(table))
    files = [out / name for name in ("table.md", "curves.png", "views.png")]
    files[0].write_text(table)
    learning_curves(list(runs.items()), 10, f"digits with {first['num_labels']} labels", files[1])
    contact_sheet(views_of_first_batch(build(load_settings("muscle_fixmatch_digits_10"))), files[2])
    return files
