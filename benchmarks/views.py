"""Views per second: USB's own transforms (Pillow and torchvision, image by image) against ours (batches).

One process, one thread, the same images, in turns (USB's, ours, USB's, ...). Both start at uint8 images in memory and
end at a normalised float32 batch. USB's weak and strong transforms are composed as in
semilearn/datasets/cv_datasets/cifar.py. Before that ours as training makes them, on ``--device``: parameters drawn one batch
ahead in a thread if that is a GPU, where one kernel makes what it can; each batch is waited for.

    python benchmarks/views.py [--batch 448] [--size 32] [--channels 3] [--seconds 5] [--device cpu] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from common import add_common_options, wait_for, write_figures
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision import transforms

from muscle_plugin.data.augment import AFTER_WEAK, AUGMENTATIONS
from muscle_plugin.data.batches import Batches
from muscle_plugin.data.source import Source
from muscle_plugin.data.splits import Split
from muscle_plugin.data.views import LABELLED, STRONG, UNLABELLED, WEAK, View

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# view: (the stock transform it is held against, how many times as fast it is to be at 32 x 32, if there is a goal)
VIEWS: dict[str, tuple[str, float | None]] = {
    "crop_flip": ("USB weak", 8.0),
    "randaugment_usb": ("USB strong", 6.0),
    "randaugment": ("USB strong", None),
    "iic": ("IIC in Pillow", None),
}


def pictures(n: int, channels: int, size: int) -> Tensor:
    """Smooth random images with some noise: (n, channels, size, size) uint8."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, channels, 5, 5, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear") * 256
    return (images + 12 * torch.randn(images.shape, generator=generator)).clamp(0, 255).to(torch.uint8)


def stock_transforms(channels: int, size: int) -> dict[str, Callable]:
    """USB's transforms, and IIC's list as torchvision has it, without those whose parts cannot be imported."""
    tensor = [transforms.ToTensor(), transforms.Normalize(MEAN[:channels], STD[:channels])]
    weak = [
        transforms.Resize(size),
        transforms.RandomCrop(size, padding=int(size * 0.125), padding_mode="reflect"),
        transforms.RandomHorizontalFlip(),
    ]
    crop = round(size * 20 / 32)
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.125)
    iic = [transforms.RandomCrop(crop), transforms.Resize(size), transforms.RandomHorizontalFlip(), jitter]
    stock = {"USB weak": transforms.Compose(weak + tensor), "IIC in Pillow": transforms.Compose(iic + tensor)}
    if channels == 3:  # Pillow refuses to fill a hole in a grey image with USB's colour
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the libraries that USB imports
                import_module("muscle_plugin.usb.names")  # which knows what of them can be absent
                from semilearn.datasets.augmentation import RandAugment

            stock["USB strong"] = transforms.Compose([*weak, RandAugment(3, 5), *tensor])
        except ImportError as error:
            print(f"semilearn cannot be imported ({error}): no strong transform of USB's to compare with")
    return stock


def ours(name: str, images: Tensor) -> Callable[[], Tensor]:
    """One batch of the view, normalised."""
    generator = torch.Generator().manual_seed(0)
    std = torch.tensor(STD[: images.shape[1]]).view(1, -1, 1, 1)
    scale, shift = 1 / (255 * std), -torch.tensor(MEAN[: images.shape[1]]).view(1, -1, 1, 1) / std
    scale, shift = scale.to(images.device), shift.to(images.device)

    def batch() -> Tensor:
        x = AUGMENTATIONS["crop_flip"](images, generator) if name in AFTER_WEAK else images
        return AUGMENTATIONS[name](x, generator).float().mul_(scale).add_(shift)

    return batch


def seconds_of(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turns(functions: list[Callable[[], object]], timer: Callable, limit: float) -> list[list[float]]:
    """The times of each function, called in turns for about ``limit`` seconds, after two turns to warm up."""
    for _ in range(2):
        for function in functions:
            function()
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + limit
    while time.perf_counter() < end or len(times[0]) < 5:
        for function, its in zip(functions, times, strict=True):
            its.append(timer(function))
    return times


def rates(times: list[float], n: int) -> list[float]:
    """Views per second: lower quartile, median, upper quartile."""
    return [n / t for t in reversed(statistics.quantiles(times, n=4))]


def shown(quartiles: list[float]) -> str:
    low, middle, high = quartiles
    return f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=448, help="images of a batch (default 448)")
    parser.add_argument("--size", type=int, default=32, help="their side in pixels (default 32)")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="their channels (default 3)")
    parser.add_argument("--seconds", type=float, default=5, help="time for each line of the table (default 5)")
    parser.add_argument("--device", default="cpu", help="where training makes them, cpu or cuda (default cpu)")
    add_common_options(parser.add_argument)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    n = options.batch
    images = pictures(n, options.channels, options.size)
    training = in_training(torch.device(options.device), images, options.seconds)
    write_figures(options, in_training=training)  # what is measured is there if time runs out
    arrays = [x.permute(1, 2, 0).squeeze(2).contiguous().numpy() for x in images]
    stock = stock_transforms(options.channels, options.size)

    def singly(transform: Callable) -> Callable[[], Tensor]:
        return lambda: torch.stack([transform(Image.fromarray(array)) for array in arrays])

    table = Table(
        title=f"views per second, median of the rounds (quartiles): {n} images of {options.channels} x {options.size} x"
        f" {options.size}, CPU threads: {options.threads}, torch {torch.__version__}"
    )
    for column in ("view", "compared with", "its rate", "our rate", "ratio", "goal at 32 x 32"):
        table.add_column(column, justify="right" if column in ("its rate", "our rate", "ratio") else "left")
    found: dict[str, dict[str, list[float]]] = {}
    for name, (reference, goal) in VIEWS.items():
        batch = ours(name, images)
        if reference not in stock:
            (times,) = in_turns([batch], seconds_of, options.seconds)
            found[name] = {"ours": rates(times, n)}
            table.add_row(name, "-", "-", shown(found[name]["ours"]))
            continue
        theirs, times = in_turns([singly(stock[reference]), batch], seconds_of, options.seconds)
        found[name] = {"ours": rates(times, n), reference: rates(theirs, n)}
        ratio = statistics.median(theirs) / statistics.median(times)
        verdict = f"{goal:g}x {'met' if ratio >= goal else 'MISSED'}" if goal and options.size == 32 else ""
        table.add_row(name, reference, shown(rates(theirs, n)), shown(rates(times, n)), f"{ratio:.1f}x", verdict)
    Console(width=130, highlight=False).print(table)
    write_figures(options, in_training=training, views_per_second=found)


def batches_of(
    views: Mapping[str, View], images: Tensor, hard: str, device: torch.device, kernel: bool = True
) -> Batches:
    """What makes views of these images in training, all of them in each batch.

    Args:
        kernel: by the Triton kernel, where there is one.
    """
    n, every = len(images), torch.arange(len(images))
    source = Source(images, every % 2, every, every[:0], ("a", "b"))
    without = {} if kernel else {"MUSCLE_VIEW_KERNEL": "0"}
    with mock.patch.dict(os.environ, without):
        made = Batches(source, Split(every, every), n, n, (), "", "crop_flip", hard, images.shape[1], 0, device)
    made.add_views(views)
    made.channels_last = True  # as the host asks for
    return made


def maker(batches: Batches) -> Callable[[], None]:
    """One batch, waited for."""
    steps = itertools.count()

    def make() -> None:
        batches.batch(next(steps))
        wait_for(batches.device)

    return make


def in_training(device: torch.device, images: Tensor, limit: float) -> dict[str, Any]:
    """Views per second as training makes them; on a GPU with the kernel and without, and the share of a step they take.

    The step is MUSCLE + FixMatch's: 64 + 64 weak views, 3 hard ones of each, and the forward and backward pass of cnn13
    over these 512 images.
    """
    on_gpu = device.type == "cuda"
    name_of_device = torch.cuda.get_device_name(device) if on_gpu else "the CPU"
    table = Table(title=f"as training makes them, on {name_of_device}: batches of {len(images)}", title_justify="left")
    for column in ("view", "views per second", "without the kernel"):
        table.add_column(column)
    rates_by_kernel: dict[str, dict[str, list[float]]] = {"views_per_second": {}, "without_kernel": {}}
    notes = set()
    for name in VIEWS:
        every = {"view": View(UNLABELLED, STRONG, 1)}
        kinds = [batches_of(every, images, name, device, kernel) for kernel in ((True, False) if on_gpu else (True,))]
        notes |= {note for kind in kinds for note in kind.notes}
        # one after the other: each draws its next batch while another would be timed
        times = [its for kind in kinds for its in in_turns([maker(kind)], seconds_of, limit)]
        quartiles = [rates(its, len(images)) for its in times]
        for of, its in zip(rates_by_kernel.values(), quartiles, strict=False):
            of[name] = its
        table.add_row(name, *map(shown, quartiles))
    Console(width=130, highlight=False).print(table)
    print(*(f"note: {note}" for note in sorted(notes)), sep="\n", end="\n" if notes else "")
    if not on_gpu:
        return rates_by_kernel
    return {**rates_by_kernel, "notes": sorted(notes), **share_of_a_step(device, images[:64], limit)}


def share_of_a_step(device: torch.device, images: Tensor, limit: float) -> dict[str, float]:
    from muscle_plugin.nets import build_net

    kinds = {LABELLED: "lb", UNLABELLED: "ulb"}
    weak = {f"x_{name}_w": View(of, WEAK, 1) for of, name in kinds.items()}
    hard = {f"x_{name}_h": View(of, STRONG, 3) for of, name in kinds.items()}
    batches = batches_of({**weak, **hard}, images, "randaugment", device)
    x = torch.cat([*batches.batch(0).values()])
    net = build_net("cnn13", 10, x.shape[1]).to(device, memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            net(x)["logits"].float().sum().backward()
        wait_for(device)

    making, training = (statistics.median(its) for its in in_turns([maker(batches), step], seconds_of, limit))
    share = making / (making + training)
    print(
        f"views of a step {1000 * making:.2f} ms, cnn13 on {len(x)} images (bf16) {1000 * training:.2f} ms:"
        f" {100 * share:.1f} % of a step (goal: under 10 %, {'met' if share < 0.1 else 'MISSED'})"
    )
    return {"seconds_of_a_steps_views": making, "seconds_of_its_net": training, "share_of_a_step": share}


if __name__ == "__main__":
    main()
