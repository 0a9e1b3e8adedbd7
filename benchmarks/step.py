"""Seconds of a training step: this package's host, stock USB, and a bare PyTorch loop over the same net.

    python benchmarks/step.py [--algorithms fixmatch meanteacher muscle_fixmatch muscle_meanteacher] [--nets small_cnn wrn_28_2]
                              [--device cpu] [--seconds 4] [--rounds 5] [--threads 1] [--workers 1]

CIFAR-10, 64 labelled and 64 unlabelled images a step, data included. All in one process, in turns; ratios are taken within
a round, shown are their medians (lowest to highest).

- host: what ``train.py`` runs.
- stock: USB's class, engine, data sets and loaders. Its loaders' processes (``--workers`` for labelled images, twice as many
  for unlabelled ones) come on top of its own: they take cores that the others do not use. Where there is no GPU USB refuses to
  run; the shim replaces ``.cuda()``, CUDA events and ``synchronize`` by nothing (``muscle_plugin.host.device``). No MUSCLE.
- bare: forward, cross-entropy, backward and SGD over tensors of as many images as the step forwards (with and without
  gradient), all that a step must do; no views, no averaged weights, no log.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from muscle_plugin.bench.clock import StepClock
from muscle_plugin.config import load_settings
from muscle_plugin.host.device import usb_calls_on
from muscle_plugin.run import build, net_builder

LABELLED = UNLABELLED = 64
FOREVER = 10**6
GOALS = {"cpu": (1.5, 0.95), "cuda": (3.0, 0.85)}


def hosted(algorithm: str, net: str, options: argparse.Namespace, folder: str) -> Any:
    """This package's algorithm object."""
    settings = {
        "algorithm": algorithm, "dataset": "cifar10", "net": net, "num_labels": 250, "batch_size": LABELLED,
        "uratio": UNLABELLED // LABELLED, "num_train_iter": FOREVER, "num_eval_iter": FOREVER, "num_log_iter": 50,
        "hard_augment": "randaugment_usb", "data_dir": options.data_dir, "save_dir": folder, "device": options.device,
        "precision": options.precision, "deterministic": options.device == "cpu", "include_lb_to_ulb": True,
    }  # fmt: skip
    return build(load_settings(None, **settings))


def stock(algorithm: str, net: str, options: argparse.Namespace, folder: str) -> Any:
    """USB's algorithm object, as its ``train.py`` builds one."""
    import semilearn
    import semilearn.datasets.utils as utils
    from semilearn.core.utils import send_model_cuda

    utils.base_dir = folder  # USB writes its index files into site-packages
    (Path(folder) / "cifar10").symlink_to(Path(options.data_dir).resolve())
    with contextlib.redirect_stdout(io.StringIO()):
        args: Namespace = semilearn.get_config(
            {
                "algorithm": algorithm, "dataset": "cifar10", "net": net, "num_labels": 250, "num_classes": 10,
                "batch_size": LABELLED, "uratio": UNLABELLED // LABELLED, "num_train_iter": FOREVER, "epoch": 1,
                "num_eval_iter": FOREVER, "num_log_iter": 50, "eval_batch_size": 256, "data_dir": folder, "save_dir": folder,
                "num_workers": options.workers, "amp": options.precision != "fp32",
                "gpu": 0 if options.device == "cuda" else None,
            }
        )  # fmt: skip
        args.distributed, args.world_size, args.rank = False, 1, 0
        logger = logging.Logger("stock")
        builder = net_builder(net, False, 3, 32, {})
        made = semilearn.get_algorithm(args, builder, None, logger)
        if options.device == "cuda":
            made.model = send_model_cuda(args, made.model)
            made.ema_model = send_model_cuda(args, made.ema_model, clip_batch=False)
    return made


def images_forwarded(algorithm: Any) -> tuple[int, int]:
    """Images that a step forwards with gradient, and without."""
    counts = [0, 0]

    def count(_: Any, __: Any, output: dict[str, Tensor]) -> None:  # before MUSCLE's tap cuts its riders off
        counts[0 if torch.is_grad_enabled() else 1] += len(output["logits"])

    # the averaged net's forwards too: a teacher is a net of its own in this package's Mean Teacher
    handles = [net.register_forward_hook(count) for net in (algorithm.model, algorithm.ema_model)]
    seen: list[tuple[int, int]] = []
    call_hook = algorithm.call_hook

    def hook(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "before_train_step":
            counts[:] = [0, 0]
        out = call_hook(name, *args, **kwargs)
        if name == "after_train_step":
            seen.append((counts[0], counts[1]))
        return out

    algorithm.call_hook = hook
    StepClock(algorithm, algorithm.device).run(0.0)
    algorithm.call_hook = call_hook
    for handle in handles:
        handle.remove()
    return seen[-1]


def bare(net: str, images: tuple[int, int], options: argparse.Namespace) -> Callable[[float], float]:
    """A plain loop; the function trains for some seconds and returns seconds per step."""
    device = torch.device(options.device)
    last = {"device": device, "memory_format": torch.channels_last}
    model = net_builder(net, False, 3, 32, {})(num_classes=10).to(**last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    with_gradient, without = (torch.randn(n, 3, 32, 32).to(**last) for n in images)
    labels = torch.randint(10, (images[0],), device=device)
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    cast = (
        contextlib.nullcontext()
        if options.precision == "fp32"
        else torch.autocast(device.type, dtype=kinds[options.precision])
    )

    def step() -> None:
        with cast:
            if len(without):
                with torch.no_grad():
                    model(without)
            logits = model(with_gradient)["logits"]
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def run(seconds: float) -> float:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        done, start = 0, time.perf_counter()
        while done == 0 or time.perf_counter() - start < seconds:
            step()
            done += 1
            if device.type == "cuda":
                torch.cuda.synchronize()
        return (time.perf_counter() - start) / done

    return run


def spread(values: list[float], unit: str = "") -> str:
    return f"{statistics.median(values):.2f}{unit} ({min(values):.2f} to {max(values):.2f})"


def measure(algorithm: str, net: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per step of each contender, round by round; and the images that a step forwards."""
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), usb_calls_on(device):
        warnings.simplefilter("ignore")
        ours = hosted(algorithm, net, options, folder)
        images = images_forwarded(ours)
        contenders: dict[str, Callable[[float], float]] = {"host": StepClock(ours, device).run}
        if not algorithm.startswith("muscle"):
            clock = StepClock(stock(algorithm, net, options, folder), device)
            contenders["stock"] = lambda seconds: clock.run(seconds, skip=3)
        contenders["bare"] = bare(net, images, options)
        found: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(options.rounds):
            for name, run in contenders.items():
                found[name].append(run(options.seconds))
    return found | {"images": [float(sum(images))]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--algorithms", nargs="+", default=["fixmatch", "meanteacher", "muscle_fixmatch", "muscle_meanteacher"])
    add("--nets", nargs="+", default=["small_cnn"])
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--precision", default="fp32", choices=["fp32", "bf16", "fp16"], help="stock USB: fp32, or its amp (fp16)")
    add("--data_dir", default="data", help="folder that holds cifar-10-batches-py [%(default)s]")
    add("--seconds", type=float, default=4.0, help="of each turn [%(default)s]")
    add("--rounds", type=int, default=5, help="turns of each [%(default)s]")
    add("--workers", type=int, default=1, help="num_workers of stock USB [%(default)s, as USB]")
    add("--threads", type=int, default=1, help="CPU threads [%(default)s]")
    options = parser.parse_args()
    if not (Path(options.data_dir) / "cifar-10-batches-py").is_dir():
        sys.exit(
            f"error: {options.data_dir}/cifar-10-batches-py: no such folder; --data_dir names the one that holds it"
        )
    torch.set_num_threads(options.threads)
    sizes = f"{LABELLED} + {UNLABELLED} images, {options.workers} + {2 * options.workers} loader processes of stock"
    title = f"milliseconds a step, {sizes}, {options.device}, {options.precision}, {options.rounds} rounds"
    table = Table(title=title, title_justify="left")
    for column in ("algorithm", "net", "images", "stock", "host", "bare", "host over stock", "bare over host"):
        table.add_column(column, justify="left" if column in ("algorithm", "net") else "right")
    per_image: dict[tuple[str, str], tuple[float, float]] = {}
    for net in options.nets:
        for algorithm in options.algorithms:
            t = measure(algorithm, net, options)
            faster = [s / h for s, h in zip(t["stock"], t["host"], strict=True)] if "stock" in t else []
            share = [b / h for b, h in zip(t["bare"], t["host"], strict=True)]
            ms = {k: f"{1000 * statistics.median(v):.1f}" for k, v in t.items() if k != "images"}
            per_image[algorithm, net] = statistics.median(t["host"]), t["images"][0]
            table.add_row(
                algorithm, net, f"{t['images'][0]:.0f}", ms.get("stock", "-"), ms["host"], ms["bare"],
                spread(faster, "x") if faster else "-", spread(share),
            )  # fmt: skip
    console = Console(width=140, highlight=False)
    console.print(table)
    for (algorithm, net), (seconds, images) in per_image.items():
        base = per_image.get((algorithm.removeprefix("muscle_"), net))
        if algorithm.startswith("muscle_") and base:
            extra = (seconds - base[0]) / (images - base[1]) / (base[0] / base[1])
            console.print(
                f"{algorithm}, {net}: an image more costs {extra:.2f} of an image of the base (goal: at most 1.05)"
            )
    fast, near = GOALS[options.device]
    console.print(
        f"goals: at least {fast}x stock, at least {near} of the bare loop; load average {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
