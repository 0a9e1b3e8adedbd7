"""Time the training steps of an algorithm object, this package's or USB's, from outside, and count their images."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
from muscle_plugin.data.sources import Source

from muscle_plugin.registry.names import DATASETS


class _Enough(Exception):
    """The time is over."""


class StepClock:
    """Lets an algorithm train for a while, without evaluation, and times its steps.

    ``algorithm.train()`` is entered anew each time and left after a step by an exception, before anything is saved: use an
    algorithm for this alone.

    Args:
        algorithm: with ``train``, ``call_hook``, ``loader_dict`` and, on a GPU, ``device`` or ``gpu``.
        device: a ``torch.device``; steps on a GPU are waited for.
        now: tells the time, in seconds.
    """

    def __init__(self, algorithm: Any, device: Any, now: Callable[[], float] = time.perf_counter) -> None:
        self._algorithm, self._device, self._now = algorithm, device, now
        self._call_hook = algorithm.call_hook
        algorithm.call_hook = self._hook
        algorithm.loader_dict["eval"] = ()
        self._begin(0.0, 0)

    def _begin(self, seconds: float, skip: int) -> None:
        self.seconds, self.steps = 0.0, -skip
        self._limit, self._since = seconds, 0.0

    def run(self, seconds: float, skip: int = 1) -> float:
        """Train for at least so many seconds and one step; returns seconds per step.

        Args:
            skip: steps at the beginning that are not counted, at least 1.
        """
        self._begin(seconds, skip)
        with contextlib.suppress(_Enough):
            self._algorithm.train()
        return self.seconds / max(self.steps, 1)

    def _hook(self, name: str, *args: Any, **kwargs: Any) -> Any:
        out = self._call_hook(name, *args, **kwargs)
        if name == "after_train_step":
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            now = self._now()
            self.steps += 1
            if self.steps <= 0:
                self._since = now
            self.seconds = now - self._since
            if self.steps >= 1 and self.seconds >= self._limit:
                raise _Enough
        return out


def images_forwarded(algorithm: Any) -> tuple[int, int]:
    """Images that a step forwards with gradient, and without."""
    counts = [0, 0]

    def count(_: Any, args: tuple[Any, ...], output: Any) -> None:  # before MUSCLE's tap cuts its riders off
        if isinstance(output, dict) or (args and args[0].dim() == 4):  # not a classifier's call on features
            counts[0 if torch.is_grad_enabled() else 1] += len(output["logits"] if isinstance(output, dict) else output)

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


def stand_in(settings: Any, per_group: int = 16) -> Source:
    """Random images of the shape and classes of the data set that settings name: ``per_group`` training images of each
    class or subclass and one test image of each."""
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
