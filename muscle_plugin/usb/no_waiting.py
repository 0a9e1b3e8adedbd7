"""Keeps a training step from waiting for the GPU where USB's classes would make it wait; for speed alone.

USB 0.3.2 ends each ``train_step`` with ``loss.item()`` for every logged value, which waits until the GPU has finished the step,
and copies what it draws on the CPU (mixup's permutation) by a blocking copy.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
from torch import Tensor

from muscle_plugin.usb.patches import replaced, speed_patches

#: Modules whose ``.item()`` is put off: USB's own, which only log the value.
USB = ("semilearn.",)

_item, _to, _cuda = Tensor.item, Tensor.to, Tensor.cuda


def _asked_by_usb() -> bool:
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith(USB)


def _item_later(self: Tensor) -> Any:
    """A scalar float64 tensor for USB's floats: a copy, so that it stays what it is now; float64, so that sums equal those
    of Python's floats."""
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
    """Within it ``Tensor.item`` gives USB's code a scalar tensor, and its copies from CPU to GPU do not block.

    For ``train_step`` alone. Only calls from USB's modules change: PyTorch, other libraries and a user's own classes get
    numbers as ever, since they may compare or compute with them; so does USB for integers, which may be sizes.
    One value so obtained is more than a log entry in USB, SoftMatch's mean and variance: :mod:`muscle_plugin.usb.thresholds`
    computes them on the device. (A non-blocking copy from pageable memory goes through CUDA's staging buffer, so its source
    may be freed at once.)
    """
    if not speed_patches():
        return contextlib.nullcontext()
    on_cuda = ((Tensor, "cuda", _cuda_soon),) if device.type == "cuda" else ()  # elsewhere `usb_calls_on` replaces it
    return replaced((Tensor, "item", _item_later), (Tensor, "to", _to_soon), *on_cuda)
