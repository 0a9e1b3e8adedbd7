"""Where a step's time goes in this package's host, against a bare PyTorch loop; and what an image more costs MUSCLE.

    python benchmarks/overhead.py [--algorithms fixmatch meanteacher fullysupervised muscle_fixmatch muscle_meanteacher muscle]
                                  [--nets small_cnn] [--device cpu] [--batch 64] [--seconds 4] [--rounds 5] [--threads 1]
                                  [--json FILE]
    python benchmarks/overhead.py --data_dir made    # without CIFAR-10: random images of its size

CIFAR-10, 64 labelled and 64 unlabelled images a step, views made in the step. All in one process, all algorithms in turns;
ratios are taken within a round, shown are their medians (lowest to highest).

- The parts are timed from outside. ``forward, loss`` is the algorithm's ``train_step``; Mean Teacher's teacher, pseudo-labels
  and the mutual information are in it. ``logging`` writes a line and TensorBoard events every 10 steps, as ``train.py``
  does by itself. ``rest`` is what remains of a step: the loop, the calls of hooks, random generators.
- The bare loop (as in ``step.py``) forwards as many images and does nothing but forward, cross-entropy, backward and SGD.
- On a GPU each part is waited for, so parts add up to more than a step that is not watched; the step's own time is taken in
  turns of their own.
- An image more: (t_muscle - t_base) / (n_muscle - n_base) over t_base / n_base, t a step's time and n the images that it
  forwards, with or without gradient; and the time added over that which the bare loop takes for the same images more.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from clock import StepClock, images_forwarded
from common import (
    BACKWARD,
    FORWARD,
    PARTS,
    Timeline,
    add_step_options,
    as_train_does,
    bare,
    hosted,
    kernels_of,
    need_cifar,
    spread,
    write_figures,
)
from rich.console import Console
from rich.table import Table

from muscle_plugin.registry.catalogue import MUSCLE, MUSCLE_BASE, MUSCLE_PREFIX
from muscle_plugin.runs.progress import Progress
from muscle_plugin.runs.recorder import Recorder

ALGORITHMS = ("fixmatch", "meanteacher", "fullysupervised", "muscle_fixmatch", "muscle_meanteacher", "muscle")
GOAL = 1.05  # of an image more, in images of the base
LOG_EVERY = 10  # steps, as train.py does


@dataclass
class Loop:
    """One loop whose steps are timed."""

    run: Callable[[float], float]
    timeline: Timeline
    seconds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)

    def turn(self, seconds: float, on_gpu: bool) -> None:
        """Time some steps, and their parts; at once where watching costs nothing."""
        if on_gpu:
            self.seconds.append(self.run(seconds))
        self.timeline.start()
        watched = self.run(seconds)
        self.parts.append(self.timeline.means())
        self.timeline.stop()
        if not on_gpu:
            self.seconds.append(watched)

    @property
    def outside(self) -> list[float]:
        """Seconds per step that are neither forward nor backward, round by round."""
        return [sum(v for p, v in parts.items() if p not in (FORWARD, BACKWARD)) for parts in self.parts]


def base_of(algorithm: str) -> str | None:
    """What MUSCLE was added to."""
    if algorithm == MUSCLE:
        return MUSCLE_BASE
    return algorithm.removeprefix(MUSCLE_PREFIX) if algorithm.startswith(MUSCLE_PREFIX) else None


def measure(net: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Per algorithm ``images``, and the loops ``host`` and ``bare``."""
    device = torch.device(options.device)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(kernels_of(options))
        found: dict[str, dict[str, Any]] = {}
        for algorithm in options.algorithms:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            ours = hosted(algorithm, net, options, folder, num_log_iter=LOG_EVERY)
            images = images_forwarded(ours)
            ours.recorder = stack.enter_context(Recorder(Path(folder), 0, True, Progress(quiet=True)))
            timelines = Timeline(device), Timeline(device)
            timelines[0].watch(ours)
            found[algorithm] = {
                "images": sum(images),
                "host": Loop(StepClock(ours, device).run, timelines[0]),
                "bare": Loop(bare(net, images, options, timelines[1]), timelines[1]),
            }
        for _ in range(options.rounds):
            for entry in found.values():
                for name in ("host", "bare"):
                    entry[name].turn(options.seconds, device.type == "cuda")
    return found


def extra(found: dict[str, dict[str, Any]], algorithm: str) -> dict[str, list[float]] | None:
    """What an image more costs MUSCLE, round by round, ``of_base`` and ``of_bare``; None without its base."""
    base = base_of(algorithm)
    if base is None or base not in found:
        return None
    of_base, of_bare = [], []
    n, n_base = found[algorithm]["images"], found[base]["images"]
    loops = (found[algorithm]["host"], found[base]["host"], found[algorithm]["bare"], found[base]["bare"])
    for t, t_base, b, b_base in zip(*(loop.seconds for loop in loops), strict=True):
        of_base.append((t - t_base) / (n - n_base) / (t_base / n_base))
        of_bare.append((t - t_base) / (b - b_base))
    return {"of_base": of_base, "of_bare": of_bare}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--algorithms", nargs="+", default=list(ALGORITHMS))
    add("--nets", nargs="+", default=["small_cnn"])
    add_step_options(add)
    options = parser.parse_args(arguments)
    need_cifar(options)
    as_train_does(options)
    console = Console(width=170, highlight=False)
    figures: list[dict[str, Any]] = []
    for net in options.nets:
        found = measure(net, options)
        sizes = (
            f"{options.images}, {options.batch} + {options.batch} a step, {net}, {options.device}, {options.precision}"
        )
        title = f"milliseconds of a step and its parts, {sizes}, medians of {options.rounds} rounds"
        table = Table(title=title, title_justify="left")
        for column in ("algorithm", "images", "loop", "step", *PARTS, "outside forward, backward"):
            table.add_column(column, justify="left" if column in ("algorithm", "loop") else "right")
        for algorithm, entry in found.items():
            for name in ("host", "bare"):
                loop: Loop = entry[name]
                ms = [f"{1000 * statistics.median(r[p] for r in loop.parts):.2f}" for p in PARTS]
                labels = (algorithm, str(entry["images"])) if name == "host" else ("", "")
                step = f"{1000 * statistics.median(loop.seconds):.1f}"
                table.add_row(*labels, name, step, *ms, spread([1000 * s for s in loop.outside]))
                kept = {"seconds_per_step": loop.seconds, "parts": loop.parts}
                figures.append({"algorithm": algorithm, "net": net, "loop": name, "images": entry["images"], **kept})
            table.add_section()
        console.print(table)
        for algorithm, entry in found.items():
            host, plain = entry["host"], entry["bare"]
            more = [1000 * (a - b) for a, b in zip(host.outside, plain.outside, strict=True)]
            share = [100 * a / s for a, s in zip(host.outside, (sum(p.values()) for p in host.parts), strict=True)]
            console.print(
                f"{algorithm}: outside forward and backward {spread(more)} ms more than the bare loop; {spread(share, ' %', 1)}"
                " of a step",
                soft_wrap=True,
            )
        for algorithm in found:
            cost = extra(found, algorithm)
            if cost is None:
                continue
            met = "met" if statistics.median(cost["of_base"]) <= GOAL else "NOT met"
            console.print(
                f"{algorithm}: an image more costs {spread(cost['of_base'])} of an image of {base_of(algorithm)} (goal: at most"
                f" {GOAL}, {met}); the time added is {spread(cost['of_bare'])} of what the bare loop takes for it",
                soft_wrap=True,
            )
            figures.append({"algorithm": algorithm, "net": net, "image_more": cost})
    console.print(f"load average {os.getloadavg()[0]:.1f}")
    write_figures(options, results=figures)


if __name__ == "__main__":
    main()
