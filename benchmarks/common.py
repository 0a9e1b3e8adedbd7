"""What the benchmarks share: the loops that are timed, the parts of a step, ratios with their spread, fitted exponents,
figures on file."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import io
import itertools
import logging
import os
import pickle
import platform
import shutil
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch.nn import functional as F
from torchvision.datasets import cifar as torchvision_cifar

from muscle_plugin.device import deterministic_kernels, keep_freed_memory
from muscle_plugin.files import write_json
from muscle_plugin.nets.build import net_builder
from muscle_plugin.runs.build import build
from muscle_plugin.runs.environment import git_revision
from muscle_plugin.settings.resolve import load_settings
from muscle_plugin.usb.calls import usb_calls_on
from muscle_plugin.version import __version__

MADE = "made"  # in place of a folder of data
FOREVER = 10**5  # steps; stock's sampler draws the indices of all of them beforehand
VIEWS, FORWARD, BACKWARD, OPTIMISER, EMA, LOGGING, REST = PARTS = (
    "views", "forward, loss", "backward", "optimiser, schedule", "EMA", "logging", "rest",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ options


def at_least_one(text: str) -> int:
    """For ``type`` of an option."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def add_step_options(add: Callable[..., Any], timed: bool = True) -> None:
    """Options of a benchmark of steps on CIFAR-10, which takes turns if it is ``timed``."""
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--precision", default="fp32", choices=["fp32", "bf16", "fp16"], help="stock USB: fp32, or its amp (fp16)")
    add("--data_dir", default="data", help=f"folder that holds cifar-10-batches-py, or '{MADE}': random [%(default)s]")
    add(
        "--batch",
        type=at_least_one,
        default=64,
        help="labelled images of a step, and as many unlabelled ones [%(default)s]",
    )
    add("--fastest", action="store_true", help="on a GPU: --deterministic false, for all that are compared")
    if timed:
        add("--seconds", type=float, default=4.0, help="of each turn [%(default)s]")
        add("--rounds", type=at_least_one, default=5, help="turns of each [%(default)s]")
    add_common_options(add)


def add_common_options(add: Callable[..., Any]) -> None:
    """Options of every benchmark."""
    add("--threads", type=at_least_one, default=1, help="CPU threads [%(default)s]")
    add("--json", metavar="FILE", help="write the figures there")


def as_train_does(options: argparse.Namespace) -> None:
    """What ``train.py`` sets for its process, for all that are compared here: threads, and memory that is kept."""
    torch.set_num_threads(options.threads)
    keep_freed_memory()


@contextlib.contextmanager
def kernels_of(options: argparse.Namespace) -> Iterator[None]:
    """Within it all that are compared compute by the kernels that ``--deterministic`` gives the host."""
    device = torch.device(options.device)
    with usb_calls_on(device), deterministic_kernels(device, not options.fastest, lambda _: None):
        yield


def need_cifar(options: argparse.Namespace) -> None:
    """Exit, with a line that says why, where CIFAR-10 is not; let ``options.images`` say what images these are.

    In place of ``--data_dir made`` comes a folder of random images, removed when the process ends.
    """
    options.images = "CIFAR-10"
    if options.data_dir == MADE:
        options.images, options.data_dir = "made-up images like CIFAR-10's", made_cifar()
    elif not (Path(options.data_dir) / "cifar-10-batches-py").is_dir():
        sys.exit(
            f"error: {options.data_dir}/cifar-10-batches-py: no such folder; --data_dir names the one that holds it, or"
            f" '{MADE}' for random images"
        )


def made_cifar(images: int = 10_000) -> str:
    """A temporary folder with random images in the format of torchvision's CIFAR-10, whose checksums are not asked for.

    Args:
        images: in each of the six files.
    """
    folder = Path(tempfile.mkdtemp(prefix="made-cifar-10-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    files = folder / "cifar-10-batches-py"
    files.mkdir()
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        data = {"data": rng.integers(0, 256, (images, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(images)]}
        (files / name).write_bytes(pickle.dumps(data, protocol=4))
    (files / "batches.meta").write_bytes(pickle.dumps({"label_names": list("0123456789")}, protocol=4))
    torchvision_cifar.check_integrity = lambda *_: True
    return str(folder)


# -------------------------------------------------------------------------------------------------------------- loops


def hosted(algorithm: str, net: str, options: argparse.Namespace, folder: str, **settings: Any) -> Any:
    """This package's algorithm object, on CIFAR-10 unless settings say otherwise."""
    given = {
        "algorithm": algorithm, "dataset": "cifar10", "net": net, "num_labels": 250, "batch_size": options.batch,
        "uratio": 1, "num_train_iter": FOREVER, "num_eval_iter": FOREVER, "num_log_iter": 50,
        "hard_augment": "randaugment_usb", "data_dir": options.data_dir, "save_dir": folder, "device": options.device,
        "precision": options.precision, "deterministic": not options.fastest, "include_lb_to_ulb": True,
    }  # fmt: skip
    return build(load_settings(None, **{**given, **settings}))


def stock(algorithm: str, net: str, options: argparse.Namespace, folder: str) -> Any:
    """USB's algorithm object on CIFAR-10, as its ``train.py`` builds one."""
    import semilearn.datasets.utils as utils

    utils.base_dir = folder  # USB writes its index files into site-packages
    (Path(folder) / "cifar10").symlink_to(Path(options.data_dir).resolve())
    return build_stock(
        None,
        {
            "algorithm": algorithm, "dataset": "cifar10", "net": net, "num_labels": 250, "num_classes": 10,
            "batch_size": options.batch, "uratio": 1, "num_train_iter": FOREVER, "epoch": 1, "num_eval_iter": FOREVER,
            "num_log_iter": 50, "eval_batch_size": 256, "data_dir": folder, "save_dir": folder,
            "num_workers": options.workers, "amp": options.precision != "fp32",
            "gpu": 0 if options.device == "cuda" else None,
        },
    )  # fmt: skip


def build_stock(algorithm_class: Any, settings: dict[str, Any], channels: int = 3) -> Any:
    """USB's algorithm object from USB's settings.

    Args:
        algorithm_class: None for the one that USB registers.
        channels: of the images, for nets of this package.
    """
    import semilearn
    from semilearn.core.utils import send_model_cuda

    with contextlib.redirect_stdout(io.StringIO()):
        args: Namespace = semilearn.get_config(settings)
        args.distributed, args.world_size, args.rank = False, 1, 0
        builder = net_builder(args.net, False, channels, args.img_size, {})
        make = semilearn.get_algorithm if algorithm_class is None else algorithm_class
        made = make(args, builder, None, logging.Logger("stock"))
        if args.gpu is not None:
            made.model = send_model_cuda(args, made.model)
            made.ema_model = send_model_cuda(args, made.ema_model, clip_batch=False)
    return made


class Timeline:
    """Charges every moment of a training step to a part, the one entered last; from outside, while it is on.

    On a GPU the device is waited for wherever a part ends: parts are true, but the step is longer than one not watched.

    Attributes:
        steps: seconds by part, step by step since it was switched on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stop()

    def start(self) -> None:
        """Watch, beginning anew."""
        self.on, self.steps = True, []
        self._part, self._now, self._since = REST, defaultdict(float), time.perf_counter()

    def stop(self) -> None:
        self.on = False
        self.steps: list[dict[str, float]] = []
        self._part, self._since = REST, 0.0
        self._now: dict[str, float] = {}

    def enter(self, part: str) -> str:
        """From now on it is ``part``; returns what it was."""
        if not self.on:
            return part
        wait_for(self._device)
        now = time.perf_counter()
        self._now[self._part] += now - self._since
        before, self._part, self._since = self._part, part, now
        return before

    def end_step(self) -> None:
        if self.on:
            self.enter(self._part)
            self.steps.append(self._now)
            self._now = defaultdict(float)

    def part(self, owner: Any, name: str, part: str) -> None:
        """Let calls of a method of ``owner`` be this part."""
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            before = self.enter(part)
            try:
                return inner(*args, **kwargs)
            finally:
                self.enter(before)

        setattr(owner, name, timed)

    def watch(self, algorithm: Any) -> None:
        """The parts of a hosted algorithm's steps. To be called before a :class:`StepClock` is made of it."""
        self.part(algorithm.batches, "batch", VIEWS)
        self.part(algorithm, "train_step", FORWARD)
        hooks = algorithm.hooks_dict
        for name, part in (("ParamUpdateHook", BACKWARD), ("EMAHook", EMA), ("LoggingHook", LOGGING)):
            self.part(hooks[name], "after_train_step", part)
        algorithm.optimizer.register_step_pre_hook(lambda *_: self.enter(OPTIMISER) and None)  # the hook's second half
        call_hook = algorithm.call_hook

        def hook(name: str, *args: Any, **kwargs: Any) -> Any:
            out = call_hook(name, *args, **kwargs)
            if name == "after_train_step":
                self.end_step()
            return out

        algorithm.call_hook = hook

    def means(self, skip: int = 1) -> dict[str, float]:
        """Seconds per step by part, without the first ``skip`` steps."""
        steps = self.steps[skip:]
        return {p: statistics.mean(s.get(p, 0.0) for s in steps) for p in PARTS}


def bare(
    net: str,
    images: tuple[int, int],
    options: argparse.Namespace,
    timeline: Timeline | None = None,
    batches: Any = None,
) -> Callable[[float], float]:
    """A plain loop; the function trains for some seconds and returns seconds per step.

    Args:
        images: of a step, with gradient and without.
        timeline: told of forward, backward and optimiser.
        batches: makes a batch of views in each step, which is not used.
    """
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
    watch = timeline or Timeline(device)

    numbers = itertools.count()

    def step() -> None:
        if batches is not None:
            batches.batch(next(numbers))
        watch.enter(FORWARD)
        with cast:
            if len(without):
                with torch.no_grad():
                    model(without)
            logits = model(with_gradient)["logits"]
        loss = F.cross_entropy(logits.float(), labels)
        watch.enter(BACKWARD)
        loss.backward()
        watch.enter(OPTIMISER)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.enter(REST)
        wait_for(device)
        watch.end_step()

    def run(seconds: float) -> float:
        step()
        done, start = 0, time.perf_counter()
        while done == 0 or time.perf_counter() - start < seconds:
            step()
            done += 1
        return (time.perf_counter() - start) / done

    return run


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------------------------------ figures


def spread(values: Sequence[float], unit: str = "", digits: int = 2) -> str:
    """Median (lowest to highest)."""
    low, middle, high = (f"{v:.{digits}f}" for v in (min(values), statistics.median(values), max(values)))
    return f"{middle}{unit} ({low} to {high})"


def ratios(a: Iterable[float], b: Iterable[float]) -> list[float]:
    """a over b, round by round."""
    return [x / y for x, y in zip(a, b, strict=True)]


def exponent(x: Sequence[float], y: Sequence[float]) -> tuple[float, float | None] | None:
    """(slope, its standard error) of ln y over ln x; two points have no error, fewer no slope."""
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if a > 0 and b > 0]
    if len({a for a, _ in pairs}) < 2:
        return None
    found = stats.linregress(*np.log(pairs).T)
    return float(found.slope), float(found.stderr) if len(pairs) > 2 else None


def write_figures(options: argparse.Namespace, **figures: Any) -> None:
    """Write them as JSON, with the options and the machine, where ``--json`` says."""
    if not options.json:
        return
    gpu = torch.cuda.get_device_name() if getattr(options, "device", "cpu") == "cuda" else None
    about = {
        "benchmark": Path(sys.argv[0]).name,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "json"},
        "muscle_plugin": __version__, "git_revision": git_revision(), "torch": torch.__version__,
        "python": platform.python_version(), "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(), "gpu": gpu, "load_average": os.getloadavg()[0],
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    write_json(Path(options.json), about | figures)
