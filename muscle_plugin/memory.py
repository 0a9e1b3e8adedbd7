"""Memory: what a step frees is kept for the next one, and what does not fit is said in one line."""

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
    """Let this process keep the memory that it frees, in blocks up to 32 MB each, until it ends; whether that can be had.

    A step on a CPU allocates and frees activations of hundreds of megabytes. glibc gives such blocks back to the kernel,
    which clears them anew for the next step: a tenth of a step's time. Elsewhere nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


@contextlib.contextmanager
def memory_for(what: str, less: str) -> Iterator[None]:
    """Within it, memory that runs out is a :class:`DeviceError` of one line.

    Args:
        what: needs it.
        less: what would need less.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if isinstance(e, DeviceError) or not out_of_memory(e):
            raise
        raise DeviceError(f"out of memory for {what} ({first_line(e)}): {less} needs less") from e
