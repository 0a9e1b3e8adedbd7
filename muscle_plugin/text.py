"""Texts of others (names of files, values of settings, words of libraries) as parts of a line of ours."""

from __future__ import annotations

import re
import traceback
from typing import Any

#: What PyTorch, cuBLAS and its like, NCCL and the CPU's allocator say where memory runs out.
_RAN_OUT = re.compile(
    r"out of memory|_STATUS_ALLOC_FAILED|can(?:no|')t allocate memory|not enough memory", re.IGNORECASE
)


def one_line(text: Any) -> str:
    """The text with all that is no printable character escaped: line ends, and what a terminal would obey or hide."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def shown(text: Any, most: int = 200) -> str:
    """:func:`one_line` of it, with the middle left out where it is longer than ``most`` characters."""
    if isinstance(text, (list, tuple, dict)):
        return f"a {type(text).__name__} of {len(text)}"
    words = str(text)
    if len(words) > most:
        words = f"{words[: most - 40]} ... {words[-30:]}"
    return one_line(words)


def first_line(error: BaseException) -> str:
    """What an exception says first, or its name where it says nothing."""
    return shown((str(error).splitlines() or [""])[0]) or type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the memory of a GPU, or of the machine, ran out. PyTorch raises a class of its own for
    one of the ways in which that shows, else a RuntimeError."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_RAN_OUT.search(str(error))))


def plural(n: int, what: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them: ``90 s``, ``12 min``, ``3.5 h``, ``4.0 days``."""
    for unit, size, up_to in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 2 * 86400)):
        if seconds < up_to:
            return f"{seconds / size:.{int(unit == 'h')}f} {unit}"
    return f"{seconds / 86400:.1f} days"


def fault_in(error: BaseException, file: str | None, what: str) -> str:
    """An exception out of a plugin's code as one line: ``what``, the line of ``file`` if it can be told, and the message."""
    if isinstance(error, SyntaxError):
        number = error.lineno if error.filename == file else None
        message = f"SyntaxError: {error.msg}"
    else:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        number = lines[-1] if lines else None
        said = first_line(error)
        message = type(error).__name__ + (f": {said}" if said != type(error).__name__ else "")
    return what + (f" line {number}: " if number else ": ") + message
