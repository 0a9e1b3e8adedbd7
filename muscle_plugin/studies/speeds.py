"""What a step of training costs: the images that it forwards, counted; the time it takes here, measured; the arithmetic of its
net, counted. All on images made up for the purpose, so that no data set is needed: the time does not depend on what is in them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, ValidationError

from muscle_plugin.errors import SpeedsError
from muscle_plugin.files import read_json, write_json
from muscle_plugin.registry.names import DATASETS, NETS
from muscle_plugin.settings.resolve import Resolved, load_settings
from muscle_plugin.version import __version__

#: Images by which the speed of a forward pass is measured.
FORWARD_IMAGES = 64
#: A step is never timed with fewer labelled images.
FEWEST = 4


@dataclass(frozen=True)
class StepKind:
    """What the time of a step depends on, but for the number of its images: net, size of the images in pixels, algorithm, and
    stage (1 or 2) where the algorithm has two."""

    net: str
    img_size: int
    algorithm: str
    stage: int | None = None

    @property
    def images_of(self) -> str:
        """The net with its images: ``cnn13@32``."""
        return f"{self.net}@{self.img_size}"

    def __str__(self) -> str:
        return f"{self.images_of} {self.algorithm}" + (f" stage {self.stage}" if self.stage else "")


@dataclass(frozen=True)
class Images:
    """Images that a step forwards with gradient (which go backward too), and without."""

    trained: int
    forwarded: int

    @property
    def all(self) -> int:
        """Both."""
        return self.trained + self.forwarded


# --------------------------------------------------------------------------------------------------------------- alike

#: Settings on which neither the time of a step depends nor the images that it forwards.
_INDIFFERENT = frozenset([
    "seed", "split_seed", "num_labels", "lb_imb_ratio", "split_file", "sequestered", "epoch", "num_train_iter",
    "num_warmup_iter", "num_eval_iter", "num_log_iter", "lr", "lr_schedule", "lr_zero_at", "momentum", "weight_decay",
    "decay_all", "save_dir", "save_name", "resume", "overwrite", "load_path", "cache_dir", "use_tensorboard",
    "num_save_iter", "init_from", "use_pretrain", "pretrain_path",
])  # fmt: skip
#: The smallest net, by which the images of a step are counted: their number does not depend on these settings.
_PLAIN: dict[str, Any] = {
    "net": "small_cnn", "net_from_name": False, "img_size": 16, "net_double_head": False, "net_dropout": None,
    "net_noise": None, "net_width": None, "net_l2": False, "device": "cpu", "precision": "fp32", "gpu": None, "amp": None,
    "compile": "no", "optim": "SGD", "layer_decay": 1.0,
}  # fmt: skip
#: Nor on these: batches are given by the number of their images, stages by their number.
_OF_THE_IMAGES = frozenset([
    "dataset", "data_dir", "num_classes", "weak_augment", "hard_augment", "hard_ops", "labels_csv", "ratio", "uratio",
    "lp_start",
])  # fmt: skip


def alike(resolved: Resolved, in_images_alone: bool = False) -> str:
    """Runs of which this is the same have steps that take the same time.

    Args:
        in_images_alone: steps that forward as many images, whatever these take.
    """
    left_out = _INDIFFERENT | (_OF_THE_IMAGES | _PLAIN.keys() if in_images_alone else frozenset())
    settings = resolved.as_dict()
    if "mi_weight" in settings:  # at 0 nothing is forwarded for it
        settings["mi_weight"] = settings["mi_weight"] > 0
    if settings["num_labels"] is None and not in_images_alone:
        left_out -= {"split_file"}  # it, or the data, says how many are labelled
    return json.dumps({k: v for k, v in settings.items() if k not in left_out}, sort_keys=True)


# ------------------------------------------------------------------------------------------------------------- on file


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_Positive = Field(gt=0)


class StepSpeed(_Strict):
    """A timed step: images with gradient and without, mean seconds over so many steps."""

    trained: PositiveInt
    forwarded: int = Field(ge=0)
    seconds: FiniteFloat = _Positive
    steps: PositiveInt

    @property
    def images_per_second(self) -> float:
        """Images of both kinds."""
        return (self.trained + self.forwarded) / self.seconds


class Speeds(_Strict):
    """What ``cost --measure`` found on a machine.

    Attributes:
        machine: processor or GPU, versions, precision, load; for the reader.
        at_once: runs at a time: cores, or GPUs.
        steps: ``str(StepKind)`` -> its time.
        forward: net with its images -> images per second in evaluation mode, without gradient.
        propagation: :func:`propagation_key` -> seconds of one diffusion of labels, features given.
    """

    format: int = Field(ge=1, le=1)
    machine: dict[str, Any]
    at_once: PositiveInt
    steps: dict[str, StepSpeed]
    forward: dict[str, FiniteFloat]
    propagation: dict[str, FiniteFloat]

    def write(self, path: Path) -> None:
        """As JSON; raises OSError."""
        write_json(path, self.model_dump())


def read_speeds(path: Path) -> Speeds:
    """What :meth:`Speeds.write` wrote.

    Raises:
        SpeedsError: the file cannot be read, or is not that.
    """
    try:
        found = Speeds.model_validate(read_json(path))
    except OSError as e:
        raise SpeedsError(f"{path}: cannot be read: {e.strerror}") from None
    except ValidationError as e:
        fault = e.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise SpeedsError(f"{path}: not a file of speeds: {where}: {fault['msg']}") from None
    except ValueError as e:
        raise SpeedsError(f"{path}: not a file of speeds: {str(e).splitlines()[0]}") from None
    rates = {f"{n}.{k}": v for n in ("forward", "propagation") for k, v in getattr(found, n).items()}
    if wrong := [k for k, v in rates.items() if v <= 0]:
        raise SpeedsError(f"{path}: not a file of speeds: {wrong[0]}: must be above 0")
    return found


def propagation_key(points: int, classes: int, k: int) -> str:
    """The name of a diffusion of labels in a file of speeds."""
    return f"{points} points, {classes} classes, k {k}"


# ---------------------------------------------------------------------------------------------------------- stand-ins


def stand_in(settings: Any, per_group: int = 16) -> Any:
    """A data set of random images, of the shape and the classes of that which settings name, with ``per_group`` training
    images of each class or subclass and one test image of each."""
    import torch

    from muscle_plugin.data.sources import Source

    info = DATASETS[settings.dataset]
    classes = info.num_classes or settings.num_classes or 10
    fine = torch.arange(classes * info.subclasses).repeat(per_group + 1)
    size = (len(fine), info.channels, settings.img_size, settings.img_size)
    images = torch.randint(256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    train = len(fine) - classes * info.subclasses
    return Source(
        images, fine // info.subclasses, torch.arange(train), torch.arange(train, len(fine)),
        tuple(map(str, range(classes))), fine if info.subclasses > 1 else None,
        tuple(map(str, range(classes * info.subclasses))) if info.subclasses > 1 else (),
    )  # fmt: skip


@contextlib.contextmanager
def _built(resolved: Resolved, stage: int | None, **changes: Any) -> Iterator[Any]:
    """The algorithm of a run on a stand-in for its data, with other settings; nothing is left of it on disk."""
    import torch

    from muscle_plugin.runs.train import build

    keep = {k: v for k, v in resolved.as_dict().items() if k not in _BY_ITSELF}
    info = DATASETS[resolved.settings.dataset]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        labels = (info.num_classes or 10) * (info.subclasses - (resolved.settings.sequestered or 0))
        whole = {} if stage is None else {"lp_start": 1.0 if stage == 1 else 0.0}
        fixed = {
            "save_dir": folder, "use_tensorboard": False, "num_labels": labels, "epoch": 1, "num_train_iter": 10**6,
            "num_eval_iter": 10**6, "num_warmup_iter": 0,
        }  # fmt: skip
        new = load_settings(None, **{**keep, **fixed, **whole, **changes})
        if new.settings.num_threads:
            torch.set_num_threads(new.settings.num_threads)
        yield build(new, source=stand_in(new.settings))


#: Settings that have no part in the time of a step, or would ask for files.
_BY_ITSELF = {
    "total_batch", "ratio", "uratio", "num_labels", "save_dir", "save_name", "split_file", "lb_imb_ratio", "init_from",
    "use_pretrain", "pretrain_path", "resume", "load_path", "overwrite", "data_dir", "cache_dir", "labels_csv", "lp_start",
}  # fmt: skip


def _batch(settings: Any, share: float = 1.0) -> dict[str, Any]:
    """A share of the batch of settings, in its proportions."""
    labelled, unlabelled = settings.batch_size, settings.total_batch - settings.batch_size
    fewer = min(labelled, max(FEWEST, round(labelled * share)))
    return {"batch_size": fewer, "ratio": max(1, round(fewer * unlabelled / labelled)) / fewer}


# ------------------------------------------------------------------------------------------------------------- counted


def count_images(resolved: Resolved, stage: int | None) -> Images:
    """Images that a step forwards, counted on a step of the algorithm over the smallest net (no view depends on the net)."""
    from muscle_plugin.studies.clock import images_forwarded

    with _built(resolved, stage, **_PLAIN, **_batch(resolved.settings)) as algorithm:
        return Images(*images_forwarded(algorithm))


def flops_per_image(resolved: Resolved) -> tuple[float, float]:
    """Floating-point operations (a multiply-add is two) of one image through a run's net: forward; forward and backward.

    Counted by ``torch.utils.flop_counter``: convolutions, matrix products and attention, which is less than all.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from muscle_plugin.nets.build import builder_of

    s, n = resolved.settings, 2
    info = DATASETS[s.dataset]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = builder_of(s)(num_classes=info.num_classes or 10)
    channels = info.channels if s.net in NETS else 3
    images = torch.zeros(n, channels, s.img_size, s.img_size)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        net(images)
    with FlopCounterMode(display=False) as both:
        net(images)["logits"].sum().backward()
    return forward.get_total_flops() / n, both.get_total_flops() / n


# ------------------------------------------------------------------------------------------------------------ measured


def measure(
    kinds: Mapping[StepKind, tuple[Resolved, Images]],
    diffusions: Mapping[tuple[int, int, int], StepKind],
    seconds: float,
    longest: float,
    say: Callable[[str], None],
    jobs: int | None = None,
) -> Speeds:
    """Time steps here. On a CPU with one thread a run, CPU time is taken: what a core of its own would need, whatever else
    the machine does (other work still costs cache and memory bandwidth).

    Args:
        kinds: steps, each with a run that has it and the images of the run's step.
        diffusions: (points, classes, k) of label propagation, each with a step of the net whose features it is of.
        seconds: for which a step is repeated, after one that is not counted.
        longest: seconds that a step may take; one that would take more is timed with a share of its images.
        say: told of every step.
        jobs: runs at a time; None: as many as there are GPUs, or cores.

    Raises:
        DeviceError, DataError, ValueError: something cannot be built.
    """
    import torch

    from muscle_plugin.memory import keep_freed_memory
    from muscle_plugin.studies.clock import StepClock, images_forwarded
    from muscle_plugin.studies.sweep import _cores

    keep_freed_memory()
    steps: dict[str, StepSpeed] = {}
    forward: dict[str, float] = {}
    width: dict[str, int] = {}
    device, precision, now = torch.device("cpu"), "fp32", time.perf_counter
    for kind, (resolved, images) in kinds.items():
        say(str(kind))
        if kind.images_of not in forward:
            with _built(resolved, kind.stage, **_batch(resolved.settings, 0.0)) as algorithm:
                device, precision = algorithm.device, algorithm.precision
                if device.type == "cpu" and torch.get_num_threads() == 1:
                    now = time.process_time
                forward[kind.images_of], width[kind.images_of] = _forward_speed(algorithm, seconds, now)
        expected = (3 * images.trained + images.forwarded) / forward[kind.images_of]
        share = min(1.0, longest / expected)
        with _built(resolved, kind.stage, **_batch(resolved.settings, share)) as algorithm:
            timed = images if share == 1 else Images(*images_forwarded(algorithm))
            clock = StepClock(algorithm, algorithm.device, now)
            per_step = clock.run(seconds)
            steps[str(kind)] = StepSpeed(
                trained=timed.trained, forwarded=timed.forwarded, seconds=per_step, steps=clock.steps
            )
    propagation = {}
    for (points, classes, k), kind in diffusions.items():
        say(propagation_key(points, classes, k))
        propagation[propagation_key(points, classes, k)] = _diffusion(
            points, width[kind.images_of], classes, k, device, now
        )
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    machine = {
        "processor": _processor(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if gpus else None, "precision": precision,
        "time": "wall clock" if now is time.perf_counter else "CPU time",
        "muscle_plugin": __version__, "torch": torch.__version__, "python": platform.python_version(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    return Speeds(
        format=1,
        machine=machine,
        at_once=jobs or gpus or _cores(),
        steps=steps,
        forward=forward,
        propagation=propagation,
    )


def _forward_speed(algorithm: Any, seconds: float, now: Callable[[], float]) -> tuple[float, int]:
    """Images per second, weakly augmented, through the net without gradient; and features per image."""
    import torch

    members = algorithm.split.unlabelled[:FORWARD_IMAGES]

    def forward() -> Any:
        out = algorithm.batches.features(algorithm.model, members, 0, FORWARD_IMAGES, algorithm.amp_cm)
        if algorithm.device.type == "cuda":
            torch.cuda.synchronize(algorithm.device)
        return out

    features = forward()
    done, start = 0, now()
    while done == 0 or now() - start < seconds:
        forward()
        done += 1
    return done * len(members) / (now() - start), features.shape[1]


def _diffusion(points: int, width: int, classes: int, k: int, device: Any, now: Callable[[], float]) -> float:
    """Seconds of one label propagation over random points in clusters, five labels a class."""
    import torch

    from muscle_plugin.propagation import propagate

    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(points) % classes
    centres = torch.randn(classes, width, generator=generator)
    features = (centres[truth] + torch.randn(points, width, generator=generator)).to(device)
    labels = torch.where(torch.arange(points) < 5 * classes, truth, -1).to(device)
    start = now()
    propagate(features, labels, classes, k=k)
    return now() - start


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
