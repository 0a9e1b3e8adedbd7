"""The demonstration: MUSCLE and its baselines on scikit-learn's digits with ten labels, trained on the spot.

Every number in the table is the accuracy at the last step of a run of fixed length. Test labels are read by the
evaluation alone: nothing in training, and not the choice of which step to report, depends on them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from muscle_plugin.errors import EXIT_INTERRUPTED
from muscle_plugin.settings.resolve import load_settings
from muscle_plugin.settings.sources import Layer
from muscle_plugin.studies.pool import LocalPool
from muscle_plugin.studies.sweep import EXIT_FAILED, Job, execute_all, jobs_of

NAMES = {
    "supervised": "supervised only",
    "fixmatch": "FixMatch (USB)",
    "muscle": "MUSCLE",
    "muscle_fixmatch": "MUSCLE + FixMatch",
}


def _jobs(options: argparse.Namespace) -> list[Job]:
    """The runs, the longest first, so that no process is left alone with one at the end."""
    settings: dict[str, Any] = {"save_dir": str(options.out), "use_tensorboard": False}
    if options.steps:
        settings["num_train_iter"] = options.steps
    jobs = jobs_of([f"{a}_digits_10" for a in NAMES], options.seeds, Layer("demo", settings))
    return sorted(jobs, key=lambda j: "muscle" not in j.resolved.settings.algorithm)


def main(argv: Sequence[str], prog: str = "muscle-plugin demo") -> int:
    """Train, then print the table and write ``table.md``, ``curves.png`` and ``views.png``."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder for runs, table and pictures [%(default)s]"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method [%(default)s]")
    parser.add_argument("--steps", type=int, help="shorten the runs to this many steps")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="runs at a time [%(default)s]")
    options = parser.parse_args(list(argv))
    if min(options.seeds, options.workers, options.steps or 1) < 1:
        parser.error("--seeds, --steps and --workers must be at least 1")
    console = Console(highlight=False, soft_wrap=True)
    jobs = _jobs(options)
    first = jobs[0].resolved.settings
    console.print(
        f"{len(jobs)} runs of {first.num_train_iter} steps on scikit-learn's digits, {first.num_labels} labels,"
        f" {options.workers} at a time. Stopped runs go on when this is started again."
    )
    began = time.perf_counter()
    ended = execute_all(jobs, LocalPool(options.workers), [prog, *argv], lambda line: console.print(line, markup=False))
    if ended["stopped"]:
        console.print("stopped; start it again to go on")
        return EXIT_INTERRUPTED
    if failed := ended["failed"]:
        console.print(f"{len(failed)} of {len(jobs)} runs failed; their logs are in {options.out}/<run>/log.txt")
        return EXIT_FAILED
    _report(console, options, time.perf_counter() - began)
    return 0


def _report(console: Console, options: argparse.Namespace, seconds: float) -> None:
    from muscle_plugin.runs.train import build
    from muscle_plugin.studies.plots import contact_sheet, learning_curves
    from muscle_plugin.studies.runs import by_algorithm, mean_and_std, read_run
    from muscle_plugin.studies.show import views_of_first_batch

    runs = [read_run(options.out / f"{a}_digits_10_{seed}") for a in NAMES for seed in range(options.seeds)]
    result = runs[0].result
    title = f"digits, {result['num_labels']} labels, {result['steps']} steps, {options.seeds} seeds"
    table = Table(title=f"test accuracy (%) at the last step: {title}")
    lines = ["| method | accuracy (%), mean ± std | each seed | seconds a run |", "|---|---|---|---|"]
    for column, justify in (
        ("method", "left"),
        ("mean ± std", "right"),
        ("each seed", "left"),
        ("seconds a run", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for algorithm, group in by_algorithm(runs).items():
        scores = [100 * r.result["last_top1"] for r in group]
        mean, std = mean_and_std(scores)
        cells = [
            NAMES[algorithm], f"{mean:.1f} ± {std:.1f}", "  ".join(f"{s:.1f}" for s in scores),
            f"{mean_and_std(r.result['seconds'] for r in group)[0]:.0f}",
        ]  # fmt: skip
        table.add_row(*cells)
        lines.append("| " + " | ".join(cells) + " |")
    console.print()
    console.print(table)
    (options.out / "table.md").write_text("\n".join(lines) + "\n")
    learning_curves(runs, NAMES, 10, f"digits with {result['num_labels']} labels", options.out / "curves.png")
    resolved = load_settings("muscle_fixmatch_digits_10")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        views = views_of_first_batch(build(resolved))
    contact_sheet(views, options.out / "views.png")
    console.print(
        f"{seconds:.0f} s. Written: {', '.join(str(options.out / n) for n in ('table.md', 'curves.png', 'views.png'))}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
