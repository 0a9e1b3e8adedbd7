"""The data set, and the labelled part of it, that settings ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from muscle_plugin.data.checks import check_labels
from muscle_plugin.data.datasets import load_source
from muscle_plugin.data.source import Source, SourceOptions
from muscle_plugin.data.splits import Split, draw_split, read_split
from muscle_plugin.errors import DataError
from muscle_plugin.registry.names import DATASETS


class DataSettings(Protocol):
    """The settings read here, with their names and meanings in ``settings.schema``."""

    @property
    def dataset(self) -> str: ...

    @property
    def data_dir(self) -> str: ...

    @property
    def img_size(self) -> int | None: ...

    @property
    def num_classes(self) -> int | None: ...

    @property
    def labels_csv(self) -> str | None: ...

    @property
    def skip_bad_images(self) -> bool: ...

    @property
    def allow_outside(self) -> bool: ...

    @property
    def cache_dir(self) -> str | None: ...

    @property
    def save_dir(self) -> str: ...

    @property
    def num_labels(self) -> int | None: ...

    @property
    def seed(self) -> int: ...

    @property
    def split_seed(self) -> int | None: ...

    @property
    def split_file(self) -> str | None: ...

    @property
    def include_lb_to_ulb(self) -> bool: ...

    @property
    def lb_imb_ratio(self) -> float: ...

    @property
    def sequestered(self) -> int | None: ...


def load_data(settings: DataSettings) -> Source:
    """Read the data set, and check its labels.

    Raises:
        DataError: the data set cannot be read, or has another number of classes than the settings say.
    """
    try:
        data_dir = Path(settings.data_dir).expanduser()
    except RuntimeError as e:  # no such user
        raise DataError(f"data_dir: {settings.data_dir}: {e}") from None
    # beside the data if that can be written, else beside the runs
    packed = [data_dir / ".packed", Path(settings.save_dir) / ".packed"]
    options = SourceOptions(
        data_dir,
        settings.img_size or DATASETS[settings.dataset].img_size,
        seed=split_seed(settings),
        labels_csv=Path(settings.labels_csv) if settings.labels_csv else None,
        skip_bad_images=settings.skip_bad_images,
        cache_dirs=[Path(settings.cache_dir)] if settings.cache_dir else packed,
        allow_outside=settings.allow_outside,
    )
    source = load_source(settings.dataset, options)
    classes = len(source.classes)
    if settings.num_classes not in (None, classes):
        raise DataError(f"num_classes: {settings.dataset} has {classes} classes here, got {settings.num_classes}")
    check_labels(source, settings.dataset)
    return source


def choose_split(settings: DataSettings, source: Source) -> Split:
    """Read the labelled subset from ``split_file``, or draw it.

    Raises:
        DataError: it can be neither drawn nor read, or disagrees with ``num_labels``.
    """
    if not settings.split_file:
        return draw_split(
            source,
            settings.num_labels,
            split_seed(settings),
            settings.include_lb_to_ulb,
            settings.lb_imb_ratio,
            settings.sequestered or 0,
        )
    split = read_split(Path(settings.split_file), source, settings.include_lb_to_ulb)
    if settings.num_labels not in (None, len(split.labelled)):
        raise DataError(
            f"split_file: {settings.split_file} has {len(split.labelled)} labelled images, but num_labels is"
            f" {settings.num_labels}; leave num_labels out or make them agree"
        )
    return split


def split_seed(settings: DataSettings) -> int:
    """Return the seed of the labelled subset: ``split_seed``, by default ``seed``."""
    return settings.seed if settings.split_seed is None else settings.split_seed
