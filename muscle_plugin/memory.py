"""Memory: freed blocks are kept for the next step, and running out is an error of one line."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

from muscle_plugin.errors import DeviceError
from muscle_plugin.text import first_line, out_of_memory

# of glibc's <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # bytes; glibc takes no larger one


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, in blocks of up to 32 MB, until it ends; return whether it can.

    A step on a CPU allocates and frees activations of hundreds of megabytes. glibc returns such blocks to the kernel, which
    clears them again for the next step: a tenth of a step's time. Without glibc nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


@contextlib.contextmanager
def memory_for(what: str, less: str) -> Iterator[None]:
    """Turn running out of memory within it into a :class:`DeviceError` of one line.

    Args:
        what: needs the memory.
        less: what would need less.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if isinstance(e, DeviceError) or not out_of_memory(e):
            raise
        raise DeviceError(f"out of memory for {what} ({first_line(e)}): {less} needs less") from e
