"""What a run trains on and evaluates: its batches, its images, and both as USB's classes and ``Trainer`` expect them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from muscle_plugin import distributed
from muscle_plugin.data.batches import Batches
from muscle_plugin.data.load import cache_dirs
from muscle_plugin.data.loader import FixedImages
from muscle_plugin.data.normalise import Preprocessing
from muscle_plugin.data.source import Source
from muscle_plugin.data.splits import Split
from muscle_plugin.data.view_pool import PooledBatches
from muscle_plugin.data.views import LABELLED, STRONG, WEAK
from muscle_plugin.errors import RunError
from muscle_plugin.nets.build import pretrained_statistics
from muscle_plugin.registry.names import NETS, PLUGIN_NETS
from muscle_plugin.settings.schema import RunSettings

if TYPE_CHECKING:
    from muscle_plugin.training.host import Host


def channels_for(settings: RunSettings, source: Source) -> int:
    """The channels of the images that a net is given: own nets and those of plugins take the data's; others want three."""
    takes_any = settings.net in (*NETS, *PLUGIN_NETS) and not settings.net_from_name
    return source.images.shape[1] if takes_any else 3


def make_batches(host: Host) -> Batches:
    """The maker of a run's training batches; see :class:`Batches` for what it refuses."""
    s, encoder = host.settings, host.encoder
    found = pretrained_statistics(s)
    preprocessing = Preprocessing(s.net_size)
    if found:
        mean, std, interpolation = found
        preprocessing = Preprocessing(s.net_size, interpolation, (torch.tensor(mean), torch.tensor(std)))
    shared = (
        host.source, host.split, *host.batch_sizes, host.step_parameters(), host.usb_name, s.weak_augment, s.hard_augment,
        channels_for(s, host.source), s.seed, host.device, s.data_on, s.num_workers, s.hard_ops,
        distributed.rank(), distributed.world_size(), preprocessing, encoder,
    )  # fmt: skip
    if encoder is None or s.view_pool == "none":
        return Batches(*shared)
    weak, strong = map(int, s.view_pool.split(","))
    by_strength = {WEAK: s.weak_augment, STRONG: f"{s.weak_augment} {s.hard_augment} {s.hard_ops}"}
    backbone = {"net": s.net, "weights": encoder.digest, "precision": host.precision}
    return PooledBatches(
        *shared, counts={WEAK: weak, STRONG: strong}, backbone=backbone,
        places=cache_dirs(s), name=s.dataset, augmentations=by_strength,
    )  # fmt: skip


def fixed_images(host: Host, members: Tensor) -> FixedImages:
    """Batches of the images ``members`` of a run's source, without augmentation."""
    images, to_net = host.batches.fixed
    labels = host.source.labels[members].to(images.device)
    return FixedImages(
        images, members, labels, to_net, host.settings.eval_batch_size, host.device,
        distributed.rank(), distributed.world_size(),
    )  # fmt: skip


@dataclass(frozen=True)
class ImageSet:
    """What USB's classes ask of a data set: its labels, and its length."""

    targets: list[int]

    def __len__(self) -> int:
        return len(self.targets)


def image_sets(source: Source, split: Split) -> dict[str, ImageSet | None]:
    """USB's ``dataset_dict``; the unlabelled images have no labels that training could read."""
    return {
        "train_lb": ImageSet(source.train_labels[split.labelled].tolist()),
        "train_ulb": ImageSet([-1] * len(split.unlabelled)),
        "eval": ImageSet(source.test_labels.tolist()),
        "test": None,
    }


class StepLoader:
    """One kind of image of the steps that follow the algorithm's present one, an epoch per iteration: a loader for
    ``semilearn.Trainer.fit``, which yields for each step the entries of ``Batches.batch`` that belong to that kind.
    ``shared``: step -> its batch, the same dictionary for both kinds.
    """

    sampler = None

    def __init__(self, algorithm: Host, kind: str, shared: dict[int, dict[str, Tensor]]) -> None:
        self._algorithm, self._kind, self._shared = algorithm, kind, shared

    def __len__(self) -> int:
        return max(1, self._algorithm.num_iter_per_epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        algorithm, shared = self._algorithm, self._shared
        first = algorithm.it
        labelled = {"idx_lb", "y_lb", *(n for n, v in algorithm.batches.views.items() if v.images == LABELLED)}
        for step in range(first, first + len(self)):
            if algorithm.it > 0 and not algorithm.updates:
                raise RunError(
                    "semilearn's Trainer has taken a step without updating the weights: that of USB's git main calls no"
                    " hooks (patches/main mends it); use algorithm.train()"
                )
            if step not in shared:
                shared.clear()
                shared[step] = algorithm.batches.batch(step)
            yield {k: v for k, v in shared[step].items() if (k in labelled) == (self._kind == LABELLED)}
