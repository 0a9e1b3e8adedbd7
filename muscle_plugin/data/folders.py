"""Sources made of image files: a folder of one's own, Mini-ImageNet, EuroSAT."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from muscle_plugin.data.images import Pack, find_images, leads_out, name_below, pack, unknown_files
from muscle_plugin.data.sources import Source, SourceOptions
from muscle_plugin.errors import DataError
from muscle_plugin.seeding import derive
from muscle_plugin.text import closest, shown

_MOST_BYTES = 1 << 28  # of a table of labels


@dataclass(frozen=True)
class _Item:
    """An image file, its class (None: not labelled) and whether it is for testing."""

    path: Path
    label: str | None
    test: bool = False


def image_folder(options: SourceOptions) -> Source:
    """Images of one's own: ``labelled/<class>/*``, ``unlabelled/*`` and, if there is a test set, ``test/<class>/*``; or,
    with ``labels_csv``, any tree of images and a table of columns file, label and, optionally, split (train or test).

    Classes are in alphabetical order. An image that no row of the table names, or whose label is empty, is unlabelled.

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
    passed_over: list[str] = []
    if table is None:
        items, passed_over = _from_folders(root)
    else:
        items = _from_csv(root, table, options.allow_outside)
    _refuse_outside(root, [x.path for x in items], options)
    classes = tuple(sorted({x.label for x in items if x.label is not None and not x.test}))
    if len(classes) < 2:
        found = f"only {classes[0]!r}" if classes else "none"
        raise DataError(f"{table or root}: images of at least two classes must be labelled, found {found}")
    tested = {x.label: x.path for x in items if x.test}
    for label, path in tested.items():
        if label not in classes:
            near = _near(str(label), classes)
            raise DataError(f"{path}: class {label!r} is tested, but has no labelled image to train on{near}")
    warnings = passed_over + [
        f"class {c!r} has labelled images, but none to test on{_near(c, [x for x in classes if x != c])}"
        for c in classes
        if tested and c not in tested
    ]
    number = {c: i for i, c in enumerate(classes)}
    packed = pack("folder", root, [x.path for x in items], options.img_size, options.cache_dirs)
    labels = torch.tensor([-1 if x.label is None else number[x.label] for x in items])
    good, notes = _readable(packed, options.skip_bad_images)
    test = torch.tensor([x.test for x in items])
    return Source(
        packed.images, labels, (good & ~test).nonzero().flatten(), (good & test).nonzero().flatten(), classes,
        notes=(*warnings, *notes),
        names=[str(name_below(root, x.path)) for x in items],
    )  # fmt: skip


def _refuse_outside(root: Path, files: Iterable[Path], options: SourceOptions) -> None:
    """Raises DataError if a link leads out of ``root`` and that is not allowed."""
    if not options.allow_outside and (path := leads_out(root, files)):
        raise DataError(f"{path}: a link out of {root}; --allow_outside true follows such links")


def _near(name: str, known: Iterable[str]) -> str:
    near = closest(name, known, cutoff=0.7)
    return f"; is it {near[0]!r}?" if near else ""


def _readable(packed: Pack, skip: bool) -> tuple[Tensor, tuple[str, ...]]:
    """(N,) bool, which images could be read, and a note on those that could not.

    Raises:
        DataError: one could not be read, and ``skip`` is not set.
    """
    good = torch.ones(len(packed.images), dtype=torch.bool)
    if not packed.bad:
        return good, ()
    good[list(packed.bad)] = False
    count, listed = len(packed.bad), packed.faults()
    if not skip:
        raise DataError(f"{count} image file(s) cannot be used: {listed}. --skip-bad-images leaves them out")
    return good, (f"left out {count} image file(s): {listed}",)


def _class_folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _from_folders(root: Path) -> tuple[list[_Item], list[str]]:
    """The items, and notes on what else is there."""

    def part(*names: str) -> Path | None:
        return next((root / n for n in names if (root / n).is_dir()), None)

    labelled, unlabelled, test = part("labelled", "labeled"), part("unlabelled", "unlabeled"), part("test")
    if labelled is None:
        there = ", ".join(shown(repr(p.name)) for p in _class_folders(root)[:5]) or "no folder"
        raise DataError(
            f"{root}: expected the folder labelled/ with a folder for each class, beside unlabelled/ and, optionally, test/"
            f" (found {there}); or give a table of file and label as --labels_csv"
        )
    items = []
    for folder, is_test in ((labelled, False), (test, True)):
        if folder is None:
            continue
        for kind in _class_folders(folder):
            files = find_images(kind)
            if not files:
                raise DataError(f"{kind}: no image in it; put some there, or remove the folder")
            items += [_Item(f, kind.name, is_test) for f in files]
        stray = find_images(folder, deep=False)
        if stray:
            raise DataError(f"{stray[0]}: lies in no class; images go into {folder.name}/<class>/")
    if unlabelled is not None:
        items += [_Item(f, None) for f in find_images(unlabelled)]
    parts = [p for p in (labelled, unlabelled, test) if p is not None]
    return items, _passed_over(root, parts)


def _passed_over(root: Path, parts: Sequence[Path]) -> list[str]:
    """Notes on folders beside ``parts``, and on files in them that are no images by their endings."""
    notes = []
    # some file systems know one folder by `test` and by `Test`
    if others := [p for p in _class_folders(root) if not any(p.samefile(x) for x in parts)]:
        shown_names = ", ".join(shown(repr(p.name)) for p in others[:5]) + (", …" if others[5:] else "")
        notes.append(f"passed over in {root}: {shown_names}; used: {', '.join(p.name for p in parts)}")
    return notes + [f"{root}: {line}" for line in unknown_files(parts)]


def _from_csv(root: Path, table: Path, allow_outside: bool = False) -> list[_Item]:
    """The items of a table, and the images that it does not name.

    Args:
        allow_outside: it may name files that are not below ``root``.
    """
    labels: dict[Path, tuple[str | None, bool]] = {}
    images = find_images(root)
    known = set(images)
    by_real: dict[str, Path] = {}  # where the files are once links are followed; made if a row needs it
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
        if outside and path not in known and _is_file(path):
            images.append(path)
            known.add(path)
        if path not in known:
            raise DataError(f"{where}: {shown(path)}: no such image")
        if split.lower() not in ("", "train", "test"):
            raise DataError(f"{where}: split must be train or test, got {shown(repr(split))}")
        entry = (label or None, split.lower() == "test")
        if entry == (None, True):
            raise DataError(f"{where}: a test image needs a label")
        if labels.get(path, entry) != entry:
            raise DataError(f"{where}: {shown(name)} has another label in an earlier line")
        labels[path] = entry
    return [_Item(p, *labels.get(p, (None, False))) for p in images]


def _real(path: Path) -> str:
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):  # no path at all
        return ""


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no path at all
        return False


def _rows(table: Path) -> list[tuple[int, Sequence[str]]]:
    """Lines of a table with their numbers, without its head; separated by comma, semicolon or tab."""
    try:
        with table.open("rb") as f:  # of a device no more than this is read
            raw = f.read(_MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            raise DataError(f"{table}: larger than {_MOST_BYTES >> 20} MB; not a table of labels")
        text = raw.decode("utf-8-sig")
    except (OSError, ValueError) as e:
        raise DataError(f"{table}: cannot be read: {e}") from None
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


# -------------------------------------------------------------------------------------------------------- Mini-ImageNet


def miniimagenet(
    options: SourceOptions, num_classes: int = 100, per_class: int = 600, test_per_class: int = 100
) -> Source:
    """Mini-ImageNet as the paper divides it (section 5.1): 600 images of each of 100 classes, of which 100 drawn by
    ``options.seed`` are for testing.

    ``data_dir`` (or ``miniimagenet/`` in it) holds one folder per class, or the usual train/, val/ and test/ of 64, 16
    and 20 such folders, whose union is taken.

    Raises:
        DataError: no such folders, another number of classes or of images, or an image cannot be read.
    """
    names = ("", "miniimagenet", "mini-imagenet", "mini_imagenet", "MiniImageNet")
    places = [options.data_dir / n for n in names]
    root, found = next(((p, x) for p in places if p.is_dir() and (x := _class_images(p))), (None, {}))
    if root is None:
        raise DataError(
            f"miniimagenet is not in {options.data_dir}, and has no public download. Put its images there as"
            " train/<class>/*, val/<class>/* and test/<class>/*, or as <class>/*, or give their folder as --data_dir"
        )
    if len(found) != num_classes:
        raise DataError(f"{root}: Mini-ImageNet has {num_classes} classes, found folders of {len(found)}")
    files, labels = [], []
    for number, (name, (folder, members)) in enumerate(sorted(found.items())):
        if len(members) != per_class:
            raise DataError(f"{folder}: Mini-ImageNet has {per_class} images of class {name}, found {len(members)}")
        files += members
        labels += [number] * len(members)
    _refuse_outside(root, files, options)
    packed = pack("miniimagenet", root, files, options.img_size, options.cache_dirs)
    good, notes = _readable(packed, options.skip_bad_images)
    generator = torch.Generator().manual_seed(derive(options.seed, "division"))
    is_test = torch.zeros(len(files), dtype=torch.bool)
    for start in range(0, len(files), per_class):
        is_test[start + torch.randperm(per_class, generator=generator)[:test_per_class]] = True
    return Source(
        packed.images, torch.tensor(labels), (good & ~is_test).nonzero().flatten(),
        (good & is_test).nonzero().flatten(), tuple(sorted(found)), notes=notes,
        names=[str(f.relative_to(root)) for f in files],
    )  # fmt: skip


def _class_images(root: Path) -> dict[str, tuple[Path, list[Path]]]:
    """Class name -> its folder and its images, in either layout; empty if it is neither."""
    parts = [root / p for p in ("train", "val", "test") if (root / p).is_dir()]
    folders = [f for p in parts or [root] for f in _class_folders(p)]
    return {f.name: (f, files) for f in folders if (files := find_images(f))} if len(folders) > 1 else {}


# -------------------------------------------------------------------------------------------------------------- EuroSAT


def eurosat(options: SourceOptions, num_classes: int = 10, training_share: float = 0.8) -> Source:
    """EuroSAT (RGB) divided as USB does: of the files of each class, in order of name, the first 80 % for training, the
    rest for testing.

    ``data_dir``, or ``eurosat/2750/`` (torchvision's), ``eurosat/`` (USB's) or ``2750/`` in it, holds one folder per
    class.

    Raises:
        DataError: no such folders, another number of classes, or an image cannot be read.
    """
    names = ("eurosat/2750", "eurosat", "EuroSAT_RGB", "2750", "")
    places = [options.data_dir / n for n in names]
    root = next((p for p in places if p.is_dir() and len(_class_folders(p)) == num_classes), None)
    if root is None:
        raise DataError(
            f"eurosat is not in {options.data_dir}: expected {num_classes} folders of images, one per class, in"
            " eurosat/2750/, eurosat/ or that folder itself (EuroSAT.zip, the RGB version)"
        )
    files: list[Path] = []
    labels: list[int] = []
    test: list[bool] = []
    classes = [folder.name for folder in _class_folders(root)]
    for number, name in enumerate(classes):
        members = sorted(find_images(root / name), key=lambda p: p.name)
        if len(members) < 2:
            raise DataError(f"{root / name}: no images in it")
        training = int(training_share * len(members))
        files += members
        labels += [number] * len(members)
        test += [i >= training for i in range(len(members))]
    _refuse_outside(root, files, options)
    packed = pack("eurosat", root, files, options.img_size, options.cache_dirs)
    good, notes = _readable(packed, options.skip_bad_images)
    is_test = torch.tensor(test)
    return Source(
        packed.images, torch.tensor(labels), (good & ~is_test).nonzero().flatten(),
        (good & is_test).nonzero().flatten(), tuple(classes), notes=notes,
        names=[str(f.relative_to(root)) for f in files],
    )  # fmt: skip
