"""Foreign text (file names, values of settings, messages of libraries) as part of a one-line message."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable
from difflib import get_close_matches

#: In messages of PyTorch, of cuBLAS and its siblings, of NCCL and of the CPU allocator.
_RAN_OUT = re.compile(r"out of memory|_STATUS_ALLOC_FAILED|can(?:no|')t allocate memory|not enough memory", re.I)


def one_line(text: object) -> str:
    """Escape every character that is not printable: line ends, and what a terminal would obey or hide."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def shown(text: object, most: int = 200) -> str:
    """:func:`one_line`, with the middle left out of a text longer than ``most`` characters."""
    if isinstance(text, (list, tuple, dict)):
        return f"a {type(text).__name__} of {len(text)}"
    words = str(text)
    if len(words) > most:
        words = f"{words[: most - 40]} ... {words[-30:]}"
    return one_line(words)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class if it has none."""
    return shown((str(error).splitlines() or [""])[0]) or type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a GPU, or the machine, ran out of memory, which PyTorch may raise as RuntimeError."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_RAN_OUT.search(str(error))))


def listed(names: Iterable[object], most: int = 5) -> str:
    """The first names, each in quotes, with an ellipsis for the others."""
    quoted = [shown(repr(name)) for name in names]
    return ", ".join([*quoted[:most], *["…"][: len(quoted) > most]])


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
    """An exception of a plugin's code as one line: ``what``, the line of ``file`` if it is known, and the message."""
    if isinstance(error, SyntaxError):
        number = error.lineno if error.filename == file else None
        message = f"SyntaxError: {error.msg}"
    else:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        number = lines[-1] if lines else None
        said = first_line(error)
        message = type(error).__name__ + (f": {said}" if said != type(error).__name__ else "")
    return what + (f" line {number}: " if number else ": ") + message


def closest(name: str, known: Iterable[str], cutoff: float = 0.5, most: int = 1) -> list[str]:
    """At most ``most`` known names whose likeness to ``name``, difflib's ratio, is at least ``cutoff``, the best first.

    Case and the order of parts (``cifar10-fixmatch``) do not count, nor do folders where ``name`` has none; of names that
    differ in nothing else the one in no folder is the nearer.
    """

    def key(text: str) -> str:
        return "_".join(sorted(re.findall(r"[^\W_]+", text.lower())))

    names: dict[str, str] = {}
    for other in sorted(known, key=lambda name: name.count("/")):
        names.setdefault(key(other if "/" in name else other.rpartition("/")[2]), other)
    return [names[near] for near in get_close_matches(key(name[:100]), names, most, cutoff)]


def did_you_mean(name: str, known: Iterable[str], most: int = 1) -> str:
    """``"; did you mean '...'?"``, with at most ``most`` names, or nothing if no known name is near."""
    near = [repr(k) for k in closest(name, known, most=most)]
    listed = ", ".join([*near[:-2], " or ".join(near[-2:])])
    return f"; did you mean {listed}?" if near else ""
