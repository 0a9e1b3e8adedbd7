"""USB's hard-coded CUDA calls, made harmless on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from muscle_plugin.usb.patches import replaced


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
    elif vars(torch.Tensor).get("cuda") is _here:  # in force already; replacing methods of Tensor is slow
        yield
    else:
        with replaced(
            (torch.Tensor, "cuda", _here),
            (torch.nn.Module, "cuda", _here),
            (torch.cuda, "Event", _NoEvent),
            # a function each: torch.compile, if imported meanwhile, refuses one function in two places
            (torch.cuda, "synchronize", lambda *_, **__: None),
            (torch.cuda, "set_device", lambda *_, **__: None),
        ):
            yield
