"""The known name that a mistyped one was probably meant to be."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher


def _parts(name: str) -> str:
    return "_".join(sorted(re.findall(r"[^\W_]+", name.lower())))


def likest(name: str, known: Iterable[str], cutoff: float, most: int = 1) -> list[str]:
    """The known name that is most like ``name``, and others nearly as like.

    Capitals do not count; nor do, in a second comparison, the order of a name's parts and what stands between them
    (``cifar10-fixmatch``); nor folders, where ``name`` has none.

    Args:
        cutoff: the least likeness, difflib's ratio (0 to 1).
        most: names at most.
    """
    if len(name) > 100:  # no name is; difflib's time grows with the square of the length
        return []
    # of its second text difflib keeps what it has found out
    whole, parts = SequenceMatcher(b=name.lower()), SequenceMatcher(b=_parts(name))
    found = []
    for other in dict.fromkeys(known):
        text = other if "/" in name else other.rpartition("/")[2]
        whole.set_seq1(text.lower())
        parts.set_seq1(_parts(text))
        ratios = [m.ratio() if m.real_quick_ratio() >= cutoff <= m.quick_ratio() else 0.0 for m in (whole, parts)]
        if max(ratios) >= cutoff:
            found.append((1 - max(ratios), "/" in other, -sum(ratios), other))
    found.sort()
    return [other for unlike, *_, other in found[:most] if unlike <= 1.5 * found[0][0]]


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name most like ``name``, or None if none is like it by ``cutoff`` (difflib's ratio, 0 to 1)."""
    return next(iter(likest(name, known, cutoff)), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """``" (nearest: ...)"``, or nothing if no known name is near."""
    near = closest(name, known)
    return f" (nearest: {near})" if near else ""


def did_you_mean(name: str, known: Iterable[str], most: int = 1) -> str:
    """``"; did you mean '...'?"``, or nothing if no known name is near.

    Args:
        most: names to offer, where several are about as near.
    """
    near = [repr(k) for k in likest(name, known, 0.5, most)]
    listed = " or ".join(filter(None, [", ".join(near[:-1]), *near[-1:]]))
    return f"; did you mean {listed}?" if near else ""
