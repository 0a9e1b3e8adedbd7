"""What a run trains on: its source and split, the batches made of them, and the images that it evaluates."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from muscle_plugin.data.checks import check_labels
from muscle_plugin.data.sources import Source, SourceOptions, load_source
from muscle_plugin.data.splits import Split, draw_split, read_split
from muscle_plugin.data.views import Batches, FixedImages
from muscle_plugin.errors import DataError
from muscle_plugin.registry.extension import PLUGIN_NETS
from muscle_plugin.registry.names import NETS


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


def read_source(args: Namespace) -> Source:
    """The data set that completed settings name, or ``args.source`` if there is one.

    Raises:
        DataError: it cannot be had, or its number of classes is not that of the settings.
    """
    given: Source | None = getattr(args, "source", None)
    if given is not None:
        args.num_classes = len(given.classes)
        return given
    try:
        data_dir = Path(args.data_dir).expanduser()
    except RuntimeError as e:
        raise DataError(f"data_dir: {args.data_dir}: {e}") from None
    # beside the data if that can be written, else beside the runs
    caches = [Path(args.cache_dir)] if args.cache_dir else [data_dir / ".packed", Path(args.save_dir) / ".packed"]
    source = load_source(
        args.dataset,
        SourceOptions(
            data_dir, args.img_size, split_seed(args), Path(args.labels_csv) if args.labels_csv else None,
            args.skip_bad_images, caches, args.allow_outside,
        ),
    )  # fmt: skip
    if args.num_classes not in (None, len(source.classes)):
        raise DataError(f"num_classes: {args.dataset} has {len(source.classes)} classes here, got {args.num_classes}")
    args.num_classes = len(source.classes)
    check_labels(source, args.dataset)
    return source


def read_or_draw_split(args: Namespace, source: Source) -> Split:
    """The split that completed settings name.

    Raises:
        DataError: it cannot be drawn or read.
    """
    if args.split_file:
        split = read_split(Path(args.split_file), source, args.include_lb_to_ulb)
        if args.num_labels not in (None, len(split.labelled)):
            raise DataError(
                f"split_file: {args.split_file} has {len(split.labelled)} labelled images, but num_labels is"
                f" {args.num_labels}; leave num_labels out or make them agree"
            )
        return split
    return draw_split(
        source, args.num_labels, split_seed(args), args.include_lb_to_ulb, args.lb_imb_ratio, args.sequestered
    )


def split_seed(args: Namespace) -> int:
    """The seed of the labelled subset."""
    return int(args.seed if args.split_seed is None else args.split_seed)


def complete_sizes(args: Namespace, split: Split) -> tuple[int, int]:
    """Write into ``args`` what USB's classes compute sizes from, and return J and I, images of either kind per step."""
    labelled, unlabelled = args.batch_size, round(args.batch_size * args.uratio)
    args.num_labels = args.lb_dest_len = len(split.labelled)
    args.ulb_dest_len = len(split.unlabelled)
    # an exact ratio: USB computes sizes such as int(queue * (uratio + 1) * batch_size), where a float falls short
    args.uratio = unlabelled // labelled if unlabelled % labelled == 0 else Fraction(unlabelled, labelled)
    if not args.num_train_iter:  # USB's train.py takes no None
        args.num_train_iter = max(1, round(args.epoch * len(split.unlabelled) / unlabelled))
    return labelled, unlabelled


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
        batches.images.all_images(), members, labels, batches.normalise, args.eval_batch_size, batches.device, args.rank,
        args.world_size,
    )  # fmt: skip
