"""Texts of others (names of files, values of settings, words of libraries) as parts of a line of ours."""

from __future__ import annotations

from typing import Any


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
