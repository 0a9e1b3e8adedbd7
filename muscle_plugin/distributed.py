"""Several processes that train one net: what they exchange (``torch.distributed``).

Every function here does nothing where there is one process, so that callers need not ask. Batches are shared equally: each of
N processes holds B / N images of a step, its loss is the mean over them, and gradients are averaged over processes, which
gives the gradient of the mean over all B.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from muscle_plugin.errors import ExchangeError
from muscle_plugin.text import out_of_memory

T = TypeVar("T")


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def launched() -> int:
    """The number of processes that ``torchrun`` started, before they have met; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """The number of this process among those on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def joined(device: torch.device, seconds: float) -> Iterator[None]:
    """Within it, the processes that ``torchrun`` started know each other.

    Args:
        device: of this process; GPUs talk by NCCL, CPUs by gloo.
        seconds: how long an exchange may take before it is an error, so that a dead process does not leave the others
            waiting for ever.
    """
    if launched() == 1 or dist.is_initialized():
        yield
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        timeout=timedelta(seconds=seconds),
        device_id=device if on_gpu else None,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _exchange() -> Iterator[None]:
    try:
        yield
    except RuntimeError as e:
        if out_of_memory(e):
            raise
        raise ExchangeError("another process has ended, or did not answer within dist_timeout seconds") from e


# ------------------------------------------------------------------------------------------------------------- tensors


class _Mean(torch.autograd.Function):
    """The mean over processes. It is linear and symmetric, so that its gradient is the mean of the gradients."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return _mean(x)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _mean(gradient)


def _mean(x: Tensor) -> Tensor:
    return _sum(x) / world_size()


def _sum(x: Tensor) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    with _exchange():
        dist.all_reduce(total)
    return total


def mean(x: Tensor) -> Tensor:
    """The mean of ``x`` over processes, with gradient: after gradients have been averaged, that of the global value.

    Args:
        x: of one shape in every process.
    """
    return _Mean.apply(x) if world_size() > 1 else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        context.rows = len(x)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
        with _exchange():
            dist.all_gather(parts, x.detach().contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _sum(gradient)[rank() * context.rows :][: context.rows]


def gather(x: Tensor) -> Tensor:
    """The rows of all processes, in their order, with gradient; each has as many.

    Args:
        x: (n, ...).

    Returns:
        (n * world_size(), ...).
    """
    return _Gather.apply(x) if world_size() > 1 else x


def gather_parts(x: Tensor, to_first: bool = False) -> Tensor:
    """The rows of all processes, in their order, without gradient; numbers of rows may differ.

    Args:
        x: (n, ...).
        to_first: only the first process needs them; the others get what they gave.
    """
    if world_size() == 1:
        return x
    rows = gather_objects(len(x))
    padded = x.new_zeros(max(rows), *x.shape[1:])
    padded[: len(x)] = x
    receives = not to_first or rank() == 0
    parts = [torch.empty_like(padded) for _ in rows] if receives else None
    with _exchange():
        if to_first:
            dist.gather(padded, parts)
        else:
            dist.all_gather(parts, padded)
    return x if parts is None else torch.cat([p[:n] for p, n in zip(parts, rows, strict=True)])


@torch.no_grad()
def average_(tensors: Iterable[Tensor]) -> None:
    """Replace floating-point tensors, of the same shapes in every process, by their means over processes, in one exchange."""
    chosen = [t for t in tensors if t.is_floating_point()]
    if world_size() == 1 or not chosen:
        return
    for kind in dict.fromkeys(t.dtype for t in chosen):  # in the same order everywhere
        some = [t for t in chosen if t.dtype == kind]
        flat = torch.cat([t.reshape(-1) for t in some])
        with _exchange():
            dist.all_reduce(flat)
        flat /= world_size()
        torch._foreach_copy_(
            some, [p.view(t.shape) for p, t in zip(flat.split([t.numel() for t in some]), some, strict=True)]
        )


@torch.no_grad()
def copy_from_first_(tensors: Iterable[Tensor]) -> None:
    """Replace tensors, of the same shapes in every process, by those of the first."""
    if world_size() > 1:
        for t in tensors:
            sent = t.detach().contiguous()
            with _exchange():
                dist.broadcast(sent, 0)
            t.copy_(sent)


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is set in any process. Exchanged between CPUs: no GPU is waited for."""
    if world_size() == 1:
        return flag
    shared = torch.tensor([int(flag)])
    with _exchange():
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return bool(shared)


# ------------------------------------------------------------------------------------------------------------- objects


def gather_objects(value: T) -> list[T]:
    """The values of all processes; they may be any that can be pickled."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    with _exchange():
        dist.all_gather_object(found, value)
    return found


def from_first(make: Callable[[], T]) -> T:
    """What ``make`` returns in the first process, everywhere; it is called there alone and must not raise."""
    if world_size() == 1:
        return make()
    box = [make() if rank() == 0 else None]
    with _exchange():
        dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
    return box[0]  # type: ignore[return-value]
