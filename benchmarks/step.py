"""Seconds of a training step: this package's host, stock USB, and a bare PyTorch loop over the same net.

    python benchmarks/step.py [--algorithms fixmatch meanteacher muscle_fixmatch muscle_meanteacher] [--nets small_cnn wrn_28_2]
                              [--device cpu] [--batch 64] [--seconds 4] [--rounds 5] [--threads 1] [--workers 1] [--json FILE]
    python benchmarks/step.py --data_dir made    # without CIFAR-10: random images of its size, which take as long

CIFAR-10, 64 labelled and 64 unlabelled images a step, data included. All in one process, in turns; ratios are taken within
a round, shown are their medians (lowest to highest). What the host does besides forward and backward: ``overhead.py``. On a
GPU all use the deterministic kernels that ``train.py`` uses by default; ``--fastest``: those that cuDNN finds fastest.

- host: what ``train.py`` runs.
- stock: USB's class, engine, data sets and loaders. Its loaders' processes (``--workers`` for labelled images, twice as many
  for unlabelled ones) come on top of its own: they take cores that the others do not use. Where there is no GPU USB refuses to
  run; the shim replaces ``.cuda()``, CUDA events and ``synchronize`` by nothing (``muscle_plugin.device``). No MUSCLE.
- bare: forward, cross-entropy, backward and SGD over tensors of as many images as the step forwards (with and without
  gradient), all that a step must do; no views, no averaged weights, no log. "views too": it makes the host's views besides.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from clock import StepClock, images_forwarded
from common import (
    add_step_options,
    as_train_does,
    bare,
    hosted,
    kernels_of,
    need_cifar,
    ratios,
    spread,
    stock,
    write_figures,
)
from rich.console import Console
from rich.table import Table

GOALS = {"cpu": (1.5, 0.95), "cuda": (3.0, 0.85)}


def measure(algorithm: str, net: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds per step of each contender, round by round; and the images that a step forwards."""
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), kernels_of(options):
        warnings.simplefilter("ignore")
        ours = hosted(algorithm, net, options, folder)
        images = images_forwarded(ours)
        contenders: dict[str, Callable[[float], float]] = {"host": StepClock(ours, device).run}
        if not algorithm.startswith("muscle"):
            clock = StepClock(stock(algorithm, net, options, folder), device)
            contenders["stock"] = lambda seconds: clock.run(seconds, skip=3)
        contenders["bare"] = bare(net, images, options)
        contenders["bare with views"] = bare(net, images, options, batches=ours.batches)
        found: dict[str, Any] = {name: [] for name in contenders}
        for _ in range(options.rounds):
            for name, run in contenders.items():
                found[name].append(run(options.seconds))
    return {"algorithm": algorithm, "net": net, "images": sum(images), **found}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--algorithms", nargs="+", default=["fixmatch", "meanteacher", "muscle_fixmatch", "muscle_meanteacher"])
    add(
        "--nets", nargs="+", default=["small_cnn"], help="small_cnn cnn13 wrn_28_2 vit_tiny_patch2_32 ... [%(default)s]"
    )
    add("--workers", type=int, default=1, help="num_workers of stock USB [%(default)s, as USB]")
    add_step_options(add)
    options = parser.parse_args(arguments)
    need_cifar(options)
    as_train_does(options)
    b = options.batch
    sizes = f"{options.images}, {b} + {b} a step, {options.workers} + {2 * options.workers} loader processes of stock"
    kind = options.precision if options.precision == "fp32" else f"{options.precision} (stock: its amp, fp16)"
    kernels = "fastest kernels" if options.fastest else "deterministic kernels"
    title = f"milliseconds a step, {sizes}, {options.device}, {kind}, {kernels}, {options.rounds} rounds"
    table = Table(title=title, title_justify="left")
    for column in (
        "algorithm", "net", "images", "stock", "host", "bare", "host over stock", "bare over host", "views too"
    ):  # fmt: skip
        table.add_column(column, justify="left" if column in ("algorithm", "net") else "right")
    found: list[dict[str, Any]] = []
    for net, algorithm in itertools.product(options.nets, options.algorithms):
        found.append(t := measure(algorithm, net, options))
        write_figures(options, seconds_per_step=found)  # what is measured is there if time runs out
        ms = {k: f"{1000 * statistics.median(t[k]):.1f}" for k in ("stock", "host", "bare") if k in t}
        table.add_row(
            t["algorithm"], t["net"], str(t["images"]), ms.get("stock", "-"), ms["host"], ms["bare"],
            spread(ratios(t["stock"], t["host"]), "x") if "stock" in t else "-", spread(ratios(t["bare"], t["host"])),
            spread(ratios(t["bare with views"], t["host"])),
        )  # fmt: skip
    Console(width=140, highlight=False).print(table)
    fast, near = GOALS[options.device]
    print(f"goals: at least {fast}x stock, at least {near} of the bare loop; load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
