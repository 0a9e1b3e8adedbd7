"""Docstrings as Markdown, for mkdocstrings: reStructuredText's simple tables and roles, which the sources have."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod):`~?([\w.]+)`")
RULE = re.compile(r"=+(?: +=+)+")


def as_markdown(text: str) -> str:
    """Tables between rules of ``=`` as tables between bars; ``:func:`name``` as the name in code."""
    lines: list[str] = []
    columns: list[tuple[int, int | None]] = []  # of the table that has begun
    rules = 0
    for line in text.split("\n"):
        if RULE.fullmatch(line.strip()):
            starts = [m.start() for m in re.finditer("=+", line)]
            columns = list(zip(starts, [*starts[1:], None], strict=True))
            rules = (rules + 1) % 3
            lines += ["|" + "---|" * len(columns)] if rules == 2 else [""] * (rules == 1)
        elif rules:
            cells = [_cell(line[a:b].strip()) for a, b in columns]
            lines.append(f"| {' | '.join(cells)} |")
        else:
            lines.append(line)
    return ROLE.sub(lambda m: f"`{m[1].rpartition('.')[2]}`", "\n".join(lines))


def _cell(text: str) -> str:
    """A cell's text, in which a bar does not end the cell."""
    return "".join(p if i % 2 else p.replace("|", r"\|") for i, p in enumerate(re.split(r"(``.*?``)", text)))


class MarkdownDocstrings(griffe.Extension):
    """Changes every docstring as it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Griffe calls this for modules, classes, functions and attributes."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
