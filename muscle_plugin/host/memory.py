"""Memory that a step frees is kept for the next one."""

from __future__ import annotations

import ctypes

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
