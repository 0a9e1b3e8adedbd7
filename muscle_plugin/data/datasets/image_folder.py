"""A folder of image files: one subfolder per class, or a table of labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from muscle_plugin.data.datasets.image_files import class_folders, read_image_files
from muscle_plugin.data.datasets.label_table import LabelledFile, read_label_table
from muscle_plugin.data.images import find_images, unknown_files
from muscle_plugin.data.source import Source, SourceOptions
from muscle_plugin.errors import DataError
from muscle_plugin.text import shown


def image_folder(options: SourceOptions) -> Source:
    """Read ``labelled/<class>/*``, ``unlabelled/*`` and, if there is a test set, ``test/<class>/*``; or, with ``labels_csv``,
    any tree of images and a table of columns file, label and, optionally, split (train or test).

    Classes are in alphabetical order. An image that the table does not name, or gives no label, is unlabelled.

    Raises:
        DataError: the layout is another, a class is empty or unknown, an image cannot be read, or lies outside ``data_dir``
            and that is not allowed.
    """
    root = options.data_dir
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; --data_dir names the folder that holds labelled/ and unlabelled/")
    table = options.labels_csv
    if table is not None and not table.exists() and (root / table).exists():
        table = root / table
    if table is None:
        items, notes = _from_folders(root)
    else:
        items, notes = read_label_table(root, table, options.allow_outside), []
    classes = sorted({x.label for x in items if x.label is not None and not x.test})
    if len(classes) < 2:
        found = f"only {classes[0]!r}" if classes else "none"
        raise DataError(f"{table or root}: images of at least two classes must be labelled, found {found}")
    tested = {x.label: x.path for x in items if x.test}
    for name, path in tested.items():
        if name not in classes:
            hint = _similar(str(name), classes)
            raise DataError(f"{path}: class {name!r} is tested, but has no labelled image to train on{hint}")
    for name in classes if tested else ():
        if name not in tested:
            hint = _similar(name, [c for c in classes if c != name])
            notes.append(f"class {name!r} has labelled images, but none to test on{hint}")
    number = {c: i for i, c in enumerate(classes)}
    labels = [-1 if x.label is None else number[x.label] for x in items]
    files = [x.path for x in items]
    return read_image_files("folder", root, files, labels, [x.test for x in items], classes, options, notes)


def _similar(name: str, known: Iterable[str]) -> str:
    by_lower = {k.lower(): k for k in known}
    found = get_close_matches(name.lower(), by_lower, 1, 0.7)
    return f"; is it {by_lower[found[0]]!r}?" if found else ""


def _from_folders(root: Path) -> tuple[list[LabelledFile], list[str]]:
    """The image files in the folders of ``root``, and notes on what else is there."""

    def part(*names: str) -> Path | None:
        return next((root / n for n in names if (root / n).is_dir()), None)

    labelled, unlabelled, test = part("labelled", "labeled"), part("unlabelled", "unlabeled"), part("test")
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
        if stray := find_images(folder, deep=False):
            raise DataError(f"{stray[0]}: lies in no class; images go into {folder.name}/<class>/")
    if unlabelled is not None:
        items += [LabelledFile(f, None) for f in find_images(unlabelled)]
    return items, _passed_over(root, [p for p in (labelled, unlabelled, test) if p is not None])


def _passed_over(root: Path, parts: Sequence[Path]) -> list[str]:
    """Notes on folders beside ``parts``, and on files in them that are not images by their suffixes."""
    notes = []
    # some file systems know one folder by `test` and by `Test`
    if others := [p for p in class_folders(root) if not any(p.samefile(x) for x in parts)]:
        names = ", ".join(shown(repr(p.name)) for p in others[:5]) + (", …" if others[5:] else "")
        notes.append(f"passed over in {root}: {names}; used: {', '.join(p.name for p in parts)}")
    return notes + [f"{root}: {line}" for line in unknown_files(parts)]
