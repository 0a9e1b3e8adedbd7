"""Times the training steps of an algorithm object, this package's or USB's, from outside."""

from __future__ import annotations

import contextlib
import time
from typing import Any


class _Enough(Exception):
    """The time is over."""


class StepClock:
    """Lets an algorithm train for a while, without evaluation, and times its steps.

    ``algorithm.train()`` is entered anew each time and left after a step by an exception, before anything is saved: use an
    algorithm for this alone.

    Args:
        algorithm: with ``train``, ``call_hook``, ``loader_dict`` and, on a GPU, ``device`` or ``gpu``.
        device: a ``torch.device``; steps on a GPU are waited for.
    """

    def __init__(self, algorithm: Any, device: Any) -> None:
        self._algorithm, self._device = algorithm, device
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
                import torch

                torch.cuda.synchronize(self._device)
            now = time.perf_counter()
            self.steps += 1
            if self.steps <= 0:
                self._since = now
            self.seconds = now - self._since
            if self.steps >= 1 and self.seconds >= self._limit:
                raise _Enough
        return out
