"""Whether a long run stays flat: memory of process and device, open files, sizes of its logs; sampled at log steps.

    python benchmarks/long_run.py --steps 20000 --plot long_run.png --json long_run.json

Trains digits with evaluation, checkpoints and TensorBoard, and prints by how much each grows per 1,000 steps (linear fit),
from a tenth of the run on (``--begin``; label propagation, which takes more in its second stage: 0.6). Linux only: it reads
``/proc``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_figures
from process_memory import memory

from muscle_plugin.errors import Interrupted
from muscle_plugin.runs import recorder
from muscle_plugin.runs.train import train
from muscle_plugin.settings.resolve import load_settings

MB = 1e6
LABELS = {
    "rss": "resident memory, MB", "gpu": "GPU memory, MB", "files": "open files", "log.txt": "log.txt, MB",
    "metrics.jsonl": "metrics.jsonl, MB", "tensorboard": "TensorBoard, MB", "step_ms": "a step, ms",
}  # fmt: skip


@contextlib.contextmanager
def watch(every: float) -> Iterator[list[dict[str, float]]]:
    """Within it this process is sampled at log steps, at least ``every`` seconds apart; the list grows while it trains."""
    samples: list[dict[str, float]] = []
    inner = recorder.Recorder.record
    last = [0.0, 0]

    def record(self: Any, algorithm: Any, values: dict[str, float]) -> None:
        inner(self, algorithm, values)
        now, step = time.perf_counter(), algorithm.it + 1
        if now - last[0] < every:
            return
        sizes = {n: _size(self.run_dir / n) for n in ("log.txt", "metrics.jsonl", "tensorboard")}
        found = {"step": step, "rss": memory("VmRSS") / MB, "files": len(os.listdir("/proc/self/fd")), **sizes}
        if algorithm.device.type == "cuda":
            found["gpu"] = torch.cuda.memory_allocated(algorithm.device) / MB
        if last[1]:
            found["step_ms"] = 1000 * (now - last[0]) / (step - last[1])
        samples.append(found)
        last[:] = [now, step]

    recorder.Recorder.record = record  # type: ignore[method-assign]
    try:
        yield samples
    finally:
        recorder.Recorder.record = inner  # type: ignore[method-assign]


def _size(path: Path) -> float:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path] if path.is_file() else []
    return sum(p.stat().st_size for p in files) / MB


def slopes(samples: list[dict[str, float]], begin: float) -> dict[str, float]:
    """By how much each quantity grows per 1,000 steps, after step ``begin``."""
    late = [s for s in samples if s["step"] > begin]
    found = {}
    for name in LABELS:
        pairs = [(s["step"] / 1000, s[name]) for s in late if name in s]
        if len(pairs) > 2:
            found[name] = float(np.polyfit(*np.array(pairs).T, 1)[0])
    return found


def draw(runs: dict[str, list[dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [n for n in ("rss", "gpu", "files", "metrics.jsonl") if any(n in s for r in runs.values() for s in r)]
    figure, axes = plt.subplots(1, len(shown), figsize=(3.6 * len(shown), 2.6), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], shown, strict=True):
        for algorithm, samples in runs.items():
            axis.plot([s["step"] for s in samples], [s[name] for s in samples], label=algorithm, linewidth=1)
        axis.set(title=LABELS[name], xlabel="step", ylim=(0, 1.1 * max(s[name] for r in runs.values() for s in r)))
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=80)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Whether memory, open files and logs stay flat over a long run.")
    add = parser.add_argument
    add("--algorithms", nargs="+", default=["muscle_fixmatch"], metavar="NAME")
    add("--steps", type=int, default=20_000, help="steps of each [%(default)s]")
    add("--batch", type=int, default=16, help="images per step [%(default)s]")
    add("--begin", type=float, default=0.1, help="share of the run before which growth does not count [%(default)s]")
    add("--every", type=float, default=2.0, help="seconds between samples [%(default)s]")
    add("--threads", type=int, default=1)
    add("--device", default="cpu")
    add("--precision", default="fp32")
    add("--plot", metavar="PNG", help="draw the samples there")
    add("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args(argv)
    runs: dict[str, Any] = {}
    begin = options.begin * options.steps

    def write() -> None:
        if options.plot:
            draw(runs, Path(options.plot))
        found = {a: {"slopes_per_1000_steps": slopes(s, begin), "samples": s} for a, s in runs.items()}
        write_figures(options, runs=found)

    for algorithm in options.algorithms:
        with tempfile.TemporaryDirectory() as folder, watch(options.every) as samples:
            settings = load_settings(
                None, algorithm=algorithm, dataset="digits", num_labels=10, img_size=16, total_batch=options.batch,
                num_train_iter=options.steps, epoch=20, num_eval_iter=200, num_log_iter=10, ema_m=0.99, save_dir=folder,
                num_threads=options.threads, device=options.device, precision=options.precision,
            )  # fmt: skip
            try:
                train(settings, quiet=True)
            except Interrupted:
                print(f"{algorithm}: stopped at step {samples[-1]['step'] if samples else 0}")
        runs[algorithm] = list(samples)
        write()
        grown = slopes(samples, begin)
        print(f"{algorithm}: {options.steps} steps, {len(samples)} samples; per 1,000 steps after step {begin:.0f}:")
        for name, slope in grown.items():
            late = [s[name] for s in samples if name in s and s["step"] > begin]
            print(f"  {LABELS[name]:24} {slope:+.4f}   ({min(late):.2f} to {max(late):.2f})", flush=True)


if __name__ == "__main__":
    main()
