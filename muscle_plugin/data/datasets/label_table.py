"""Tables of image files and their labels."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from muscle_plugin.data.images import find_images
from muscle_plugin.errors import DataError
from muscle_plugin.text import shown

_MOST_BYTES = 1 << 28  # of a table


@dataclass(frozen=True)
class LabelledFile:
    """An image file, its class (None: unlabelled), and whether it is a test image."""

    path: Path
    label: str | None
    test: bool = False


def read_label_table(root: Path, table: Path, allow_outside: bool = False) -> list[LabelledFile]:
    """Return the files that a table names, and the images below ``root`` that it does not.

    Args:
        root: the folder to which the table's paths are relative.
        table: lines of file, label and, optionally, train or test.
        allow_outside: whether the table may name files that are not below ``root``.

    Raises:
        DataError: a line of the table is wrong; the message names the line.
    """
    labels: dict[Path, tuple[str | None, bool]] = {}
    images = find_images(root)
    known = set(images)
    by_real: dict[str, Path] = {}  # by path with links resolved; made if a row needs it
    for line, row in _rows(table):
        where = f"{table} line {line}"
        name, label, split = ([c.strip() for c in row] + ["", "", ""])[:3]
        relative = Path(os.path.normpath(name)) if name else Path()
        outside = relative.is_absolute() or relative.parts[:1] == ("..",)
        path = root / relative
        if outside:  # or so it is written: an absolute path may lead to an image of the folder
            by_real = by_real or {os.path.realpath(p): p for p in images}
            path = by_real.get(_real(path), path)
        if not name or (outside and path not in known and not allow_outside):
            hint = "; --allow_outside true permits others" if name else ""
            raise DataError(f"{where}: {shown(repr(name))} is not the path of a file in {root}{hint}")
        if outside and path not in known and os.path.isfile(path):
            images.append(path)
            known.add(path)
        if path not in known:
            raise DataError(f"{where}: {shown(path)}: no such image")
        if split.lower() not in ("", "train", "test"):
            raise DataError(f"{where}: split must be train or test, got {shown(repr(split))}")
        entry = (label or None, split.lower() == "test")
        if entry == (None, True):
            raise DataError(f"{where}: a test image needs a label")
        if labels.setdefault(path, entry) != entry:
            raise DataError(f"{where}: {shown(name)} has another label in an earlier line")
    return [LabelledFile(p, *labels.get(p, (None, False))) for p in images]


def _real(path: Path) -> str:
    """The path with its links resolved; empty for what is no path at all."""
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):
        return ""


def _rows(table: Path) -> list[tuple[int, Sequence[str]]]:
    """Lines of a table with their numbers, without its header; separated by comma, semicolon or tab."""
    try:
        with table.open("rb") as f:  # of a device no more than this is read
            raw = f.read(_MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            raise DataError(f"{table}: larger than {_MOST_BYTES >> 20} MB; not a table of labels")
        text = raw.decode("utf-8-sig")
    except (OSError, ValueError) as e:
        raise DataError(f"{table}: cannot be read: {shown(e)}") from None
    first = re.split("[\r\n]", text.strip(), maxsplit=1)[0]
    separator = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[tuple[int, Sequence[str]]] = []
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append((reader.line_num, row))
    except csv.Error as e:
        raise DataError(f"{table} line {reader.line_num}: not a table of file and label: {e}") from None
    if rows and rows[0][1][0].strip().lower() in ("file", "filename", "image", "path"):
        del rows[0]
    if not rows or len(rows[0][1]) < 2:
        raise DataError(f"{table}: expected lines of file,label")
    return rows
