"""Calls of USB's and PyTorch's that this package replaces, and for how long.

Two kinds: what USB (0.3.2 and git main) cannot run without on a CPU (:func:`usb_calls_on`), and what only spares a GPU some
waiting (:func:`no_waiting`, :mod:`muscle_plugin.usb.thresholds`). ``MUSCLE_USB_PATCHES=0`` switches the second kind off;
results are the same.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def speed_patches() -> bool:
    """Whether to replace code of USB's for the sake of speed."""
    return os.environ.get("MUSCLE_USB_PATCHES") != "0"


@contextlib.contextmanager
def replaced(*stand_ins: tuple[type | object, str, object]) -> Iterator[None]:
    """Replace attributes within a ``with`` block; (owner, attribute, value) each."""
    kept = [(owner, name, vars(owner).get(name)) for owner, name, _ in stand_ins]
    for owner, name, value in stand_ins:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in kept:
            if value is None:
                delattr(owner, name)  # it was inherited
            else:
                setattr(owner, name, value)


class _NoEvent:
    """Stands in for ``torch.cuda.Event``."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def elapsed_time(self, _: Any) -> float:
        return 0.0


def _here(self: Any, *_: Any, **__: Any) -> Any:
    return self


@contextlib.contextmanager
def usb_calls_on(device: torch.device | str) -> Iterator[None]:
    """Within it, ``.cuda()``, ``torch.cuda.synchronize``, ``torch.cuda.set_device`` and CUDA events do nothing if the device
    is a CPU.

    USB 0.3.2 calls these inside ``__init__``, ``train_step`` and ``load_model`` of its algorithms, and throughout its
    ``Trainer``.
    """
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
    elif vars(Tensor).get("cuda") is _here:  # in force already; replacing methods of Tensor is slow
        yield
    else:
        with replaced(
            (Tensor, "cuda", _here),
            (torch.nn.Module, "cuda", _here),
            (torch.cuda, "Event", _NoEvent),
            # a function each: torch.compile, if imported meanwhile, refuses one function in two places
            (torch.cuda, "synchronize", lambda *_, **__: None),
            (torch.cuda, "set_device", lambda *_, **__: None),
        ):
            yield


_item, _to, _cuda = Tensor.item, Tensor.to, Tensor.cuda


def _asked_by_usb() -> bool:
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("semilearn.")


def _item_later(self: Tensor) -> Any:
    # a copy, so that it stays what it is now; float64, so that sums equal those of Python's floats
    if self.is_floating_point() and _asked_by_usb():
        return self.detach().to(torch.float64, copy=True)
    return _item(self)


def _to_soon(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not kwargs and len(args) == 1 and isinstance(args[0], torch.device) and self.is_cpu and _asked_by_usb():
        return _to(self, args[0], non_blocking=True)
    return _to(self, *args, **kwargs)


def _cuda_soon(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not kwargs and len(args) <= 1 and self.is_cpu and _asked_by_usb():
        return _cuda(self, *args, non_blocking=True)
    return _cuda(self, *args, **kwargs)


def no_waiting(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Within it ``Tensor.item`` gives USB's code a scalar tensor, and its copies from CPU to GPU do not block; for
    ``train_step`` alone.

    USB 0.3.2 ends each ``train_step`` with ``loss.item()`` for every logged value, which waits until the GPU has finished
    the step, and copies what it draws on the CPU (mixup's permutation) by a blocking copy. Only calls from USB's modules
    change: other libraries and a user's own classes may compare or compute with their numbers; so may USB with integers,
    which may be sizes. One value so obtained is more than a log entry in USB, SoftMatch's mean and variance:
    :mod:`muscle_plugin.usb.thresholds` computes them on the device. (A non-blocking copy from pageable memory goes through
    CUDA's staging buffer, so its source may be freed at once.)
    """
    if not speed_patches():
        return contextlib.nullcontext()
    on_cuda = ((Tensor, "cuda", _cuda_soon),) if device.type == "cuda" else ()  # elsewhere `usb_calls_on` replaces it
    return replaced((Tensor, "item", _item_later), (Tensor, "to", _to_soon), *on_cuda)
