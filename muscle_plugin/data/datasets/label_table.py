"""A table of labels: the class of each image file, and which files are for testing."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from muscle_plugin.data.datasets.image_files import LabelledFile
from muscle_plugin.data.images import find_images, image_suffixes
from muscle_plugin.errors import DataError
from muscle_plugin.text import listed, plural, shown

_MOST_BYTES = 1 << 28  # of a table of labels
#: What programs write where there is no label, in lower case.
ABSENT = frozenset(
    ["", "-1", "-1.0", "nan", "na", "n/a", "#n/a", "<na>", "none", "null", "?", "unlabelled", "unlabeled"]
)
#: How columns are called, in lower case and without what separates words; the others are passed over.
_HEADS = {
    "file": ("file", "filename", "filepath", "image", "imagefile", "imagename", "imagepath", "img", "imgpath", "path"),
    "label": ("label", "labels", "class", "classname", "category", "target"),
    "split": ("split", "subset", "set", "partition"),
}


def read_label_table(root: Path, table: Path, allow_outside: bool, notes: list[str]) -> list[LabelledFile]:
    """Return the files that a table of file, label and, optionally, split (train or test) names, by paths relative to ``root``,
    and the images below ``root`` that it does not name; adds notes on how the table was read."""
    # image -> its label and whether it is for testing, once a line has named it
    found: dict[Path, tuple[str | None, bool] | None] = dict.fromkeys(find_images(root))
    by_real: dict[str, Path] = {}  # by path with links resolved; made if a row needs it

    def located(name: str) -> tuple[Path, bool]:
        """The path that a name means, and whether it is written as one outside ``root``."""
        relative = Path(os.path.normpath(name)) if name else Path()
        outside = relative.is_absolute() or relative.parts[:1] == ("..",)
        path = root / relative
        if outside:  # or so it is written: an absolute path may lead to an image of the folder
            if not by_real:
                by_real.update({os.path.realpath(p): p for p in found})
            with contextlib.suppress(OSError, ValueError):  # what is no path at all
                path = by_real.get(os.path.realpath(path), path)
        return path, outside

    rows = _rows(table)
    columns, most = _columns(table, rows, notes)
    absent: Counter[str] = Counter()
    first_lines: dict[str, str] = {}  # label -> where it is first given
    for line, row in rows:
        where = f"{table} line {line}"
        if any(cell.strip() for cell in row[most:]):
            advice = "quote what holds a separator; more than file, label and split need a head that names them"
            raise DataError(f"{where}: {len(row)} columns, expected {most}; {advice}")
        name, label, split = (row[i].strip() if i is not None and i < len(row) else "" for i in columns)
        path, outside = located(name)
        if not name or (outside and path not in found and not allow_outside):
            hint = "; --allow_outside true permits others" if name else ""
            raise DataError(f"{where}: {shown(repr(name))} is not the path of a file in {root}{hint}")
        if outside and os.path.isfile(path):
            found.setdefault(path)
        if path not in found:
            raise DataError(f"{where}: {shown(path)}: no such image")
        if split.lower() not in ("", "train", "test"):
            raise DataError(
                f"{where}: split must be train or test, got {shown(repr(split))}; write one of these, or leave the line out"
            )
        if label.lower() not in ABSENT:
            first_lines.setdefault(label, where)
        else:
            absent[label] += 1
            label = ""
        entry = (label or None, split.lower() == "test")
        if entry == (None, True):
            raise DataError(f"{where}: a test image needs a label")
        if found[path] not in (None, entry):
            raise DataError(f"{where}: {shown(name)} has another label in an earlier line")
        found[path] = entry
    _refuse_lists(first_lines)
    if counted := ", ".join(f"{plural(n, 'label')} {shown(repr(text))}" for text, n in absent.items() if text):
        notes.append(f"{table}: taken as unlabelled: {counted}")
    return [LabelledFile(path, *(entry or (None, False))) for path, entry in found.items()]


def _columns(table: Path, rows: list[tuple[int, list[str]]], notes: list[str]) -> tuple[Sequence[int | None], int]:
    """Where file, label and split stand in ``rows``, whose head is removed, and how many columns there are."""
    head = [cell.strip() for cell in rows[0][1]]
    plain = [re.sub(r"[\W_]+", "", cell.lower()) for cell in head]
    at = {kind: [i for i, word in enumerate(plain) if word in names] for kind, names in _HEADS.items()}
    # a head names no image; if it has no name known here, further lines tell it from lines of files without suffixes
    suffixes = image_suffixes()
    images = (any(os.path.splitext(cell.strip())[1].lower() in suffixes for cell in row) for _, row in rows)
    if next(images) or not (any(at.values()) or any(images)):
        return [0, 1, 2], 3
    others = [i for i, word in enumerate(plain) if word and not any(i in places for places in at.values())]
    for kind, places in at.items():
        if len(places) > 1:
            several = listed((head[i] for i in places), 8)
            raise DataError(f"{table}: several {kind} columns: {several}; keep one, rename the others")
    named = listed((head[i] for i in others), 8)
    if not at["label"] and at["file"] and len(head) == 2:
        at["label"] = others
        notes.append(f"{table}: column {named} is taken as the label")
    elif others:
        notes.append(f"{table}: columns passed over: {named}")
    for kind, advice in (
        ("file", "rename the column of image paths to one of these"),
        ("label", "it must hold the name of each image's class; one-hot columns, a 0 or 1 per class, are not read"),
    ):
        if not at[kind]:
            names = f"{', '.join(_HEADS[kind][:-1])} or {_HEADS[kind][-1]}"
            raise DataError(f"{table}: no column is called {names}, found {listed(head, 8)}; {advice}")
    del rows[0]
    if not rows:
        raise DataError(f"{table}: expected lines of file,label")
    return [places[0] if places else None for places in at.values()], len(head)


def _refuse_lists(first_lines: dict[str, str]) -> None:
    """Raise DataError at the first label that is a list. A comma alone makes none ("tench, Tinca tinca"): all its parts must be
    in other labels too."""
    parts = {label: {part.strip() for part in re.split("[,;|]", label)} for label in first_lines}
    counts = Counter(part for of_label in parts.values() for part in of_label)
    for label, where in first_lines.items():
        shared = len(parts[label]) > 1 and all(counts[part] > 1 for part in parts[label])
        if shared or "|" in label or re.fullmatch(r"[\[{(].*[,\"'].*[\]})]", label):
            raise DataError(
                f"{where}: {shown(repr(label))} looks like several labels; each image takes one class. If it is the name of"
                " one class, remove the separators and brackets"
            )


def _rows(table: Path) -> list[tuple[int, list[str]]]:
    """Lines of a table with their numbers; separated by comma, semicolon or tab."""
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
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=True)  # before a quote, too
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as e:
        raise DataError(f"{table} line {reader.line_num}: not a table of file and label: {e}") from None
    if not rows or len(rows[0][1]) < 2:
        raise DataError(f"{table}: expected lines of file,label")
    return rows
