"""What a run trains on: its source and split, the batches made of them, and the images that it evaluates."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

import torch
from torch import Tensor

from muscle_plugin.data.batches import Batches
from muscle_plugin.data.loader import FixedImages
from muscle_plugin.data.source import Source
from muscle_plugin.data.splits import Split
from muscle_plugin.registry.names import NETS, PLUGIN_NETS


class ImageSet:
    """A data set as USB's classes expect one: ``data`` (made on demand), ``targets``, ``len``."""

    def __init__(self, source: Source, members: Tensor, targets: Tensor) -> None:
        self._source, self._members, self.targets = source, members, targets.tolist()

    @property
    def data(self) -> Tensor:
        return self._source.images[self._members]

    def __len__(self) -> int:
        return len(self.targets)


def image_sets(source: Source, split: Split) -> dict[str, ImageSet | None]:
    """USB's ``dataset_dict``; the unlabelled images have no labels that training could read."""
    labelled, unlabelled = split.labelled, split.unlabelled
    hidden = torch.full((len(unlabelled),), -1)
    return {
        "train_lb": ImageSet(source, source.train[labelled], source.train_labels[labelled]),
        "train_ulb": ImageSet(source, source.train[unlabelled], hidden),
        "eval": ImageSet(source, source.test, source.test_labels),
        "test": None,
    }


def sequestered_tests(source: Source, split: Split) -> Tensor | None:
    """(M,) bool: test images of sequestered subclasses; None if there are none."""
    if source.subclasses is None or not len(split.sequestered):
        return None
    return torch.isin(source.subclasses[source.test], torch.tensor(split.sequestered, dtype=torch.int64))


def make_batches(
    args: Namespace,
    source: Source,
    split: Split,
    sizes: tuple[int, int],
    parameters: Sequence[str],
    usb_name: str,
    device: torch.device,
) -> Batches:
    """The maker of training batches for a ``train_step`` of these parameters.

    Raises:
        DataError: a view or an augmentation is unknown, or the images cannot be shared equally by the processes.
    """
    # own nets and those of plugins take the data's channels; USB's and torchvision's want three
    takes_any = args.net in (*NETS, *PLUGIN_NETS) and not args.net_from_name
    return Batches(
        source, split, *sizes, parameters, usb_name, args.weak_augment, args.hard_augment,
        source.images.shape[1] if takes_any else 3, args.seed, device, args.data_on, args.num_workers, args.hard_ops,
        args.rank, args.world_size,
    )  # fmt: skip


def fixed_images(args: Namespace, source: Source, members: Tensor, batches: Batches) -> FixedImages:
    """The images ``members`` of the source, without augmentation, where ``batches`` has its images."""
    labels = source.labels[members]
    if batches.resident:
        labels = labels.to(batches.device)
    return FixedImages(
        batches.images.pool, members, labels, batches.normalise, args.eval_batch_size, batches.device, args.rank,
        args.world_size,
    )  # fmt: skip
