"""What keeps a training step from waiting for the device, where USB's classes would make it wait.

A class of USB's ends its ``train_step`` with ``loss.item()`` for every value that it logs, each of which waits until the
GPU has finished the step, and copies what it draws on the CPU (mixup's permutation) by a copy that waits.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

#: Code whose ``.item()`` is put off: USB's own, which takes such a value for nothing but the log.
USB = ("semilearn.",)

_item, _to, _cuda = Tensor.item, Tensor.to, Tensor.cuda


def _asked_by_usb() -> bool:
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith(USB)


def _item_later(self: Tensor) -> Any:
    """A float of USB's as a float64 scalar on its device: a copy, so that it stays what it is now; float64, so that sums
    of it are those of Python's floats."""
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


@contextlib.contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Within it USB's code gets no number out of ``Tensor.item`` but the scalar tensor, and its copies from the CPU's
    memory to the GPU do not wait.

    For ``train_step`` alone. Only what is called from a module of USB's changes: PyTorch, other libraries and classes of
    one's own get numbers as ever, since they may compare or compute with them; so do USB's integers, which may be sizes.
    In USB one value obtained so is more than a log entry, SoftMatch's mean and variance: ``thresholds`` has its own.
    (A copy from pageable memory that need not wait is made by way of CUDA's staging buffer, so its source may go at once.)
    """
    stand_ins: dict[str, Any] = {"item": _item_later, "to": _to_soon}
    if device.type == "cuda":  # elsewhere ``usb_calls_on`` has made it do nothing
        stand_ins["cuda"] = _cuda_soon
    kept = {name: vars(Tensor).get(name) for name in stand_ins}
    for name, stand_in in stand_ins.items():
        setattr(Tensor, name, stand_in)
    try:
        yield
    finally:
        for name, original in kept.items():
            if original is None:
                delattr(Tensor, name)  # it was inherited
            else:
                setattr(Tensor, name, original)
