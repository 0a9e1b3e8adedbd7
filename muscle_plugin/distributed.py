"""Exchanges between the processes that train one net (``torch.distributed``).

In a single process every function here returns its input, so callers need not check. Batches are shared equally: each of N
processes holds B / N images per step, its loss is the mean over them, and gradients are averaged over processes, which gives
the gradient of the mean over all B.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from muscle_plugin.errors import ExchangeError, RunError, UserError
from muscle_plugin.text import first_line, out_of_memory

T = TypeVar("T")


def rank() -> int:
    """The rank of this process."""
    return dist.get_rank() if world_size() > 1 else 0


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def launched() -> int:
    """The number of processes that ``torchrun`` started, known before they are connected; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """The rank of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def joined(device: torch.device, seconds: float) -> Iterator[None]:
    """Connect the processes that ``torchrun`` started; ``seconds`` limits an exchange, lest a dead one block them."""
    if launched() == 1 or dist.is_initialized():
        yield
        return
    on_gpu = device.type == "cuda"
    try:
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            timeout=timedelta(seconds=seconds),
            device_id=device if on_gpu else None,
        )
    except (RuntimeError, ValueError) as e:
        raise RunError(first_line(e)) from e
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
        raise ExchangeError(
            f"process {os.environ.get('RANK')}: another process has ended, or did not answer within dist_timeout seconds; if"
            " there is a checkpoint, --resume continues from it"
        ) from e


class _Mean(torch.autograd.Function):
    """The mean over processes. It is linear and symmetric, so its gradient is the mean of the gradients."""

    @staticmethod
    def forward(_: FunctionCtx, x: Tensor) -> Tensor:
        return _sum(x) / world_size()

    @staticmethod
    def backward(_: FunctionCtx, gradient: Tensor) -> Tensor:
        return _sum(gradient) / world_size()


def _sum(x: Tensor) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    with _exchange():
        dist.all_reduce(total)
    return total


def mean(x: Tensor) -> Tensor:
    """Average ``x`` over processes, with gradient: once gradients are averaged, that of the global value."""
    return _Mean.apply(x) if world_size() > 1 else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: FunctionCtx, x: Tensor) -> Tensor:
        context.rows = len(x)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
        with _exchange():
            dist.all_gather(parts, x.detach().contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: FunctionCtx, gradient: Tensor) -> Tensor:
        return _sum(gradient)[rank() * context.rows :][: context.rows]


def gather(x: Tensor) -> Tensor:
    """Concatenate the rows of all processes by rank, with gradient: (n, ...), as many in each, to (n * world_size(), ...)."""
    return _Gather.apply(x) if world_size() > 1 else x


def gather_parts(x: Tensor, to_first: bool = False) -> Tensor:
    """Concatenate the rows of all processes by rank, without gradient; their numbers may differ.

    Args:
        to_first: only the first process needs them; the others get ``x``.
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
    """Replace floating-point tensors by their means over processes, in one exchange per type; integers are left alone."""
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
    """Whether ``flag`` is set in any process. Exchanged between CPUs, without waiting for a GPU."""
    if world_size() == 1:
        return flag
    shared = torch.tensor([int(flag)])
    with _exchange():
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return bool(shared)


def gather_objects(value: T) -> list[T]:
    """Collect the values of all processes by rank; they must pickle."""
    if world_size() == 1:
        return [value]
    found = [value] * world_size()
    with _exchange():
        dist.all_gather_object(found, value)
    return found


def in_every_process(work: Callable[[], T]) -> T:
    """Call ``work`` in every process. If it fails in one it fails in all, and the first process says why.

    Raises:
        UserError, OSError: ``work`` has failed; without a message in processes other than the first.
    """
    if world_size() == 1:
        return work()
    fault: Exception | None = None
    try:
        found = work()
    except (UserError, OSError) as e:
        fault = e
    told = gather_objects(None if fault is None else str(fault))
    failed = [(i, text) for i, text in enumerate(told) if text is not None]
    if not failed:
        return found
    if rank() > 0:
        raise UserError from fault
    raise fault or RunError("process {}: {}".format(*failed[0]))


def from_first(work: Callable[[], T]) -> T:
    """Call ``work`` in the first process, and return its result in all; it must pickle. A failure is raised in all, as
    :func:`in_every_process` does."""
    box = in_every_process(lambda: [work() if rank() == 0 else None])
    if world_size() > 1:
        with _exchange():
            dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
    return box[0]  # type: ignore[return-value]
