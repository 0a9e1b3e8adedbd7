"""Seconds of training to 90 % test accuracy on scikit-learn's digits with ten labels: MUSCLE + FixMatch and FixMatch, hosted,
and FixMatch in stock USB.

    python benchmarks/time_to_accuracy.py [--seeds 3] [--labels 10] [--steps 1200] [--target 0.9] [--every 25]
                                          [--threads 1] [--workers 0] [--device cpu] [--json FILE]

One process, seed by seed, the contenders in turns, another one first each time. Settings of the hosted runs:
``muscle_fixmatch_digits_10.yaml`` and ``fixmatch_digits_10.yaml``; stock's are the same by USB's names. All have the same
images (16 x 16, uint8), test images, labelled images of a seed, net (``small_cnn``), optimiser and schedule; initial weights
and order of images are each one's own.

- Training time is taken from outside, alike for all: from the call of ``train()``, without ``evaluate()`` and
  ``save_model()``. Wall time begins before data, net and algorithm are made and leaves nothing out but imports.
- The averaged weights are evaluated every ``--every`` steps, so times are multiples of that many steps; a run ends where it
  first reaches the target. One that does not is "not within N steps", and its ratio is a bound.
- Stock USB: its FixMatch class, engine, ``BasicDataset``, samplers and loaders. USB has no digits, so its class is given them
  by an overridden ``set_dataset``. Its transforms are torchvision's, on one Pillow image at a time: ``Distort`` draws the
  parameters of ``digits_weak`` and ``digits_hard`` and applies them by torchvision's ``affine``; contrast and noise are
  drawn per image on the tensor. The views' distribution is the hosts', but for rounding to 8 bits after the distortion.
- The ratio's median is over seeds. Test accuracy decides when a run ends, here and only here.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import add_common_options, as_train_does, build_stock, write_figures
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, Normalize, ToTensor
from torchvision.transforms import functional as tv

from muscle_plugin.data.datasets import load_source
from muscle_plugin.data.normalise import pixel_statistics
from muscle_plugin.data.source import Source, SourceOptions
from muscle_plugin.data.splits import Split, draw_split
from muscle_plugin.runs.build import build
from muscle_plugin.seeding import seed_everything
from muscle_plugin.settings.resolve import load_settings
from muscle_plugin.usb.calls import usb_calls_on

CONFIGS = Path(__file__).resolve().parent.parent / "benchmark_configs"
OURS, BASE, STOCK = "MUSCLE + FixMatch, hosted", "FixMatch, hosted", "FixMatch, stock USB"


# -------------------------------------------------------------------------------------------------- stock USB on digits


def _uniform(low: float, high: float) -> float:
    return float(torch.empty(()).uniform_(low, high))


class Distort:
    """A Pillow image turned, scaled, sheared and shifted at random, as ``augment._distort`` draws it.

    Args:
        angle: at most, in radians.
        scale: at most, as its logarithm.
        shear: at most, as the tangent of its angle.
        shift: at most, as a fraction of the side.
    """

    def __init__(self, angle: float, scale: float, shear: float, shift: float) -> None:
        self.angle, self.scale, self.shear, self.shift = angle, scale, shear, shift

    def __call__(self, image: Any) -> Any:
        angle, shear = _uniform(-self.angle, self.angle), _uniform(-self.shear, self.shear)
        shift = [_uniform(-self.shift, self.shift) * image.size[0] for _ in "xy"]
        return distorted(image, angle, math.exp(_uniform(-self.scale, self.scale)), shear, shift)


def distorted(image: Any, angle: float, scale: float, shear: float, shift: Sequence[float]) -> Any:
    """As ``augment.affine`` of one image; shift in pixels."""
    return tv.affine(
        image, -math.degrees(angle), list(shift), scale, [math.degrees(math.atan(shear)), 0.0],
        interpolation=InterpolationMode.BILINEAR, fill=0,
    )  # fmt: skip


def contrast_and_noise(image: Tensor) -> Tensor:
    """Of ``digits_hard``; an image in [0, 1]."""
    return image * _uniform(0.7, 1.3) + 0.05 * torch.randn(image.shape)


def stock_data(source: Source, split: Split) -> dict[str, Any]:
    """Labelled, unlabelled and test images in USB's own data set class."""
    from semilearn.datasets.cv_datasets.datasetbase import BasicDataset

    mean, std = (s.tolist() for s in pixel_statistics(source))
    plain = [ToTensor(), Normalize(mean, std)]
    weak = Compose([Distort(0.25, 0.15, 0.2, 0.1), *plain])
    strong = Compose([Distort(0.35, 0.25, 0.3, 0.12), ToTensor(), contrast_and_noise, Normalize(mean, std)])

    def images(members: Tensor, transform: Any, unlabelled: bool = False) -> Any:
        data, targets = source.images[members].squeeze(1).numpy(), source.labels[members].numpy()
        return BasicDataset(
            "fixmatch", data, targets, len(source.classes), transform, unlabelled, strong if unlabelled else None
        )

    return {
        "train_lb": images(source.train[split.labelled], weak),
        "train_ulb": images(source.train[split.unlabelled], weak, unlabelled=True),
        "eval": images(source.test, Compose(plain)),
        "test": None,
    }


def stock(seed: int, options: argparse.Namespace, folder: str) -> Any:
    """Stock USB's FixMatch with the settings of ``fixmatch_digits_10.yaml``."""
    from muscle_plugin.usb.names import ALGORITHMS

    s = load_settings(str(CONFIGS / "fixmatch_digits_10.yaml"), seed=seed, num_labels=options.labels).settings
    source = load_source("digits", SourceOptions(Path(folder), s.img_size))
    split = draw_split(source, s.num_labels, seed)

    class FixMatchOnDigits(ALGORITHMS["fixmatch"]):  # type: ignore[misc]
        def set_dataset(self) -> dict[str, Any]:
            self.args.lb_dest_len, self.args.ulb_dest_len = len(split.labelled), len(split.unlabelled)
            return stock_data(source, split)

    seed_everything(seed)
    labelled = round(s.total_batch / (1 + s.ratio))
    same = {
        n: getattr(s, n) for n in ("net", "img_size", "num_labels", "optim", "lr", "momentum", "weight_decay", "ema_m")
    }
    return build_stock(
        FixMatchOnDigits,
        {
            **same, "algorithm": "fixmatch", "dataset": "digits", "num_classes": 10, "batch_size": labelled,
            "uratio": round(s.ratio), "num_train_iter": options.steps,
            "epoch": min(s.epoch, options.steps), "num_eval_iter": options.every,
            "num_log_iter": s.num_log_iter, "eval_batch_size": s.eval_batch_size, "save_dir": folder, "seed": seed,
            "num_workers": options.workers, "include_lb_to_ulb": False,
            "gpu": 0 if options.device == "cuda" else None,
        },
        channels=1,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- runs


def hosted(config: str, seed: int, options: argparse.Namespace, folder: str) -> Any:
    """This package's algorithm object."""
    path = str(CONFIGS / f"{config}.yaml")
    epoch = min(load_settings(path).settings.epoch, options.steps)
    return build(
        load_settings(
            path, seed=seed, num_labels=options.labels, num_train_iter=options.steps, epoch=epoch,
            num_eval_iter=options.every, save_dir=folder, device=options.device,
        )
    )  # fmt: skip


class _Reached(Exception):
    """The run is as accurate as asked for."""


class Race:
    """Lets an algorithm, this package's or USB's, train until an evaluation reaches the target; times it from outside.

    Attributes:
        accuracies: of every evaluation.
        training: seconds in ``train()`` outside ``evaluate()`` and ``save_model()``.
        steps: done.
        reached: whether it did.
    """

    def __init__(self, algorithm: Any, device: torch.device, target: float) -> None:
        self.accuracies: list[float] = []
        self.training, self.steps, self.reached = 0.0, 0, False
        self._device, self._since = device, 0.0
        evaluate, save = algorithm.evaluate, algorithm.save_model

        def evaluated(*args: Any, **kwargs: Any) -> Any:
            self._pause()
            found = evaluate(*args, **kwargs)
            self.steps = algorithm.it + 1
            self.accuracies.append(float(found["eval/top-1-acc"]))
            if self.accuracies[-1] >= target:
                self.reached = True
                raise _Reached
            self._go_on()
            return found

        def saved(*args: Any, **kwargs: Any) -> Any:
            self._pause()
            save(*args, **kwargs)
            self._go_on()

        algorithm.evaluate, algorithm.save_model = evaluated, saved
        self._algorithm = algorithm

    def _go_on(self) -> None:
        self._since = time.perf_counter()

    def _pause(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.training += time.perf_counter() - self._since

    def run(self) -> None:
        self._go_on()
        try:
            self._algorithm.train()
        except _Reached:
            return
        self._pause()


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run to the target or to its end."""
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), usb_calls_on(device):
        warnings.simplefilter("ignore")
        began = time.perf_counter()
        if name == STOCK:
            algorithm = stock(seed, options, folder)
        else:
            algorithm = hosted(
                "muscle_fixmatch_digits_10" if name == OURS else "fixmatch_digits_10", seed, options, folder
            )
        race = Race(algorithm, device, options.target)
        race.run()
        wall = time.perf_counter() - began
    return {
        "contender": name, "seed": seed, "reached": race.reached, "steps": race.steps, "training_seconds": race.training,
        "wall_seconds": wall, "accuracies": race.accuracies,
    }  # fmt: skip


def bounds(theirs: dict[str, Any], ours: dict[str, Any], key: str) -> tuple[float, float]:
    """The lowest and highest that their seconds over ours may be: both the ratio, if both runs reached the target."""
    ratio = theirs[key] / ours[key]
    return (ratio if ours["reached"] else 0.0), (ratio if theirs["reached"] else math.inf)


def said(low: float, high: float) -> str:
    """Bounds of a ratio in words."""
    if low == 0 and math.isinf(high):
        return "unknown"
    if low == high:
        return f"{low:.2f}x"
    if math.isinf(high):
        return f"more than {low:.2f}x"
    return f"less than {high:.2f}x" if low == 0 else f"between {low:.2f}x and {high:.2f}x"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="number of seeds, from 0 [%(default)s]")
    add("--labels", type=int, default=10, help="labelled images [%(default)s]")
    add("--steps", type=int, default=1200, help="of a run at most; the schedule is that of so many [%(default)s]")
    add("--target", type=float, default=0.9, help="accuracy on the test images [%(default)s]")
    add("--every", type=int, default=25, help="steps between evaluations [%(default)s]")
    add("--workers", type=int, default=0, help="num_workers of stock USB [%(default)s: one core for each]")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add_common_options(add)
    options = parser.parse_args(arguments)
    as_train_does(options)
    console = Console(width=130, highlight=False)
    aim = f"{options.labels} labels, to {100 * options.target:g} %, {options.steps} steps at most"
    table = Table(title=f"digits, {aim}, {options.device}", title_justify="left")
    for column in ("seed", "", "reached", "training s", "wall s", "accuracy there", "best"):
        table.add_column(column, justify="left" if column in ("", "reached") else "right")
    names = (STOCK, BASE, OURS)
    found: list[dict[str, dict[str, Any]]] = []
    for seed in range(options.seeds):
        turns = [names[(seed + i) % len(names)] for i in range(len(names))]  # whoever is first warms the process up
        results = {name: run(name, seed, options) for name in turns}
        found.append({name: results[name] for name in names})
        for name, r in found[-1].items():
            when = f"step {r['steps']}" if r["reached"] else f"not within {options.steps} steps"
            seconds = [f"{r[k]:.1f}" if r["reached"] else f"> {r[k]:.1f}" for k in ("training_seconds", "wall_seconds")]
            scores = [f"{100 * v:.1f}" for v in (r["accuracies"][-1], max(r["accuracies"]))]
            table.add_row(str(seed), name, when, *seconds, *scores)
        table.add_section()
    console.print(table)
    figures: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
    for other, one in ((STOCK, OURS), (BASE, OURS), (STOCK, BASE)):
        texts = []
        for key in ("training_seconds", "wall_seconds"):
            each = [bounds(seed[other], seed[one], key) for seed in found]
            low, high = (statistics.median(side) for side in zip(*each, strict=True))
            texts.append(f"{said(low, high)} [{', '.join(said(*pair) for pair in each)}]")
            kept = [(a, None if math.isinf(b) else b) for a, b in each]
            figures.setdefault(f"{other} over {one}", {})[key] = kept
        console.print(f"{other} over {one}: training {texts[0]}; wall {texts[1]}", soft_wrap=True, markup=False)
    per_step = {
        n: [1000 * seed[n]["training_seconds"] / seed[n]["steps"] for seed in found] for n in (STOCK, BASE, OURS)
    }
    steps = ", ".join(f"{n} {statistics.median(v):.1f}" for n, v in per_step.items())
    console.print(f"milliseconds a step, medians: {steps}; load average {os.getloadavg()[0]:.1f}", soft_wrap=True)
    write_figures(options, runs=[r for seed in found for r in seed.values()], bounds_of_ratios=figures)


if __name__ == "__main__":
    main()
