"""What a step draws on the CPU: drawn while the GPU computes the previous step, and sent to it in one copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_ALIGNED = 16  # bytes


class OneAhead(Generic[T]):
    """Calls ``draw(step)``, and in a thread ``draw(step + 1)`` before it is asked for.

    ``draw`` must be a function of the step alone, until :meth:`forget` is called.
    """

    def __init__(self, draw: Callable[[int], T], device: torch.device) -> None:
        begin = None
        if device.type == "cuda":  # a thread begins on the first GPU, which may not be this one
            begin = partial(torch.cuda.set_device, torch.cuda.current_device() if device.index is None else device)
        self._pool = ThreadPoolExecutor(1, "draws", begin)
        self._draw, self._next = draw, (-1, Future[T]())

    def __call__(self, step: int) -> T:
        ahead, future = self._next
        if ahead != step:
            self.forget()
            future = self._pool.submit(self._draw, step)
        drawn = future.result()
        self._next = (step + 1, self._pool.submit(self._draw, step + 1))
        return drawn

    def forget(self) -> None:
        """Drop what has been drawn ahead."""
        ahead, future = self._next
        if ahead >= 0 and not future.cancel():
            future.exception()  # waits: what it draws from is not to be used by two threads
        self._next = (-1, Future())


class Parcel:
    """CPU tensors that are sent to a device together, in one asynchronous copy."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self._like, self._device = {n: (t.dtype, t.shape) for n, t in tensors.items()}, device
        self._sizes = [-(-t.nbytes // _ALIGNED) * _ALIGNED for t in tensors.values()]
        pinned = device.type == "cuda" and torch.cuda.is_available()
        self._buffer = torch.empty(sum(self._sizes), dtype=torch.uint8, pin_memory=pinned)
        for place, t in zip(self._places(self._buffer).values(), tensors.values(), strict=True):
            place.copy_(t)

    def _places(self, buffer: Tensor) -> dict[str, Tensor]:
        parts = zip(self._like.items(), buffer.split(self._sizes), strict=True)
        return {n: part[: t.itemsize * shape.numel()].view(t).view(shape) for (n, (t, shape)), part in parts}

    def unpack(self) -> dict[str, Tensor]:
        """Return the tensors on the device, by name."""
        return self._places(self._buffer.to(self._device, non_blocking=True))
