"""Counts, on a CPU, what would make a training step wait for a GPU.

Each of these either brings a value to the CPU or has a result whose size hangs on values, so that PyTorch waits until the GPU
has done all it was asked:

- a number out of a tensor: ``item``, ``tolist``, ``float``, ``int``, ``if tensor``, ``numpy``, ``cpu``, ``to("cpu")``;
- ``nonzero``, ``masked_select``, indexing by a boolean mask, ``unique``, ``equal``, ``bincount``, ``repeat_interleave`` by a
  tensor;
- a copy of a tensor made on the CPU (by a factory without ``device``) to the device, unless ``non_blocking``; ``torch.tensor``
  with a ``device``; assignment of a number to places (``x[index] = 1``), which is such a copy.

It is an upper bound: assignment of a number by a boolean mask is counted, though on a GPU it is a ``masked_fill``. What a
CPU alone reads back is not counted (``one_hot`` and ``quantile`` check their arguments there), nor is what the host makes do
nothing on a CPU (``.cuda()``, and ``torch.cuda.synchronize``, which USB calls in hooks that the host replaces). Making the
batch is left out: its parameters are drawn on the CPU by design, and ``tests/test_cuda.py`` shows that it never waits. Of the
fp16 loss scaler a CPU says nothing: it reads a flag back where the optimiser is not fused, as it is on a GPU. The proof on a
GPU is ``torch.cuda.set_sync_debug_mode("error")``, in the same file. ``tests/test_fake_cuda.py`` counts, on a CPU too, with
tensors that say they are on a GPU: there it is known what lies where, and the batch, the loss scaler and hooks are seen too.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "unique_dim", "_unique", "_unique2", "equal",
    "bincount",
}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_TO_THE_CPU = (Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__)
_CHECKED_ON_A_CPU = (torch.nn.functional.one_hot, torch.quantile, Tensor.quantile)
_FACTORIES = (
    torch.ones, torch.zeros, torch.empty, torch.full, torch.rand, torch.randn, torch.randint, torch.randperm, torch.arange,
    torch.linspace, torch.eye, torch.from_numpy, torch.tensor, torch.as_tensor,
)  # fmt: skip
_COPIES = (torch.tensor, torch.as_tensor, Tensor.new_tensor)


class Waits:
    """The count; ``with`` it is on, :meth:`off` suspends it.

    Attributes:
        seen: name of an operation -> how often it occurred.
    """

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self._on = True
        self._on_cpu: set[int] = set()  # ids of the tensors that the CPU made
        self._kept: list[Tensor] = []  # so that no id is given anew

    def note(self, name: str) -> None:
        """Count one."""
        if self._on:
            self.seen[name] += 1

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Count nothing inside."""
        before, self._on = self._on, False
        try:
            yield
        finally:
            self._on = before

    def made_on_cpu(self, value: Any) -> Any:
        """Remember a tensor that lies in the CPU's memory on a machine with a GPU too."""
        if isinstance(value, Tensor) and self._on:
            self._on_cpu.add(id(value))
            self._kept.append(value)
        return value

    def is_on_cpu(self, value: Any) -> bool:
        """Whether it is such a tensor."""
        return id(value) in self._on_cpu

    def forget(self) -> None:
        """Begin anew."""
        self.seen = Counter()
        self._on_cpu.clear()
        self._kept.clear()

    def __enter__(self) -> Waits:
        self._modes = contextlib.ExitStack()
        self._modes.enter_context(_Calls(self))
        self._modes.enter_context(_Operations(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._modes.close()


class _Operations(TorchDispatchMode):
    """Sees what PyTorch computes, from inside its own functions too."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in _WAITING or (name == "repeat_interleave" and not (kwargs or {}).get("output_size")):
            self._waits.note(name)
        elif name in _INDEXING:
            masks = [i for i in args[1] if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)]
            if masks:
                self._waits.note(f"{name} by a mask")
            elif "put" in name and not args[2].dim():
                self._waits.note(f"{name} of a number")
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """Sees what is asked of PyTorch, with the arguments as given."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits, kwargs = self._waits, kwargs or {}
        if func in _CHECKED_ON_A_CPU:
            with waits.off():
                return func(*args, **kwargs)
        if func in _TO_THE_CPU:
            if not waits.is_on_cpu(args[0]):
                waits.note(func.__name__)
            with waits.off():
                value = func(*args, **kwargs)
            return waits.made_on_cpu(value)
        if func is Tensor.to and not kwargs.get("non_blocking"):
            target = kwargs.get("device", args[1] if len(args) > 1 else None)
            if target == "cpu":
                waits.note("to cpu")
            elif isinstance(target, torch.device) and waits.is_on_cpu(args[0]):
                waits.note("copy to the device")
        if func in _COPIES and kwargs.get("device") is not None and not isinstance(args[0], Tensor):
            waits.note("copy to the device")
        value = func(*args, **kwargs)
        if func in _FACTORIES and kwargs.get("device") is None:
            waits.made_on_cpu(value)
        return value


def waits_per_step(algorithm: Any, begin: int = 3) -> dict[int, Counter[str]]:
    """Train a hosted algorithm, and count per step (from 0) what would wait, from step ``begin`` to the last but one.

    Steps that log, evaluate or save are counted as they are: give intervals longer than the run.
    """
    waits, steps, batch = Waits(), {}, algorithm.batches.batch

    def make(step: int) -> Any:
        if step > begin:
            steps[step - 1] = waits.seen
        with waits.off():
            made = batch(step)
        waits.forget()
        return made

    algorithm.batches.batch = make
    try:
        with waits:
            algorithm.train()
    finally:
        algorithm.batches.batch = batch
    return steps
