"""Markdown of what the parts of device.py found on a GPU: the numbers that README and docs quote.

    python benchmarks/device_summary.py DIR    # writes DIR/summary.md anew, of check.json and train.json brought together there

Needs the standard library alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

CHECK, TRAIN = "check", "train"
SCORE = "eval/top-1-acc"
ENDED_WELL = (0, "stopped")


def compared(lines: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Test accuracies of several runs at equal steps, seconds of training and seconds of wall clock.

    Args:
        lines: of each run's metrics, with ``wall``.

    Returns:
        For the quarters of what all have reached ``{"by": "step" | "seconds" | "wall", "at": value, run: {"step", score}}``:
        a run's last evaluation until then, None where it has none. Steps are such at which all were evaluated.
    """
    evaluated = {run: [line for line in of if SCORE in line] for run, of in lines.items()}
    rows: list[dict[str, Any]] = []
    if not all(evaluated.values()):
        return rows
    common = set.intersection(*({line["step"] for line in of} for of in evaluated.values()))
    for by in ("step", "seconds", "wall"):
        last = max(common, default=0) if by == "step" else min(of[-1][by] for of in evaluated.values())
        marks = [last * quarter / 4 for quarter in (1, 2, 3, 4)]
        if by == "step":
            marks = sorted({max((s for s in common if s <= mark), default=0) for mark in marks} - {0})
        for mark in marks:
            until = {run: [line for line in of if line[by] <= mark] for run, of in evaluated.items()}
            scores = {r: {"step": of[-1]["step"], SCORE: of[-1][SCORE]} if of else None for r, of in until.items()}
            rows.append({"by": by, "at": mark, **scores})
    return rows


def summary(folder: Path) -> str:
    """The parts whose reports a folder holds."""
    lines: list[str] = []
    for part, of_part in ((CHECK, check_lines), (TRAIN, training_lines)):
        with contextlib.suppress(FileNotFoundError):
            report = json.loads((folder / f"{part}.json").read_text())
            told = [f"{name} {value}" for name, value in report["versions"].items() if value]
            told += [f"{key} {report[key]}" for key in ("cuda", "driver") if report[key]]
            rehearsal = ", a rehearsal with tiny settings" if report["device"] == "cpu" else ""
            lines += [f"## {report['device']}, {report['date'][:10]}: {part}{rehearsal}", ""]
            lines += [f"`{report['command']}`, revision {report['revision']}, {', '.join(told)}.", ""]
            lines += of_part(report)
            bad = [f"{c['name']} ({c['status']})" for c in report["commands"] if c["status"] not in ENDED_WELL]
            lines += [f"Failed or out of time: {'; '.join(bad)}.", ""] if bad else []
    return "\n".join(lines)


def check_lines(report: dict[str, Any]) -> list[str]:
    figures = {c["name"]: c["figures"] for c in report["commands"] if "figures" in c}
    lines = [f"- {item}" for name, f in figures.items() for item in items(name, f)]
    steps = [(f["options"], row) for f in figures.values() for row in f.get("seconds_per_step", ())]
    lines += ["", *table_of_steps(steps)] if steps else []
    return [*lines, ""]


def items(name: str, figures: dict[str, Any]) -> Iterator[str]:
    """What one command of the check found, but for steps against stock USB."""
    if "collected" in figures:
        counts = {outcome: figures[outcome] for outcome in ("passed", "failed", "skipped")}
        counts["not run"] = figures["collected"] - sum(counts.values())
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        yield f"`{name}`: {told}" + "".join(f"; `{test}`" for test in figures["failures"])
    if "in_training" in figures:
        made, size = figures["in_training"], figures["options"]["size"]
        for title, key in (("", "views_per_second"), (", without the kernel", "without_kernel")):
            each = ", ".join(f"`{n}` {median:,.0f}" for n, (_, median, _) in made[key].items())
            if each:
                yield f"views per second, {size} x {size}{title}: {each}"
        yield from made.get("notes", ())
        if "share_of_a_step" in made:
            ms, share = 1000 * made["seconds_of_a_steps_views"], 100 * made["share_of_a_step"]
            yield f"views of a MUSCLE + FixMatch step: {ms:.2f} ms, {share:.1f} % of it with `cnn13` in bf16"
    for row in figures.get("sizes", ()):
        parts = ", ".join(f"{part} {row[part]:.2f}" for part in ("knn", "graph", "diffusion"))
        classes = figures["options"]["classes"][0]
        yield f"a refresh of label propagation, n = {row['n']:,}, C = {classes}: {row['total']:.2f} s ({parts})"
    if "profile" in figures:
        found, options = figures["profile"], figures["options"]
        what = f"`{options['algorithm']}`, `{options['net']}`, {options['precision']}, {options['batch']} + {options['batch']}"
        told = f"a step of {what} images: {1000 * found['seconds']:.1f} ms, CPU {1000 * found['cpu_seconds']:.1f} ms"
        if found["gpu_share"] is not None:
            told += f", GPU busy {1000 * found['gpu_seconds']:.1f} ms ({100 * found['gpu_share']:.0f} %)"
            told += f", {found['kernels']:,.0f} kernel launches"
        yield told


def table_of_steps(rows: list[tuple[dict[str, Any], dict[str, Any]]]) -> Iterator[str]:
    """Of options and figures of benchmarks/step.py."""
    yield table_row(
        "ms of a step", "precision", "images", "stock USB", "host", "bare loop", "stock / host", "bare / host"
    )
    yield "|---" * 8 + "|"
    for options, row in rows:
        ms = {k: f"{1000 * statistics.median(row[k]):.1f}" for k in ("stock", "host", "bare") if k in row}
        over = {k: spread(a / b for a, b in zip(row[k], row["host"], strict=True)) for k in ms}
        precision = options["precision"] + ("" if options["precision"] == "fp32" else " (stock: fp16)")
        precision += ", fastest kernels" if options.get("fastest") else ""
        images = f"{options['batch']} + {options['batch']}, {row['images']} forwarded"
        yield table_row(
            f"`{row['algorithm']}`, `{row['net']}`", precision, images, ms.get("stock", ""), ms["host"], ms["bare"],
            over.get("stock", ""), over["bare"],
        )  # fmt: skip


def training_lines(report: dict[str, Any]) -> list[str]:
    rows = report.get("accuracy")
    if not rows:
        return []
    runs = [key for key in rows[0] if key not in ("by", "at")]
    lines = [
        f"CIFAR-10, 250 labels, seed 0, {report['trained']}, {report['steps']:,} steps planned for each run, side by side on"
        " one device until the faster one ends. Test accuracy (%) of the averaged weights at a run's last evaluation by then,"
        " and its step; empty: none by then. Seconds of training leave evaluations out:",
        "", table_row("at", *(f"`{run}`" for run in runs)), "|---" * (len(runs) + 1) + "|",
    ]  # fmt: skip
    units = {
        "step": "step {:,.0f}",
        "seconds": "{:,.0f} s of training",
        "wall": "{:,.0f} s of wall clock, start included",
    }
    for row in rows:
        cells = [f"{100 * row[r][SCORE]:.1f} ({row[r]['step']:,})" if row[r] else "" for r in runs]
        lines.append(table_row(units[row["by"]].format(row["at"]), *cells))
    return [*lines, ""]


def table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def spread(values: Iterable[float]) -> str:
    """Median (lowest to highest)."""
    ordered = sorted(values)
    if len(ordered) == 1:
        return f"{ordered[0]:.2f} (one round)"
    return f"{statistics.median(ordered):.2f} ({ordered[0]:.2f} to {ordered[-1]:.2f})"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="holds check.json, train.json or both")
    folder = parser.parse_args(arguments).folder
    if not any((folder / f"{part}.json").is_file() for part in (CHECK, TRAIN)):
        print(f"error: {folder}: holds neither {CHECK}.json nor {TRAIN}.json", file=sys.stderr)
        return 2
    (folder / "summary.md").write_text(summary(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
