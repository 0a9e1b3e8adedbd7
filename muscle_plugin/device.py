"""Device, precision, determinism and memory of a run."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from muscle_plugin.distributed import launched, local_rank
from muscle_plugin.errors import DeviceError
from muscle_plugin.settings.schema import device_fault
from muscle_plugin.text import first_line, out_of_memory, shown

#: PyTorch's warnings of an operation without a deterministic algorithm, and of cuBLAS used before its workspace was fixed.
_NOT_DETERMINISTIC = re.compile(
    r"(\w+)[^.]* does not have a deterministic implementation|Deterministic behavior was enabled.* it uses (CuBLAS)",
    re.DOTALL,
)


def choose_device(name: str) -> torch.device:
    """The device for ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``; each of several processes takes a
    GPU of its own. Raises DeviceError if there is no such device."""
    if fault := device_fault(name):
        raise DeviceError(f"device: {fault}, got {shown(repr(name))}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    chosen = name.partition(":")[2]
    if launched() > 1 and chosen:
        raise DeviceError(f"device: {name} is one GPU, but there are {launched()} processes; give --device cuda")
    index = local_rank() if launched() > 1 else int(chosen or 0)
    if index >= count:
        what, advice = f"{name} asked for", "use --device cpu or auto, and no --gpu"
        if launched() > 1:
            what = f"process {index} finds no GPU of its own"
            advice = "start one process per GPU (torchrun --nproc_per_node), or use --device cpu"
        raise DeviceError(f"device: {what}, but this machine has {count} usable GPU(s); {advice}")
    return torch.device("cuda", index)


def choose_precision(name: str, device: torch.device, usb_name: str) -> str:
    """The precision for ``fp32``, ``bf16``, ``fp16`` or ``auto``: bf16 where the GPU supports it, else fp16 on a GPU and fp32
    on a CPU. Raises DeviceError if USB's algorithm cannot be trained in it."""
    # SimMatch adds a half-precision softmax to float32: autocast makes it float32 on a GPU, not on a CPU
    if name in ("bf16", "fp16") and device.type == "cpu" and usb_name == "simmatch":
        raise DeviceError(f"precision: {usb_name} cannot be computed in {name} on a CPU; give --precision fp32")
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def autocast_context(precision: str, device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """What makes the context manager for a forward pass.

    The cache of cast weights is off: USB's steps swap averaged weights in, or forward without gradient first, inside
    one autocast region, and a cache would return stale weights, or weights without gradient.
    """
    if precision == "fp32":
        return contextlib.nullcontext
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return partial(torch.autocast, device.type, dtype=dtype, cache_enabled=False)


def fix_workspaces(device: torch.device, deterministic: bool) -> None:
    """Let cuBLAS compute deterministically, unless the user has chosen its workspaces. It reads the variable at its first use
    in the process, so the variable stays set."""
    if deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextlib.contextmanager
def deterministic_kernels(device: torch.device, asked: bool, tell: Callable[[str], None]) -> Iterator[None]:
    """Within it, a GPU uses deterministic algorithms if ``asked``, else those that cuDNN finds fastest. A CPU is deterministic
    in any case. ``tell`` is called with the name of an operation that has no such algorithm, each time it runs."""
    if device.type != "cuda":
        yield
        return
    cudnn, memory = torch.backends.cudnn, torch.utils.deterministic
    kept = [(cudnn, n, getattr(cudnn, n)) for n in ("deterministic", "benchmark")]
    kept.append((memory, "fill_uninitialized_memory", memory.fill_uninitialized_memory))
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.use_deterministic_algorithms, before[0], warn_only=before[1])
        for owner, name, value in kept:
            stack.callback(setattr, owner, name, value)
        cudnn.deterministic, cudnn.benchmark = asked, not asked
        if asked:
            memory.fill_uninitialized_memory = False  # nothing here reads such memory
            if not before[0]:
                torch.use_deterministic_algorithms(True, warn_only=True)
            # fused attention is non-deterministic in warn-only mode
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(_hearing(tell))
        yield


@contextlib.contextmanager
def _hearing(tell: Callable[[str], None]) -> Iterator[None]:
    """Call ``tell`` with the names in PyTorch's warnings of operations that are not deterministic, whatever filters are set."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, *where: Any, **more: Any) -> None:
            if found := _NOT_DETERMINISTIC.match(str(message)):
                tell(found[1] or found[2])
            else:
                others(message, *where, **more)

        warnings.filterwarnings("always", message=_NOT_DETERMINISTIC.pattern)
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, in blocks of up to 32 MB, until it ends.

    A step on a CPU allocates and frees activations of hundreds of megabytes. glibc returns such blocks to the kernel, which
    clears them again for the next step: a tenth of a step's time. Without glibc nothing changes.
    """
    trim_threshold, mmap_threshold = -1, -3  # of glibc's <malloc.h>
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 32 * 2**20)  # glibc takes no larger one
        mallopt(trim_threshold, 2**31 - 1)


@contextlib.contextmanager
def memory_for(what: str, less: str) -> Iterator[None]:
    """Turn running out of memory for ``what`` into a :class:`DeviceError` that says what needs ``less``."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if isinstance(e, DeviceError) or not out_of_memory(e):
            raise
        raise DeviceError(f"out of memory for {what} ({first_line(e)}): {less} needs less") from e
