"""Views per second: USB's own transforms (Pillow and torchvision, image by image) against ours (batches).

One process, one thread, the same images, in turns (USB's, ours, USB's, ...). Both start at uint8 images in memory and
end at a normalised float32 batch. USB's weak and strong transforms are composed as in
semilearn/datasets/cv_datasets/cifar.py. With ``--device cuda`` ours is also timed there, by the GPU's own clock.

    python benchmarks/views.py [--batch 448] [--size 32] [--channels 3] [--seconds 5] [--device cpu] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from common import add_common_options, write_figures
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision import transforms

from muscle_plugin.data.augment import AFTER_WEAK, AUGMENTATIONS

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
                import_module("muscle_plugin.usb")  # which knows what of them can be absent
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


def gpu_seconds_of(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def in_turns(functions: list[Callable[[], object]], timer: Callable, limit: float) -> list[list[float]]:
    """The times of each function, called in turns for about ``limit`` seconds, after two turns to warm up."""
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + limit
    while time.perf_counter() < end or len(times[0]) < 7:
        for function, its in zip(functions, times, strict=True):
            its.append(timer(function))
    return [its[2:] for its in times]


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
    parser.add_argument("--device", default="cpu", help="a CUDA device to time ours on too (default cpu: none)")
    add_common_options(parser.add_argument)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    n = options.batch
    images = pictures(n, options.channels, options.size)
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
    write_figures(options, views_per_second=found)  # what is measured is there if time runs out
    if options.device != "cpu":
        gpu = on_gpu(torch.device(options.device), images, options.seconds)
        write_figures(options, views_per_second=found, on_gpu=gpu)


def on_gpu(device: torch.device, images: Tensor, limit: float) -> dict[str, Any]:
    """Our views per second on a GPU, and the share that a MUSCLE + FixMatch batch's views take of a training step.

    The step is the forward and backward pass of cnn13 over 512 images: 64 + 64 weak views, 3 hard ones of each.
    """
    from muscle_plugin.nets import cnn13

    with torch.cuda.device(device):
        table = Table(title=f"on {torch.cuda.get_device_name(device)}: batches of {len(images)}, by the GPU's clock")
        for column in ("view", "views per second"):
            table.add_column(column)
        found = {}
        for name in VIEWS:
            (times,) = in_turns([ours(name, images.to(device))], gpu_seconds_of, limit)
            found[name] = rates(times, len(images))
            table.add_row(name, shown(found[name]))
        Console(width=130, highlight=False).print(table)

        net = cnn13(10, 3).to(device)
        batch = images[torch.arange(128) % len(images)].to(device)
        weak, hard = ours("crop_flip", batch), ours("randaugment", batch.repeat(3, 1, 1, 1))
        x = torch.cat([weak(), hard()])

        def views() -> None:
            weak(), hard()

        def step() -> None:
            with torch.autocast("cuda", torch.bfloat16):
                net(x)["logits"].float().sum().backward()

        making, training = in_turns([views, step], lambda f: seconds_of(lambda: (f(), torch.cuda.synchronize())), limit)
        view_seconds, net_seconds = statistics.median(making), statistics.median(training)
        share = view_seconds / (view_seconds + net_seconds)
        print(
            f"views of a step {1000 * view_seconds:.2f} ms, cnn13 on 512 images (bf16)"
            f" {1000 * net_seconds:.2f} ms: {100 * share:.1f} % of a step"
            f" (goal: under 10 %, {'met' if share < 0.1 else 'MISSED'})"
        )
    seconds = {"seconds_of_a_steps_views": view_seconds, "seconds_of_its_net": net_seconds}
    return {"views_per_second": found, **seconds, "share_of_a_step": share}


if __name__ == "__main__":
    main()
