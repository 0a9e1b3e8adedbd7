"""The data set, and the labelled part of it, that settings ask for."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from muscle_plugin.data.checks import check_labels
from muscle_plugin.data.datasets import load_source
from muscle_plugin.data.images import PixelRange
from muscle_plugin.data.source import Source, SourceOptions
from muscle_plugin.data.splits import Split, draw_split, read_split
from muscle_plugin.errors import DataError
from muscle_plugin.registry.catalogue import sees_unlabelled
from muscle_plugin.settings.schema import RunSettings
from muscle_plugin.text import shown


def cache_dirs(settings: RunSettings) -> list[Path]:
    """Folders for array files: beside the data if that can be written, else beside the runs."""
    if settings.cache_dir:
        return [Path(settings.cache_dir)]
    return [Path(folder) / ".packed" for folder in (settings.data_dir, settings.save_dir)]


def load_data(settings: RunSettings) -> Source:
    """Read the data set, and check its labels.

    Raises:
        DataError: the data set cannot be read, or has another number of classes than the settings say.
    """
    data_dir = Path(settings.data_dir)
    black, _, white = (settings.pixel_range or "").partition(",")
    options = SourceOptions(
        data_dir,
        settings.img_size,
        seed=split_seed(settings),
        labels_csv=Path(settings.labels_csv) if settings.labels_csv else None,
        skip_bad_images=settings.skip_bad_images,
        cache_dirs=cache_dirs(settings),
        allow_outside=settings.allow_outside,
        pixel_range=PixelRange(int(black), int(white), overrides=True) if white else None,
    )
    source = load_source(settings.dataset, options)
    classes = len(source.classes)
    if settings.num_classes not in (None, classes):
        raise DataError(f"num_classes: {settings.dataset} has {classes} classes here, got {settings.num_classes}")
    check_labels(source, settings.dataset)
    return replace(source, notes=(*source.notes, *_alike(source.classes)))


def _alike(classes: Sequence[str]) -> list[str]:
    """Name classes that may be one: but for capitals, what separates words, Unicode's forms, or the end of a number."""
    groups: dict[str, list[str]] = {}
    for name in classes:
        plain = re.sub(r"(?<=\d)\.0+$", "", unicodedata.normalize("NFKC", name).casefold().strip())
        groups.setdefault(re.sub(r"[\s_-]+", " ", plain), []).append(shown(ascii(name)))
    alike = [" and ".join(group) for group in groups.values() if len(group) > 1]
    more = f" (and {len(alike) - 5} more like these)" if alike[5:] else ""
    return [f"different classes: {'; '.join(alike[:5])}{more}; rename them if they are the same"] if alike else []


def choose_split(settings: RunSettings, source: Source) -> Split:
    """Read the labelled subset from ``split_file``, or draw it.

    Raises:
        DataError: it can be neither drawn nor read, disagrees with ``num_labels``, or leaves no unlabelled image where some
            are needed.
    """
    s = settings
    if s.split_file:
        split = read_split(Path(s.split_file), source, s.include_lb_to_ulb)
        if s.num_labels not in (None, len(split.labelled)):
            raise DataError(
                f"split_file: {s.split_file} has {len(split.labelled)} labelled images, but num_labels is {s.num_labels};"
                " leave num_labels out or make them agree"
            )
    else:
        split = draw_split(source, s.num_labels, split_seed(s), s.include_lb_to_ulb, s.lb_imb_ratio, s.sequestered)
    if len(split.unlabelled):
        return split
    if sees_unlabelled(s.algorithm):
        raise DataError(
            f"all {len(source.train)} training images are labelled, none is left unlabelled: add unlabelled images, give a"
            " smaller --num_labels, which hides the labels of the rest, or --include_lb_to_ulb true, which uses the labelled"
            " images without their labels too"
        )
    return replace(split, unlabelled=split.labelled)  # for the length of an epoch


def split_seed(settings: RunSettings) -> int:
    """Return the seed of the labelled subset: ``split_seed``, by default ``seed``."""
    return settings.seed if settings.split_seed is None else settings.split_seed
