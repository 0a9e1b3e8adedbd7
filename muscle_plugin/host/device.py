"""Device and precision of a run, and USB's hard-coded CUDA calls made harmless on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from muscle_plugin.config import device_fault
from muscle_plugin.distributed import launched, local_rank
from muscle_plugin.text import shown

#: USB's classes that add half-precision soft-max to float32: autocast makes it float32 on a GPU, not on a CPU.
NOT_HALF_ON_CPU = frozenset({"simmatch"})


class DeviceError(RuntimeError):
    """The device or precision asked for is not there."""


def choose_device(name: str) -> torch.device:
    """``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``; of several processes each takes a GPU of its own.

    Raises:
        DeviceError: no such GPU, or a device of another kind.
    """
    if fault := device_fault(name):
        raise DeviceError(f"device: {fault}, got {shown(repr(name))}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    chosen = name.partition(":")[2]
    if launched() > 1:
        if chosen:
            raise DeviceError(f"device: {name} is one GPU, but there are {launched()} processes; give --device cuda")
        if local_rank() >= count:
            raise DeviceError(
                f"device: process {local_rank()} of this machine finds no GPU of its own: it has {count} usable GPU(s);"
                " start as many processes (torchrun --nproc_per_node), or use --device cpu"
            )
        return torch.device("cuda", local_rank())
    index = int(chosen or 0)
    if index >= count:
        raise DeviceError(
            f"device: {name} asked for, but this machine has {count} usable GPU(s); use --device cpu or auto, and no"
            " --gpu"
        )
    return torch.device("cuda", index)


def choose_precision(name: str, device: torch.device, usb_name: str = "") -> str:
    """fp32, bf16 or fp16 for ``auto``: bf16 where the GPU computes it, else fp16 on a GPU, fp32 on a CPU.

    Args:
        usb_name: the USB class that is to be computed so.

    Raises:
        DeviceError: its steps cannot be.
    """
    if name in ("bf16", "fp16") and device.type == "cpu" and usb_name in NOT_HALF_ON_CPU:
        raise DeviceError(f"precision: {usb_name} cannot be computed in {name} on a CPU; give --precision fp32")
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def autocast_context(precision: str, device: torch.device) -> Callable[[], Any]:
    """The context manager for a forward pass.

    The cache of cast weights is off: USB's steps swap averaged weights in, or forward without gradient first, inside
    one autocast region, and the cache would then hand out stale weights or weights without gradient.
    """
    if precision == "fp32":
        return contextlib.nullcontext
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return partial(torch.autocast, device.type, dtype=dtype, cache_enabled=False)


class _NoEvent:
    """Stands in for ``torch.cuda.Event`` where there is no GPU."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def elapsed_time(self, _: Any) -> float:
        return 0.0


@contextlib.contextmanager
def usb_calls_on(device: torch.device | str) -> Iterator[None]:
    """Within it, ``.cuda()``, ``torch.cuda.synchronize``, ``torch.cuda.set_device`` and CUDA events do nothing if the device
    is a CPU.

    USB's classes call these inside ``__init__``, ``train_step`` and ``load_model``, its ``Trainer`` everywhere.
    """
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
        return
    here: Callable[..., Any] = lambda self, *_, **__: self  # noqa: E731
    stand_ins: list[tuple[Any, str, Any]] = [
        (torch.Tensor, "cuda", here),
        (torch.nn.Module, "cuda", here),
        (torch.cuda, "Event", _NoEvent),
        (torch.cuda, "synchronize", lambda *_, **__: None),
        (torch.cuda, "set_device", lambda *_, **__: None),
    ]
    kept = [(owner, name, vars(owner).get(name)) for owner, name, _ in stand_ins]
    for owner, name, stand_in in stand_ins:
        setattr(owner, name, stand_in)
    try:
        yield
    finally:
        for owner, name, original in kept:
            if original is None:
                delattr(owner, name)  # it was inherited
            else:
                setattr(owner, name, original)
