"""How the images of a step reach the device: from its memory or, where a set does not fit there, by threads that gather ahead.

Both give the same images for the same step, so a run's views do not depend on the choice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from muscle_plugin.data.sampler import IndexStream

T = TypeVar("T")
Tensors = Mapping[str, Tensor]

#: A set stays on the device if it takes no more than this share of the free memory.
SHARE = 0.5
_ALIGNED = 16  # bytes between the tensors of a parcel


def fits(images: Tensor, device: torch.device) -> bool:
    """Whether uint8 ``images`` may live in the device's memory (for a CPU: in the machine's)."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**62
    return images.numel() <= SHARE * free


class ResidentImages:
    """The images of any step, from the device's memory, where all of them, (P, channels, H, W) uint8, live as ``pool``.

    ``members``: kind of image -> (n,) int64 indices of the images of that kind.
    """

    def __init__(self, images: Tensor, members: Tensors, device: torch.device) -> None:
        self.pool = images.to(device).contiguous()  # image after image, whatever the source has them in
        self._members = members

    def rows(self, index: Tensors) -> Tensors:
        """Where in ``of_step`` the images are that a step's indices name, by kind; on the CPU."""
        return {kind: self._members[kind][i] for kind, i in index.items()}

    def of_step(self, step: int) -> Tensor:
        """A step's images, among others, on the device."""
        return self.pool


def _gather(images: Tensor, members: Tensors, order: Mapping[str, IndexStream], pinned: bool, step: int) -> Tensor:
    rows = images[torch.cat([members[kind][stream.batch(step)] for kind, stream in order.items()])].contiguous()
    return rows.pin_memory() if pinned else rows


class Ahead(Generic[T]):
    """Calls ``draw(step)``, and in ``threads`` threads those of as many steps that follow, before they are asked for.

    ``draw`` must be a function of the step alone, until :meth:`forget` is called.
    """

    def __init__(self, draw: Callable[[int], T], device: torch.device, threads: int = 1) -> None:
        begin = None
        if device.type == "cuda":  # a thread begins on the first GPU, which may not be this one
            begin = partial(torch.cuda.set_device, torch.cuda.current_device() if device.index is None else device)
        self._pool = ThreadPoolExecutor(threads, "ahead", begin)
        self._draw, self._threads = draw, threads
        self._drawn: dict[int, Future[T]] = {}

    def __call__(self, step: int) -> T:
        if step not in self._drawn:
            self.forget()
        for i in range(step, step + self._threads + 1):
            if i not in self._drawn:
                self._drawn[i] = self._pool.submit(self._draw, i)
        return self._drawn.pop(step).result()

    def forget(self) -> None:
        """Drop what has been drawn ahead."""
        for future in self._drawn.values():
            if not future.cancel():
                future.exception()  # waits: what it draws from is not to be used by two threads
        self._drawn.clear()


class StreamedImages:
    """The same, gathered ahead by ``workers`` threads (0: when asked) from the host's memory or a mapped file, ``pool``.

    PyTorch gathers without Python's lock, so that threads do it as fast as processes, which need room in /dev/shm and can be
    killed one by one. Consecutive steps are cheap; any other step begins anew.
    """

    def __init__(
        self, images: Tensor, members: Tensors, order: Mapping[str, IndexStream], device: torch.device, workers: int
    ) -> None:
        self.pool, self._device = images, device
        gather = partial(_gather, images, members, order, device.type == "cuda")
        self._gather: Callable[[int], Tensor] = Ahead(gather, device, workers) if workers else gather
        self._last, self._found = -1, images[:0]

    def rows(self, index: Tensors) -> Tensors:
        """Those of a kind follow those of the kind before."""
        sizes = [len(i) for i in index.values()]
        return dict(zip(index, torch.arange(sum(sizes)).split(sizes), strict=True))

    def of_step(self, step: int) -> Tensor:
        """A step's images, and no others, on the device."""
        if step != self._last:
            self._last, self._found = step, self._gather(step).to(self._device, non_blocking=True)
        return self._found


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


class FixedImages:
    """The images ``members``, (n,) int64 indices, without augmentation, in order, as evaluation iterates them.

    Each process iterates its own part; the length is the batches of all processes together.
    """

    sampler = None

    def __init__(
        self, images: Tensor, members: Tensor, labels: Tensor, normalise: Callable[[Tensor], Tensor], batch: int,
        device: torch.device, rank: int, world: int,
    ) -> None:  # fmt: skip
        self._images, self._members, self._labels = images, members.to(images.device), labels
        self._normalise, self._batch, self._device = normalise, batch, device
        self._part = range(rank * len(members) // world, (rank + 1) * len(members) // world)

    def __len__(self) -> int:
        return -(-len(self._members) // self._batch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in self._part[:: self._batch]:
            part = slice(start, min(start + self._batch, self._part.stop))
            images = self._images[self._members[part]].to(self._device, non_blocking=True)
            yield {"x_lb": self._normalise(images), "y_lb": self._labels[part].to(self._device, non_blocking=True)}
