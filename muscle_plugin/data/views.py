"""Views: which of them a training step needs is read off the parameters of its ``train_step``, by one table.

USB decides this by the algorithm's name in its data set class. Here a parameter's name is enough, save for the three
algorithms in which ``x_ulb_s`` is a second weak view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from muscle_plugin.data.augment import AFTER_WEAK, AUGMENTATIONS, Augmentation
from muscle_plugin.data.draws import Draws, Part, Random
from muscle_plugin.data.errors import DataError
from muscle_plugin.data.loader import ResidentImages, StreamedImages, fits
from muscle_plugin.data.sampler import IndexStream
from muscle_plugin.data.sources import Source
from muscle_plugin.data.splits import Split
from muscle_plugin.seeding import derive

LABELLED, UNLABELLED = "labelled", "unlabelled"
WEAK, MEDIUM, HARD = "weak", "medium", "hard"


@dataclass(frozen=True)
class View:
    """One view of the images of a batch: of which images, how augmented, how many draws per image."""

    images: str
    strength: str
    count: int = 1


#: Parameter of ``train_step`` -> the view it wants.
VIEWS: dict[str, View] = {
    "x_lb": View(LABELLED, WEAK),
    "x_lb_w2": View(LABELLED, WEAK),
    "x_lb_s": View(LABELLED, HARD),
    "x_ulb_w": View(UNLABELLED, WEAK),
    "x_ulb_w2": View(UNLABELLED, WEAK),
    "x_ulb_m": View(UNLABELLED, MEDIUM),
    "x_ulb_s": View(UNLABELLED, HARD),
    "x_ulb_s_0": View(UNLABELLED, HARD),
    "x_ulb_s_1": View(UNLABELLED, HARD),
    "x_ulb_s_2": View(UNLABELLED, HARD),
}
#: USB classes whose ``x_ulb_s`` is a second weak view.
SECOND_WEAK_VIEW = frozenset({"pimodel", "meanteacher", "mixmatch"})
#: Parameters that are not images.
INDICES = ("idx_lb", "idx_ulb", "y_lb")
#: Parameters that are rotations of other views; ``rot_v`` holds the number of quarter turns.
ROTATIONS = ("x_ulb_s_0_rot", "x_ulb_rot", "rot_v")
#: Images for which ``Batches.features`` draws views at a time.
FEATURES_AT_A_TIME = 256


def views_of(parameters: Sequence[str], usb_name: str) -> dict[str, View]:
    """The image views among the parameters of a ``train_step``.

    Args:
        parameters: parameter names, without self.
        usb_name: the name under which USB registers the class.

    Raises:
        DataError: a parameter is not one that the table knows.
    """
    found = {}
    for name in parameters:
        if name in VIEWS:
            second_weak = name == "x_ulb_s" and usb_name in SECOND_WEAK_VIEW
            found[name] = View(UNLABELLED, WEAK) if second_weak else VIEWS[name]
        elif name not in INDICES and name not in ROTATIONS:
            known = ", ".join((*VIEWS, *INDICES, *ROTATIONS))
            raise DataError(
                f"{usb_name}: its train_step asks for {name!r}, a view this package does not make; known: {known}"
            )
    return found


def quarter_turns(images: Tensor, turns: Tensor) -> Tensor:
    """Each image turned counter-clockwise by ``turns`` quarters; (N,) on the CPU, so that no device is waited for."""
    out = images.clone()
    for k in (1, 2, 3):
        chosen = (turns == k).nonzero().flatten().to(images.device, non_blocking=True)
        out[chosen] = torch.rot90(images[chosen], k, (2, 3))
    return out


class Batches:
    """Makes the batch of any training step from its number alone.

    Args:
        source: the data set.
        split: which of its training images are labelled and unlabelled.
        labelled, unlabelled: J and I, images of either kind per step.
        parameters: the parameters of ``train_step``.
        usb_name: the name of the USB class whose step it is.
        weak, hard: names of augmentations.
        channels: channels that the net wants; a single channel is repeated.
        seed: the run's seed.
        device: where the views are made.
        data_on: ``device``: the images live there, as uint8; ``host``: they stay where they are and are brought step by
            step; ``auto``: on the device if they fit.
        workers: processes that bring them.
        hard_ops: operations per hard view, where the augmentation draws some; None: as it does by itself.
        rank, world: this process and their number: each makes its own part of the batch, J / world and I / world images.

    Raises:
        DataError: a parameter or an augmentation is not known, or the images cannot be shared equally by the processes.
    """

    def __init__(
        self,
        source: Source,
        split: Split,
        labelled: int,
        unlabelled: int,
        parameters: Sequence[str],
        usb_name: str,
        weak: str,
        hard: str,
        channels: int,
        seed: int,
        device: torch.device,
        data_on: str = "device",
        workers: int = 0,
        hard_ops: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        check_shared_equally(labelled, unlabelled, world)
        self._rank, self._world = rank, world
        self.device, self.seed, self.parameters, self.channels = device, seed, tuple(parameters), channels
        self._asked = views_of(parameters, usb_name)
        self.views: dict[str, View] = dict(self._asked)
        weakly = augmentation(weak)
        # USB's medium view is one operation of RandAugment; of an augmentation that draws none it is a hard view
        medium = 1 if hard in AFTER_WEAK else None
        self._augment = {
            WEAK: weakly,
            MEDIUM: augmentation(hard, weakly, medium),
            HARD: augmentation(hard, weakly, hard_ops),
        }
        self._labels = source.train_labels[split.labelled].to(device)
        self.size = {LABELLED: labelled // world, UNLABELLED: unlabelled // world}
        whole = {LABELLED: labelled, UNLABELLED: unlabelled}
        members = {LABELLED: source.train[split.labelled], UNLABELLED: source.train[split.unlabelled]}
        streams = {kind: IndexStream(len(m), whole[kind], seed, kind, rank, world) for kind, m in members.items()}
        self.resident = data_on == "device" or (data_on == "auto" and fits(source.images, device))
        self.images: ResidentImages | StreamedImages = (
            ResidentImages(source.images, members, streams, device)
            if self.resident
            else StreamedImages(source.images, members, streams, device, workers)
        )
        self.statistics = pixel_statistics(source)
        self.normalise = normaliser(*self.statistics, channels, device)

    def add_views(self, views: Mapping[str, View]) -> None:
        """Beside the views that the step asks for make these, under these names (MUSCLE's hard views; count V gives
        (V * N, ...), V-major), and no others."""
        self.views = {**self._asked, **views}

    def features(self, net: Any, members: Tensor, step: int, batch: int, precision: Callable[[], Any]) -> Tensor:
        """(n, F) float32 features that a net in eval mode has of weakly augmented images, on the device; of several
        processes each gets those of its part of the images, in order.

        Args:
            members: (N,) indices into the source's images.
            step: with the seed, fixes the augmentation.
            batch: images that the net is given at a time, at most; views do not depend on it.
            precision: makes the context of a forward pass.
        """
        was_training, parts = net.training, []
        generator = self._generator_for("features", step)
        pool = self.images.all_images()
        own = range(len(members) * self._rank // self._world, len(members) * (self._rank + 1) // self._world)
        net.eval()
        with torch.no_grad():
            for first in range(0, len(members), FEATURES_AT_A_TIME):
                chunk = members[first : first + FEATURES_AT_A_TIME]
                start, stop = (min(max(i - first, 0), len(chunk)) for i in (own.start, own.stop))
                images = pool[chunk[start:stop].to(pool.device)].to(self.device, non_blocking=True)
                # drawn for the others too, so that views do not depend on the number of processes
                views = self._augment[WEAK](images, Draws([Part(generator, 1, len(chunk), start, stop)]))
                for part in views.split(batch) if len(views) else ():
                    with precision():
                        parts.append(net(self.normalise(part), only_feat=True).float())
        net.train(was_training)
        return torch.cat(parts)

    def shown(self, views: Tensor) -> Tensor:
        """Normalised views as pictures, in [0, 1]."""
        mean, std = (s.view(1, -1, 1, 1).to(views.device) for s in self.statistics)
        return (views[:, : mean.shape[1]] * std + mean).clamp(0, 1)

    def _generator_for(self, name: str, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(derive(self.seed, "view", name, step))

    def _draws(self, step: int, views: Mapping[str, tuple[int, int]]) -> Draws:
        """Draws for views, name -> (how many, of how many images here); those that one process would take for all images."""
        return Draws(
            [
                Part(self._generator_for(name, step), count, n * self._world, n * self._rank, n * (self._rank + 1))
                for name, (count, n) in views.items()
            ]
        )

    def batch(self, step: int) -> dict[str, Tensor]:
        """Everything that the step's ``train_step`` asks for, on the device, images normalised."""
        found = self.images.step(step)
        index, images = ({kind: pair[k] for kind, pair in found.items()} for k in (0, 1))
        out: dict[str, Tensor] = {}
        for strength, augment in self._augment.items():  # all views of a strength in one go
            views = {n: v for n, v in self.views.items() if v.strength == strength}
            if not views:
                continue
            x = torch.cat([images[v.images].repeat(v.count, 1, 1, 1) for v in views.values()])
            draws = self._draws(step, {n: (v.count, self.size[v.images]) for n, v in views.items()})
            made = self.normalise(augment(x, draws))
            out.update(zip(views, made.split([v.count * self.size[v.images] for v in views.values()]), strict=True))
        if "x_ulb_s_0_rot" in self.parameters:
            turns = self._draws(step, {"rot_v": (1, self.size[UNLABELLED])}).integers(4)
            out["x_ulb_s_0_rot"] = quarter_turns(out["x_ulb_s_0"], turns)
            out["rot_v"] = turns.to(self.device, non_blocking=True)
        if "x_ulb_rot" in self.parameters:
            n = min(self.size.values())
            # spread over the images, so that those of several processes are together those of one
            some = (torch.arange(n) * self.size[UNLABELLED] // n).to(self.device, non_blocking=True)
            weak = self._augment[WEAK](images[UNLABELLED][some], self._draws(step, {"x_ulb_rot": (1, n)}))
            turns = torch.arange(4).repeat_interleave(n)
            out["x_ulb_rot"] = quarter_turns(self.normalise(weak).repeat(4, 1, 1, 1), turns)
            out["rot_v"] = turns.to(self.device, non_blocking=True)
        values = {"idx_lb": index[LABELLED], "idx_ulb": index[UNLABELLED], "y_lb": self._labels[index[LABELLED]]}
        return out | {k: v for k, v in values.items() if k in self.parameters}


def check_shared_equally(labelled: int, unlabelled: int, world: int) -> None:
    """That so many processes can have as many images each.

    Raises:
        DataError: they cannot; with the nearest numbers that can be shared.
    """
    if labelled % world or unlabelled % world:
        j, i = (world * max(1, round(n / world)) for n in (labelled, unlabelled))
        raise DataError(
            f"batch: {labelled} labelled and {unlabelled} unlabelled images a step cannot be shared equally by {world}"
            f" processes; {j} and {i} can: --batch_size {j} --uratio {i / j:g}"
        )


class LabelledPasses:
    """Batches of labelled images only, weakly augmented, ``steps`` per iteration: for USB code that loops over
    ``loader_dict["train_lb"]`` itself (the warm-up of Dash)."""

    sampler = None

    def __init__(self, batches: Batches, steps: int) -> None:
        self._batches, self._steps, self._done = batches, steps, 0

    def __len__(self) -> int:
        return self._steps

    def __iter__(self):  # type: ignore[no-untyped-def]
        for _ in range(self._steps):
            batch = self._batches.batch(self._done)
            self._done += 1
            yield {k: batch[k] for k in ("x_lb", "y_lb")}


class FixedImages:
    """Images without augmentation, in order, ``batch`` at a time: what evaluation reads. Its length is that of all.

    Args:
        images: (P, channels, H, W) uint8, anywhere.
        members: (n,) which of them.
        labels: (n,) their labels.
        device: where the batches go.
        rank, world: iteration gives this process's part of them, in order.
    """

    sampler = None

    def __init__(
        self, images: Tensor, members: Tensor, labels: Tensor, normalise: Callable[[Tensor], Tensor], batch: int,
        device: torch.device, rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        self._images, self._members, self._labels = images, members.to(images.device), labels
        self._normalise, self._batch, self._device = normalise, batch, device
        self._part = range(rank * len(members) // world, (rank + 1) * len(members) // world)

    def __len__(self) -> int:
        return -(-len(self._members) // self._batch)

    def __iter__(self):  # type: ignore[no-untyped-def]
        for start in range(self._part.start, self._part.stop, self._batch):
            part = slice(start, min(start + self._batch, self._part.stop))
            images = self._images[self._members[part]].to(self._device, non_blocking=True)
            yield {"x_lb": self._normalise(images), "y_lb": self._labels[part].to(self._device, non_blocking=True)}


def pixel_statistics(source: Source) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel over the training images (at most 10,000 of them), as fractions of 255."""
    chosen = source.train[:: max(1, len(source.train) // 10_000)]
    counts = torch.zeros(source.images.shape[1], 256, dtype=torch.float64)
    for start in range(0, len(chosen), 500):
        part = source.images[chosen[start : start + 500]]
        for channel, row in enumerate(counts):
            row += torch.bincount(part[:, channel].flatten(), minlength=256)
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts /= counts.sum(1, keepdim=True)
    mean = counts @ levels
    std = (counts @ levels**2 - mean**2).clamp_min(1e-6).sqrt()
    return mean.float(), std.float()


def normaliser(mean: Tensor, std: Tensor, channels: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Images to zero mean and unit variance per channel, ``channels`` wide; (N, c, H, W) uint8, or float in [0, 1].

    Args:
        mean, std: (c,), as fractions.

    Raises:
        DataError: the data's channels cannot serve a net that wants ``channels``.
    """
    have = len(mean)
    if have not in (1, channels):
        raise DataError(f"the net takes {channels} channel(s), but the images have {have}")
    mean, std = mean.view(1, -1, 1, 1).to(device), std.view(1, -1, 1, 1).to(device)
    scale, shift = 1 / (255 * std), -mean / std

    def normalise(x: Tensor) -> Tensor:
        x = x.float().mul_(scale).add_(shift) if x.dtype == torch.uint8 else (x - mean) / std
        return x.repeat(1, channels, 1, 1) if have != channels else x

    return normalise


def augmentation(name: str, weak: Augmentation | None = None, ops: int | None = None) -> Augmentation:
    """The augmentation of this name; one that begins with a weak view (RandAugment) is preceded by ``weak``.

    Args:
        ops: operations per view, for those that draw some.

    Raises:
        DataError: not known, or it does not draw operations.
    """
    if name not in AUGMENTATIONS:
        raise DataError(f"augmentation: unknown {name!r}; known: {', '.join(AUGMENTATIONS)}")
    chosen: Callable[..., Tensor] = AUGMENTATIONS[name]
    if ops is not None:
        if "ops" not in signature(chosen).parameters:
            raise DataError(f"hard_ops: {name} draws no operations; randaugment does")
        chosen = partial(chosen, ops=ops)
    if weak is None or name not in AFTER_WEAK:
        return chosen

    def after_weak(images: Tensor, generator: Random) -> Tensor:
        x = weak(images, generator)
        return chosen(x if x.dtype == torch.uint8 else (x * 255).round_().clamp_(0, 255).byte(), generator)

    return after_weak
