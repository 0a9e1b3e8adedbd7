"""How time and memory grow: with images of a step, views, classes, images of the data set; each with its fitted exponent.

    python benchmarks/scaling.py [--only images views processes classes pairs bias augment pixels resident order stream
                                 propagation] [--net small_cnn] [--rounds 5] [--seconds 1] [--device cpu] [--threads 1]
                                 [--plot PNG] [--json FILE]

- images, views: a step of MUSCLE + FixMatch on digits at 32 x 32, over the images that it takes, and over V.
- processes: a step by 1, 2, ... processes (torchrun), each with as many images, or all together with as many.
- classes, pairs: the mutual information's forward and backward pass over C (512 images, V = 3) and over images (C = 100).
- bias: what the mutual information of two independent one-hot predictions, which is 0, is estimated at from so many images.
- augment, pixels: RandAugment's views of so many images of 32 x 32, and of 32 images of so many pixels.
- resident: memory of a set of 32 x 32 uint8 images held for training, over their number N.
- order: the order of a pass over N images, and a batch of 64 + 64 images of 8 x 8 pixels out of so many.
- stream: images of 3 x 224 x 224 from a mapped file, as with ``data_on host``, per second; from the file cache.
- propagation: label propagation over N points (``propagation.py --sizes`` has more).

Times are in one process, the sizes in turns; shown are medians (lowest to highest over rounds). Memory is taken in a process
of its own for each size. An exponent is the slope of ln y over ln x, with its standard error; "last" is that of the two
largest sizes alone, where what does not grow weighs least.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clock import StepClock, images_forwarded
from common import (
    add_common_options,
    as_train_does,
    exponent,
    hosted,
    spread,
    wait_for,
    write_figures,
)
from process_memory import forget_peak, memory
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from muscle_plugin.data.augment import AUGMENTATIONS
from muscle_plugin.data.batches import Batches
from muscle_plugin.data.loader import StreamedImages
from muscle_plugin.data.sampler import IndexStream
from muscle_plugin.data.source import Source
from muscle_plugin.data.splits import draw_split
from muscle_plugin.data.views import LABELLED, UNLABELLED
from muscle_plugin.losses import MutualInformationLoss, mutual_information
from muscle_plugin.usb.calls import usb_calls_on

console = Console(width=130, highlight=False)
ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = ("x_lb", "y_lb", "x_ulb_w", "x_ulb_s")
FACTORS = {"ms": 1e3, "MB": 1e-6, "nats": 1.0}  # from seconds, bytes, nats
NOT_FITTED = ("stream", "bias")
BYTES_PER_ENTRY = 32  # of the joint, at the height of a backward pass, with room to spare


# ------------------------------------------------------------------------------------------------------------- curves


def in_turns(jobs: dict[int, Callable[[], float]], rounds: int) -> dict[int, list[float]]:
    """Seconds that each job reports, round by round."""
    found: dict[int, list[float]] = {x: [] for x in jobs}
    for _ in range(rounds):
        for x, job in jobs.items():
            found[x].append(job())
    return found


def repeated(function: Callable[[], Any], options: argparse.Namespace) -> Callable[[], float]:
    """Calls the function for its share of the seconds; seconds per call."""
    device = torch.device(options.device)
    function()  # warm

    def job() -> float:
        wait_for(device)
        calls, start = 0, time.perf_counter()
        while calls == 0 or time.perf_counter() - start < options.seconds:
            function()
            calls += 1
        wait_for(device)
        return (time.perf_counter() - start) / calls

    return job


def steps(sizes: Sequence[int], options: argparse.Namespace, settings: Callable[[int], dict[str, Any]]) -> Any:
    """Seconds of a step of MUSCLE + FixMatch by size, and the images that it forwards."""
    device = torch.device(options.device)
    digits = Namespace(data_dir=".", device=options.device, precision="fp32", batch=0, fastest=False)
    jobs: dict[int, Callable[[], float]] = {}
    forwarded = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), usb_calls_on(device):
        warnings.simplefilter("ignore")
        for n in sizes:
            same = {"dataset": "digits", "img_size": 32, "num_labels": 10, "hard_augment": "digits_hard"}
            made = hosted("muscle_fixmatch", options.net, digits, folder, **same, **settings(n))
            forwarded[n] = sum(images_forwarded(made))
            clock = StepClock(made, device)
            jobs[n] = lambda clock=clock: clock.run(options.seconds)  # type: ignore[misc]
        return in_turns(jobs, options.rounds), forwarded


def over_images(options: argparse.Namespace) -> list[dict[str, Any]]:
    found, forwarded = steps(options.batches, options, lambda n: {"batch_size": n // 2, "uratio": 1})
    return [
        curve(
            "images", "a step, V = 3", "images of a step", found, notes={n: f"{forwarded[n]} forwarded" for n in found}
        )
    ]


def over_views(options: argparse.Namespace) -> list[dict[str, Any]]:
    b = options.batch
    found, forwarded = steps(options.views, options, lambda v: {"batch_size": b, "uratio": 1, "hard_views": v})
    notes = {v: f"{forwarded[v]} forwarded" for v in found}
    by_images = {forwarded[v]: seconds for v, seconds in found.items()}
    return [
        curve("views", f"a step, {b} + {b} images", "hard views V", found, notes=notes),
        curve("views", f"a step, {b} + {b} images, V as above", "images forwarded", by_images),
    ]


def seconds_per_step(processes: int, images: int, options: argparse.Namespace) -> float:
    """Of a run of ``train.py`` with so many images a step, by its own log, without its beginning."""
    every = max(1, options.steps // 4)
    with tempfile.TemporaryDirectory() as folder:
        words = {
            "algorithm": "muscle_fixmatch", "dataset": "digits", "img_size": 32, "num_labels": 10, "net": options.net,
            "batch_size": images // 2, "uratio": 1, "num_train_iter": options.steps, "num_eval_iter": options.steps,
            "num_log_iter": every, "num_threads": options.threads, "device": options.device, "use_tensorboard": "false",
            "save_dir": folder, "save_name": "run",
        }  # fmt: skip
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run(
            [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "train.py")]
            + [str(x) for k, v in words.items() for x in (f"--{k}", v)],
            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
        )  # fmt: skip
        if done.returncode:
            sys.exit(done.stderr)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[0], lines[-1]
    return float((last["seconds"] - first["seconds"]) / (last["step"] - first["step"]))


def over_processes(options: argparse.Namespace) -> list[dict[str, Any]]:
    b, most = 2 * options.batch, max(options.processes)
    jobs = {
        "as many images each": {p: b * p for p in options.processes},
        "as many images in all": dict.fromkeys(options.processes, b * most),
    }
    curves = []
    for what, sizes in jobs.items():
        found = in_turns({p: partial(seconds_per_step, p, n, options) for p, n in sizes.items()}, options.rounds)
        notes = {p: f"{n} images a step" for p, n in sizes.items()}
        curves.append(curve("processes", f"a step, V = 3, {what}", "processes", found, notes=notes))
    return curves


def information(n: int, classes: int, device: torch.device) -> Callable[[], None]:
    """A forward and backward pass of the loss."""
    loss = MutualInformationLoss()
    generator = torch.Generator().manual_seed(0)
    weak, hard = (torch.randn(s, generator=generator).to(device) for s in ((n, classes), (3, n, classes)))
    weak.requires_grad_(), hard.requires_grad_()

    def once() -> None:
        weak.grad = hard.grad = None
        loss(weak, hard)[0].backward()

    return once


def over_loss(
    name: str, sizes: Sequence[int], options: argparse.Namespace, shape: Callable[[int], tuple[int, int]]
) -> Any:
    device = torch.device(options.device)
    fitting = [x for x in sizes if BYTES_PER_ENTRY * shape(x)[1] ** 2 < free_bytes(device)]
    for x in set(sizes) - set(fitting):
        console.print(f"{name}: {x:,} left out: not enough memory")
    jobs = {x: repeated(information(*shape(x), device), options) for x in fitting}
    label = {"classes": "classes C", "pairs": "images"}[name]
    seconds = curve(name, "mutual information, forward and backward", label, in_turns(jobs, options.rounds))
    peaks = {x: [own_process("loss", *shape(x), device=options.device)["memory"]] for x in fitting}
    return [seconds, curve(name, "its memory", label, peaks, unit="MB")]


def over_bias(options: argparse.Namespace) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def estimate(n: int, classes: int) -> float:
        p, q = (F.one_hot(torch.randint(classes, (n,), generator=generator), classes).float() for _ in "pq")
        return float(mutual_information(p, q))

    curves = []
    for c in (10, 1000):
        found = in_turns({n: lambda n=n, c=c: estimate(n, c) for n in options.draws}, options.rounds)  # type: ignore[misc]
        # P is symmetric, so that N pairs may fill 2 N classes
        notes = {n: f"{n / c:g} a class; H(z) at most ln min(2 N, C) = {math.log(min(2 * n, c)):.2f}" for n in found}
        what = f"estimated information of independent predictions, C = {c}"
        curves.append(curve("bias", what, "images N", found, "nats", notes))
    return curves


def over_augment(name: str, sizes: Sequence[int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Views of ``sizes`` images, or of images of ``sizes`` pixels a side."""
    device, jobs = torch.device(options.device), {}
    for x in sizes:
        n, side = (x, 32) if name == "augment" else (32, x)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=generator).to(device)

        def views(images: torch.Tensor = images, generator: torch.Generator = generator) -> None:
            AUGMENTATIONS["randaugment"](AUGMENTATIONS["crop_flip"](images, generator), generator).float()

        jobs[x if name == "augment" else x * x] = repeated(views, options)
    found = in_turns(jobs, options.rounds)
    if name == "augment":
        notes = {n: f"{n / statistics.median(t):,.0f} views/s" for n, t in found.items()}
        return [curve(name, "RandAugment's views, 32 x 32", "images", found, notes=notes)]
    notes = {p: f"{p**0.5:.0f} x {p**0.5:.0f}, {32 / statistics.median(t):,.0f} views/s" for p, t in found.items()}
    return [curve(name, "RandAugment's views of 32 images", "pixels of an image", found, notes=notes)]


def random_source(n: int, side: int, channels: int) -> Source:
    images = torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8)
    everything = torch.arange(n)
    return Source(images, everything % 10, everything, everything[:0], tuple("0123456789"))


def batches_of(source: Source, device: torch.device) -> Batches:
    split = draw_split(source, 100, 0)
    return Batches(source, split, 64, 64, PARAMETERS, "fixmatch", "crop_flip", "randaugment", 3, 0, device)


def over_resident(options: argparse.Namespace) -> list[dict[str, Any]]:
    found = {n: own_process("resident", n, 0, device=options.device) for n in options.sizes}
    raw = {n: n * 3 * 32 * 32 for n in found}
    notes = {n: f"{v['memory'] / raw[n]:.2f}x of the uint8 array" for n, v in found.items()}
    peaks = {n: [v["memory"]] for n, v in found.items()}
    return [curve("resident", "a set of 3 x 32 x 32 held", "images N", peaks, unit="MB", notes=notes)]


def over_order(options: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device(options.device)
    made = {n: batches_of(random_source(n, 8, 3), device) for n in options.set_sizes}

    def first(n: int) -> Callable[[], float]:
        def job() -> float:
            stream = IndexStream(n, 64, 0, UNLABELLED)
            start = time.perf_counter()
            stream.batch(0)
            return time.perf_counter() - start

        return job

    starting = in_turns({n: first(n) for n in made}, options.rounds)
    rest = in_turns({n: repeated(lambda b=b: b.batch(1), options) for n, b in made.items()}, options.rounds)  # type: ignore[misc]
    return [
        curve("order", "the order of a pass", "images N", starting),
        curve("order", "a batch within a pass", "images N", rest),
    ]


def over_stream(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Gathering from a mapped file, when asked and in a thread ahead."""
    n, side = options.stream_images, 224
    device, batch = torch.device(options.device), 64
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        stored = np.lib.format.open_memmap(path, "w+", np.uint8, (n, 3, side, side))
        stored[:] = np.random.default_rng(0).integers(0, 256, stored.shape[1:], dtype=np.uint8)
        stored.flush()
        images = torch.from_numpy(np.load(path, mmap_mode="r+"))
        jobs: dict[int, Callable[[], float]] = {}
        for workers in (0, 1):
            everything = {LABELLED: torch.arange(n), UNLABELLED: torch.arange(n)}
            order = {LABELLED: IndexStream(n, 1, 0, LABELLED), UNLABELLED: IndexStream(n, batch - 1, 0, UNLABELLED)}
            stream = StreamedImages(images, everything, order, device, workers)
            count = iter(range(10**9))
            jobs[workers] = repeated(lambda stream=stream, count=count: stream.of_step(next(count)), options)  # type: ignore[misc]
        found = in_turns(jobs, options.rounds)
    notes = {
        w: f"{batch / statistics.median(t):,.0f} images/s, {batch * 3 * side**2 / statistics.median(t) / 1e9:.2f} GB/s"
        for w, t in found.items()
    }
    return [curve("stream", f"{batch} images of 224 x 224 from a mapped file", "workers", found, notes=notes)]


def over_propagation(options: argparse.Namespace) -> list[dict[str, Any]]:
    from propagation import in_own_process

    settings = Namespace(d=128, k=50, classes=[10], neighbours="auto", device=options.device)
    rows = [in_own_process(n, settings) for n in options.points]
    seconds = {r["n"]: [r["total"]] for r in rows}
    return [curve("propagation", "label propagation, d = 128, k = 50, C = 10", "points n", seconds)]


STUDIES: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "images": over_images,
    "views": over_views,
    "processes": over_processes,
    "classes": lambda o: over_loss("classes", o.classes, o, lambda c: (512, c)),
    "pairs": lambda o: over_loss("pairs", o.pairs, o, lambda n: (n, 100)),
    "bias": over_bias,
    "augment": lambda o: over_augment("augment", o.augment, o),
    "pixels": lambda o: over_augment("pixels", o.sides, o),
    "resident": over_resident,
    "order": over_order,
    "stream": over_stream,
    "propagation": over_propagation,
}


# ------------------------------------------------------------------------------------------------------------- memory


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def own_process(what: str, *sizes: int, device: str) -> dict[str, float]:
    """What :func:`measure_memory` finds in a process of its own."""
    command = [sys.executable, __file__, "--measure", what, *map(str, sizes), "--device", device]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: {what} of {sizes}: its process ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(what: str, a: int, b: int, device: torch.device) -> None:
    """Print the bytes that a thing takes at its height beyond what the process had before, as JSON."""
    information(8, 4, device)()  # threads and libraries are up
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        forget_peak()
        before = memory("VmRSS")
    if what == "loss":
        information(a, b, device)()
    else:
        batches_of(random_source(a, 32, 3), device).batch(0)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory("VmHWM")
    print(json.dumps({"memory": peak - before}))


# -------------------------------------------------------------------------------------------------------------- output


def curve(
    study: str,
    what: str,
    over: str,
    found: dict[int, list[float]],
    unit: str = "ms",
    notes: dict[int, str] | None = None,
) -> dict[str, Any]:
    """Values over sizes, with the fitted exponents; given in seconds, bytes or nats."""
    x, y = list(found), [statistics.median(v) for v in found.values()]
    return {
        "study": study, "what": what, "over": over, "unit": unit, "values": {str(k): v for k, v in found.items()},
        "notes": {str(k): v for k, v in (notes or {}).items()}, "exponent": exponent(x, y), "last": exponent(x[-2:], y[-2:]),
    }  # fmt: skip


def show(c: dict[str, Any]) -> None:
    """A table of one curve, and its exponents."""
    factor = FACTORS[c["unit"]]
    console.print(f"{c['what']}, {c['unit']}")
    table = Table()
    for column in (c["over"], c["unit"], ""):
        table.add_column(column, justify="right")
    for x, values in c["values"].items():
        scaled = [factor * v for v in values]
        shown = spread(scaled, "", 2) if len(values) > 1 else f"{scaled[0]:,.1f}"
        table.add_row(f"{int(x):,}", shown, c["notes"].get(x, ""))
    console.print(table)
    if c["exponent"] is not None and c["study"] not in NOT_FITTED:
        slope, error = c["exponent"]
        known = f" ± {error:.2f}" if error is not None else ""
        console.print(f"grows as ({c['over']})^{slope:.2f}{known}; last {c['last'][0]:.2f}")
    console.print()


def plot(curves: list[dict[str, Any]], path: str) -> None:
    """Every curve on axes of its own, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = [c for c in curves if c["exponent"] is not None and c["study"] not in NOT_FITTED]
    columns = min(4, len(drawn))
    rows = -(-len(drawn) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4 * columns, 3.2 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(drawn) :]:
        axis.set_visible(False)
    for axis, c in zip(axes.flat, drawn, strict=False):
        factor = FACTORS[c["unit"]]
        x = [int(k) for k in c["values"]]
        low, middle, high = ([factor * f(v) for v in c["values"].values()] for f in (min, statistics.median, max))
        axis.loglog(x, middle, marker="o")
        axis.fill_between(x, low, high, alpha=0.2)
        axis.set(xlabel=c["over"], ylabel=c["unit"])
        axis.set_title(f"{c['what']}\nexponent {c['exponent'][0]:.2f}", fontsize=9)
    figure.savefig(path, dpi=110)
    console.print(f"written: {path}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=list(STUDIES), default=list(STUDIES), metavar="STUDY", help="some of them [all]")
    add("--net", default="small_cnn")
    add("--batches", type=int, nargs="+", default=[32, 64, 128, 256], help="images: images of a step")
    add("--batch", type=int, default=16, help="views: labelled images, and as many unlabelled ones [%(default)s]")
    add("--views", type=int, nargs="+", default=[1, 2, 4, 8], help="views: V")
    add("--classes", type=int, nargs="+", default=[10, 100, 1000, 10_000], help="classes: C")
    add("--pairs", type=int, nargs="+", default=[128, 512, 2048, 8192], help="pairs: images")
    add("--draws", type=int, nargs="+", default=[128, 1024, 8192, 65_536], help="bias: images")
    add("--augment", type=int, nargs="+", default=[32, 128, 512, 2048], help="augment: images")
    add("--sides", type=int, nargs="+", default=[32, 64, 128, 224], help="pixels: sides of the images")
    add("--sizes", type=int, nargs="+", default=[10_000, 30_000, 100_000], help="resident: N")
    add("--set_sizes", type=int, nargs="+", default=[10_000, 100_000, 1_280_000], help="order: N")
    add("--stream_images", type=int, default=1000, help="stream: images of the file, 0.15 MB each [%(default)s]")
    add("--points", type=int, nargs="+", default=[3000, 10_000, 30_000], help="propagation: n")
    add("--processes", type=int, nargs="+", default=[1, 2], help="processes: how many")
    add("--steps", type=int, default=60, help="processes: steps of a run [%(default)s]")
    add("--rounds", type=int, default=5, help="turns of each size [%(default)s]")
    add("--seconds", type=float, default=1.0, help="of each turn [%(default)s]")
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--plot", metavar="PNG", help="draw the curves there")
    add("--measure", nargs=3, help=argparse.SUPPRESS)
    add_common_options(add)
    options = parser.parse_args(arguments)
    as_train_does(options)
    if options.measure:
        what, a, b = options.measure
        measure_memory(what, int(a), int(b), torch.device(options.device))
        return
    curves: list[dict[str, Any]] = []
    for study in options.only:
        made = STUDIES[study](options)
        for c in made:
            show(c)
        curves += made
    console.print(f"{torch.get_num_threads()} CPU thread(s), {options.device}, load average {os.getloadavg()[0]:.1f}")
    if options.plot:
        plot(curves, options.plot)
    write_figures(options, curves=curves)


if __name__ == "__main__":
    main()
