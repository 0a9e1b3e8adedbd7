"""Names and facts of data sets and nets, without importing what loads them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetInfo:
    """What a configuration must know of a data set before it is loaded."""

    num_classes: int
    img_size: int
    channels: int
    weak_augment: str
    hard_augment: str


DATASETS: dict[str, DatasetInfo] = {
    "digits": DatasetInfo(10, 16, 1, "digits_weak", "digits_hard"),
    "cifar10": DatasetInfo(10, 32, 3, "crop_flip", "iic"),
    "cifar100": DatasetInfo(100, 32, 3, "crop_flip", "iic"),
}

#: This package's own nets.
NETS = ("small_cnn", "cnn13")
