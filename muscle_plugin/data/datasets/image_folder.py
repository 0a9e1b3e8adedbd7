"""A folder of image files: one subfolder per class, or a table of labels."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
from pathlib import Path

from muscle_plugin.data.datasets.image_files import LabelledFile, class_folders, read_image_files
from muscle_plugin.data.images import find_images, unknown_files
from muscle_plugin.data.source import Source, SourceOptions
from muscle_plugin.errors import DataError
from muscle_plugin.text import did_you_mean, shown

_MOST_BYTES = 1 << 28  # of a table of labels


def image_folder(options: SourceOptions) -> Source:
    """Read ``labelled/<class>/*``, ``unlabelled/*`` and, if there is a test set, ``test/<class>/*``; or, with ``labels_csv``,
    any tree of images and a table of columns file, label and, optionally, split (train or test).

    Classes are in alphabetical order. An image that the table does not name, or gives no label, is unlabelled.
    """
    root = options.data_dir
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; --data_dir names the folder that holds labelled/ and unlabelled/")
    table = options.labels_csv
    if table is not None and not table.exists() and (root / table).exists():
        table = root / table
    notes: list[str] = []
    items = read_label_table(root, table, options.allow_outside) if table else _from_folders(root, notes)
    classes = sorted({x.label for x in items if x.label is not None and not x.test})
    if len(classes) < 2:
        found = f"only {classes[0]!r}" if classes else "none"
        raise DataError(f"{table or root}: images of at least two classes must be labelled, found {found}")
    tested = {x.label: x.path for x in items if x.test}
    for name, path in tested.items():
        if name not in classes:
            hint = did_you_mean(str(name), classes)
            raise DataError(f"{path}: class {name!r} is tested, but has no labelled image to train on{hint}")
    return read_image_files("folder", root, items, classes, options, notes)


def _from_folders(root: Path, notes: list[str]) -> list[LabelledFile]:
    """The image files in the folders of ``root``; adds notes on what else is there."""
    labelled, unlabelled, test = (
        next((root / n for n in names if (root / n).is_dir()), None)
        for names in (("labelled", "labeled"), ("unlabelled", "unlabeled"), ("test",))
    )
    if labelled is None:
        there = ", ".join(shown(repr(p.name)) for p in class_folders(root)[:5]) or "no folder"
        raise DataError(
            f"{root}: expected the folder labelled/ with a folder for each class, beside unlabelled/ and, optionally, test/"
            f" (found {there}); or give a table of file and label as --labels_csv"
        )
    items = []
    for folder in filter(None, (labelled, test)):
        for of_class in class_folders(folder):
            files = find_images(of_class)
            if not files:
                raise DataError(f"{of_class}: no image in it; put some there, or remove the folder")
            items += [LabelledFile(f, of_class.name, folder is test) for f in files]
        if stray := [f for f in find_images(folder) if f.parent == folder]:
            raise DataError(f"{stray[0]}: lies in no class; images go into {folder.name}/<class>/")
    if unlabelled is not None:
        items += [LabelledFile(f, None) for f in find_images(unlabelled)]
    parts = [p for p in (labelled, unlabelled, test) if p is not None]
    # some file systems know one folder by `test` and by `Test`
    if others := [p for p in class_folders(root) if not any(p.samefile(x) for x in parts)]:
        names = ", ".join(shown(repr(p.name)) for p in others[:5]) + (", …" if others[5:] else "")
        notes.append(f"passed over in {root}: {names}; used: {', '.join(p.name for p in parts)}")
    notes += [f"{root}: {line}" for line in unknown_files(parts)]
    return items


def read_label_table(root: Path, table: Path, allow_outside: bool) -> list[LabelledFile]:
    """Return the files that a table of file, label and, optionally, train or test names, by paths relative to ``root``, and the
    images below ``root`` that it does not name."""
    # image -> its label and whether it is for testing, once a line has named it
    found: dict[Path, tuple[str | None, bool] | None] = dict.fromkeys(find_images(root))
    by_real: dict[str, Path] = {}  # by path with links resolved; made if a row needs it
    for line, row in _rows(table):
        where = f"{table} line {line}"
        name, label, split = ([c.strip() for c in row] + ["", "", ""])[:3]
        relative = Path(os.path.normpath(name)) if name else Path()
        outside = relative.is_absolute() or relative.parts[:1] == ("..",)
        path = root / relative
        if outside:  # or so it is written: an absolute path may lead to an image of the folder
            by_real = by_real or {os.path.realpath(p): p for p in found}
            with contextlib.suppress(OSError, ValueError):  # what is no path at all
                path = by_real.get(os.path.realpath(path), path)
        if not name or (outside and path not in found and not allow_outside):
            hint = "; --allow_outside true permits others" if name else ""
            raise DataError(f"{where}: {shown(repr(name))} is not the path of a file in {root}{hint}")
        if outside and os.path.isfile(path):
            found.setdefault(path)
        if path not in found:
            raise DataError(f"{where}: {shown(path)}: no such image")
        if split.lower() not in ("", "train", "test"):
            raise DataError(f"{where}: split must be train or test, got {shown(repr(split))}")
        entry = (label or None, split.lower() == "test")
        if entry == (None, True):
            raise DataError(f"{where}: a test image needs a label")
        if found[path] not in (None, entry):
            raise DataError(f"{where}: {shown(name)} has another label in an earlier line")
        found[path] = entry
    return [LabelledFile(path, *(entry or (None, False))) for path, entry in found.items()]


def _rows(table: Path) -> list[tuple[int, list[str]]]:
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
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as e:
        raise DataError(f"{table} line {reader.line_num}: not a table of file and label: {e}") from None
    if rows and rows[0][1][0].strip().lower() in ("file", "filename", "image", "path"):
        del rows[0]
    if not rows or len(rows[0][1]) < 2:
        raise DataError(f"{table}: expected lines of file,label")
    return rows
