"""USB's hard-coded CUDA calls made harmless on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


class _NoEvent:
    """Stands in for ``torch.cuda.Event`` where there is no GPU."""

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

    USB's classes call these inside ``__init__``, ``train_step`` and ``load_model``, its ``Trainer`` everywhere.
    """
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
        return
    if vars(torch.Tensor).get("cuda") is _here:  # in force already: to replace methods of Tensor takes its time
        yield
        return
    stand_ins: list[tuple[Any, str, Any]] = [
        (torch.Tensor, "cuda", _here),
        (torch.nn.Module, "cuda", _here),
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
