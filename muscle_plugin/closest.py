"""The known name that a mistyped one was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most like ``name``, or None if none is like it by ``cutoff`` (difflib's ratio, 0 to 1)."""
    if len(name) > 100:  # no name is; difflib's time grows with the square of the length
        return None
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return near[0] if near else None


def nearest(name: str, known: Iterable[str]) -> str:
    """``" (nearest: ...)"``, or nothing if no known name is near."""
    near = closest(name, known)
    return f" (nearest: {near})" if near else ""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean '...'?"``, or nothing if no known name is near."""
    near = closest(name, known, cutoff=0.5)
    return f"; did you mean {near!r}?" if near else ""
