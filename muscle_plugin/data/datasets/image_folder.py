"""A folder of image files: one subfolder per class, or a table of labels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from muscle_plugin.data.datasets.image_files import LabelledFile, class_folders, read_image_files
from muscle_plugin.data.datasets.label_table import ABSENT, read_label_table
from muscle_plugin.data.images import find_images, image_suffixes, unknown_files
from muscle_plugin.data.source import Source, SourceOptions
from muscle_plugin.errors import DataError
from muscle_plugin.text import did_you_mean, listed, plural

_LABELLED, _UNLABELLED = ("labelled", "labeled"), ("unlabelled", "unlabeled")
#: Folders in which images lie by what they are for, not by class.
_NO_CLASSES = frozenset([
    *_LABELLED, *_UNLABELLED, "train", "test", "val", "valid", "validation", "images", "labels", "masks", "runs",
])  # fmt: skip


def image_folder(options: SourceOptions) -> Source:
    """Read ``labelled/<class>/*``, ``unlabelled/*`` and, if there is a test set, ``test/<class>/*``; or, with ``labels_csv``,
    any tree of images and a table of columns file, label and, optionally, split (train or test). Folders by class alone, in
    ``data_dir`` or its ``train/``, are labelled images.

    Classes are in alphabetical order. An image that the table does not name, or gives no label, is unlabelled.
    """
    root = options.data_dir
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; --data_dir names the folder that holds labelled/ and unlabelled/")
    table = options.labels_csv
    if table is not None and not table.exists() and (root / table).exists():
        table = root / table
    notes: list[str] = []
    items = read_label_table(root, table, options.allow_outside, notes) if table else _from_folders(root, notes)
    classes = sorted({x.label for x in items if x.label is not None and not x.test})
    if len(classes) < 2:
        found = f"only {classes[0]!r}" if classes else "none"
        how = f" ({'; '.join(notes)})" if notes else ""
        raise DataError(f"{table or root}: images of at least two classes must be labelled, found {found}{how}")
    tested = {x.label: x.path for x in items if x.test}
    for name, path in tested.items():
        if name not in classes:
            hint = did_you_mean(str(name), classes)
            raise DataError(f"{path}: class {name!r} is tested, but has no labelled image to train on{hint}")
    return read_image_files("folder", root, items, classes, options, notes)


def _from_folders(root: Path, notes: list[str]) -> list[LabelledFile]:
    """The image files in the folders of ``root``; adds notes on what else is there, and on what was understood."""
    folders = class_folders(root)
    labelled, unlabelled, test = (_called(names, folders) for names in (_LABELLED, _UNLABELLED, ("test",)))
    labelled, classes = labelled or _called(("train",), folders), []
    if labelled is None and unlabelled is None and (classes := _classes_among(folders)):
        labelled = root
        notes.append(f"{root}: no labelled/; taken for classes: {listed(p.name for p in classes)}")
    if labelled is None:
        there = listed(p.name for p in folders) or "no folder"
        raise DataError(
            f"{root}: expected the folder labelled/ with a folder for each class, beside unlabelled/ and, optionally, test/"
            f" (found {there}); or give a table of file and label as --labels_csv"
        )
    for folder, name in ((labelled, "labelled"), (unlabelled, "unlabelled"), (test, "test")):
        if folder and folder != root and folder.name not in (*_LABELLED, *_UNLABELLED, "test"):
            notes.append(f"{root}: {folder.name}/ is taken for {name}/")
    items = []
    for folder in filter(None, (labelled, test)):
        for of_class in classes if folder == root else class_folders(folder):
            files, name = find_images(of_class), of_class.name.lower()
            if not files:
                raise DataError(f"{of_class}: no image in it; put some there, or remove the folder")
            if name in _LABELLED or (name in _UNLABELLED and folder is test):
                raise DataError(f"{of_class}: cannot be a class; images go into labelled/<class>/ and test/<class>/")
            if name in _UNLABELLED:
                notes.append(f"{of_class}: {plural(len(files), 'image')} taken as unlabelled")
            elif name in ABSENT and folder is labelled:
                notes.append(f"{of_class}: is a class like others; images without a label go into unlabelled/")
            items += [LabelledFile(f, None if name in _UNLABELLED else of_class.name, folder is test) for f in files]
        if stray := _images_in(folder):
            raise DataError(f"{stray[0]}: lies in no class; images go into {folder.name}/<class>/")
    if unlabelled is not None:
        items += [LabelledFile(f, None) for f in find_images(unlabelled)]
    parts = [p for p in (*(classes or [labelled]), unlabelled, test) if p is not None]
    # some file systems know one folder by `test` and by `Test`
    if others := [p for p in folders if not any(p.samefile(x) for x in parts)]:
        names = listed(p.name for p in others)
        notes.append(f"passed over in {root}: {names}; used: {', '.join(p.name for p in parts[:8])}")
    notes += [f"{root}: {line}" for line in unknown_files(parts)]
    return items


def _called(names: Sequence[str], folders: Sequence[Path]) -> Path | None:
    """The first folder of such a name, else one that differs in capitals alone."""
    exact = (f for name in names for f in folders if f.name == name)
    return next(chain(exact, (f for f in folders if f.name.lower() in names)), None)


def _classes_among(folders: Sequence[Path]) -> list[Path]:
    """Those that hold images, not folders of them, if they can be classes and nothing else."""
    found = [f for f in folders if f.name.lower() not in _NO_CLASSES and _images_in(f)]
    return found if len(found) > 1 else []


def _images_in(folder: Path) -> list[Path]:
    """The image files in a folder itself, as :func:`find_images` finds them, which looks into all folders below."""
    suffixes, files = image_suffixes(), (f for f in folder.iterdir() if not f.name.startswith("."))
    return sorted(f for f in files if f.suffix.lower() in suffixes and not f.is_dir())
