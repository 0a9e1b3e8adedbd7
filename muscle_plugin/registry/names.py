"""Names and facts of data sets, nets and views, of this package and of plugins, without importing what loads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DatasetInfo:
    """Facts of a data set that are known before it is loaded, and its defaults of the settings of these names."""

    num_classes: int | None  # None: known once its files are read
    img_size: int
    channels: int = 3
    num_labels: int | None = None  # None: every label there is
    subclasses: int = 1  # per class (CIFAR-20)
    sequestered: int = 0
    weak_augment: str = "crop_flip"
    hard_augment: str = "randaugment"

    def label_groups(self, sequestered: int) -> int | None:
        """The number of groups that share the labels equally: classes, or the subclasses that give labels."""
        return None if self.num_classes is None else self.num_classes * (self.subclasses - sequestered)


DATASETS: dict[str, DatasetInfo] = {
    "digits": DatasetInfo(10, 16, 1, num_labels=10, weak_augment="digits_weak", hard_augment="digits_hard"),
    "cifar10": DatasetInfo(10, 32, num_labels=250),
    "cifar100": DatasetInfo(100, 32, num_labels=2500),
    "cifar20": DatasetInfo(20, 32, num_labels=800, subclasses=5, sequestered=1),
    "miniimagenet": DatasetInfo(100, 84, num_labels=4000),
    "stl10": DatasetInfo(10, 96, num_labels=40),
    "svhn": DatasetInfo(10, 32, num_labels=40),
    "svhn_noextra": DatasetInfo(10, 32, num_labels=40),
    "eurosat": DatasetInfo(10, 64, num_labels=20),
    "folder": DatasetInfo(None, 64),
}


@dataclass(frozen=True)
class PluginDataset:
    """A registered data set: the function that reads it, the channels of its images, and the file that defines it."""

    read: Callable[[Any], Any]
    channels: int
    place: str


@dataclass(frozen=True)
class PluginNet:
    """A registered net: the function that builds it, and the file that defines it."""

    build: Callable[..., Any]
    place: str


#: What plugins have registered with :mod:`muscle_plugin.extend`, by name; facts of the data sets are in ``DATASETS`` too.
PLUGIN_DATASETS: dict[str, PluginDataset] = {}
PLUGIN_NETS: dict[str, PluginNet] = {}

#: This package's own nets, and how the name of a net of timm begins.
NETS = ("small_cnn", "cnn13", "resnet18_84")
TIMM = "timm:"

#: What a ``train_step`` may ask for: views, then labels and indices, then rotations (:mod:`muscle_plugin.data.views`).
STEP_PARAMETERS = (
    "x_lb", "x_lb_w2", "x_lb_s", "x_ulb_w", "x_ulb_w2", "x_ulb_m", "x_ulb_s", "x_ulb_s_0", "x_ulb_s_1", "x_ulb_s_2",
    "idx_lb", "idx_ulb", "y_lb", "x_ulb_s_0_rot", "x_ulb_rot", "rot_v",
)  # fmt: skip
