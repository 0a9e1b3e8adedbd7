"""Views: which of them a training step needs is read off the parameters of its ``train_step``, by one table.

USB decides this by the algorithm's name in its data set class. Here a parameter's name is enough, save for the three
algorithms in which ``x_ulb_s`` is a second weak view.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from muscle_plugin.data.ahead import OneAhead, Parcel
from muscle_plugin.data.augment import AFTER_WEAK, AUGMENTATIONS, Augmentation, crop, crop_flip
from muscle_plugin.data.batch_random import BatchRandom, Part
from muscle_plugin.data.loader import ResidentImages, StreamedImages, fits
from muscle_plugin.data.randaugment import Plan
from muscle_plugin.data.randaugment import apply as apply_plan
from muscle_plugin.data.sampler import IndexStream
from muscle_plugin.data.sources import Source
from muscle_plugin.data.splits import Split
from muscle_plugin.errors import DataError
from muscle_plugin.seeding import derive
from muscle_plugin.text import shown

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


@dataclass(frozen=True)
class _Drawn:
    """What a step has drawn.

    Attributes:
        plans: strength -> the parameters of its views.
        turns: of ``x_ulb_s_0_rot``.
        to_rotate: the parameters of the weak views that ``x_ulb_rot`` rotates.
        parcel: what the device needs of it.
    """

    plans: dict[str, Any]
    turns: Any
    to_rotate: Any
    parcel: Parcel


class _Images:
    """A step's images by kind, gathered when they are asked for, and their indices."""

    def __init__(self, images: ResidentImages | StreamedImages, step: int) -> None:
        self._resident = images if isinstance(images, ResidentImages) else None
        self.index: dict[str, Tensor] = {}
        self._found: dict[str, Tensor] = {}
        if isinstance(images, StreamedImages):
            found = images.step(step)
            self.index, self._found = ({kind: found[kind][k] for kind in (LABELLED, UNLABELLED)} for k in (0, 1))

    def __getitem__(self, kind: str) -> Tensor:
        if kind not in self._found:
            assert self._resident is not None
            self._found[kind] = self._resident.gather(kind, self.index[kind])
        return self._found[kind]

    @cached_property
    def pool(self) -> Tensor:
        """All images, or the step's, labelled ones first; contiguous."""
        if self._resident is not None:
            return self._resident.all_images()
        return torch.cat([*self._found.values()]).contiguous()


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
        self._shape = source.images.shape[1:]
        places = torch.arange(sum(self.size.values())).split([*self.size.values()])
        self._streamed_rows = dict(zip(self.size, places, strict=True))
        self.statistics = pixel_statistics(source)
        self.normalise = Normaliser(*self.statistics, channels, device)
        #: Whether a view's channels lie side by side in memory; the values are the same.
        self.channels_last = False
        #: What a user should know of how views are made.
        self.notes: list[str] = []
        self._kernel = self._find_kernel(source.images)
        # what is drawn costs the CPU time in which a GPU would wait
        self._drawn = OneAhead(self._draw, device) if device.type == "cuda" else self._draw

    def add_views(self, views: Mapping[str, View]) -> None:
        """Beside the views that the step asks for make these, under these names (MUSCLE's hard views; count V gives
        (V * N, ...), V-major), and no others."""
        self.views = {**self._asked, **views}
        if isinstance(self._drawn, OneAhead):
            self._drawn.forget()

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
                chosen = chunk[start:stop].to(pool.device, non_blocking=True)
                images = pool[chosen].to(self.device, non_blocking=True)
                # drawn for the others too, so that views do not depend on the number of processes
                views = self._augment[WEAK](images, BatchRandom([Part(generator, 1, len(chunk), start, stop)]))
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

    def _draws(self, step: int, views: Mapping[str, tuple[int, int]]) -> BatchRandom:
        """Random numbers for views, name -> (how many, of how many images here): those that one process would draw."""
        return BatchRandom(
            [
                Part(self._generator_for(name, step), count, n * self._world, n * self._rank, n * (self._rank + 1))
                for name, (count, n) in views.items()
            ]
        )

    def _find_kernel(self, images: Tensor) -> Any:
        """The module of the kernel that makes views at once, where it can: on a GPU for which Triton compiles it."""
        if self.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return None
        by_plan = any(augment.apply is apply_plan for augment in self._augment.values())
        if os.environ.get("MUSCLE_VIEW_KERNEL") == "0" or not by_plan:
            return None
        try:
            from muscle_plugin.data import kernel

            if not kernel.fits(images.shape[1:]):
                return None
            why = kernel.why_not(self.device, images.shape[1:], self.channels)
        except Exception as e:  # whatever is missing, or a compiler brings up; Triton says why in its last line
            lines = [line.strip() for line in str(e).splitlines() if line.strip()]
            why = f"{type(e).__name__}: {shown(lines[-1] if lines else '')}"
        if why is not None:
            self.notes.append(f"views are made without Triton, more slowly ({why})")
            return None
        return kernel

    def _by_strength(self) -> dict[str, dict[str, View]]:
        """strength -> its views, which are made in one go."""
        found = {s: {n: v for n, v in self.views.items() if v.strength == s} for s in self._augment}
        return {strength: views for strength, views in found.items() if views}

    def _draw(self, step: int) -> _Drawn:
        index = self.images.draw(step) if isinstance(self.images, ResidentImages) else {}
        send = {kind: i for kind, (i, _) in index.items()}
        rows = {kind: r for kind, (_, r) in index.items()} or self._streamed_rows
        plans = {}
        for strength, views in self._by_strength().items():
            draws = self._draws(step, {n: (v.count, self.size[v.images]) for n, v in views.items()})
            plans[strength] = plan = self._augment[strength].draw(draws, self._shape)
            by_plan = self._augment[strength].apply is apply_plan and self._kernel is not None
            if by_plan and self._kernel.takes(plan):
                of_views = torch.cat([rows[v.images] for v in views.values() for _ in range(v.count)])
                send[strength] = self._kernel.pack(plan, of_views, *self._shape[1:])
        turns = to_rotate = None
        if "x_ulb_s_0_rot" in self.parameters:
            turns = self._draws(step, {"rot_v": (1, self.size[UNLABELLED])}).integers(4)
        if "x_ulb_rot" in self.parameters:
            draws = self._draws(step, {"x_ulb_rot": (1, min(self.size.values()))})
            to_rotate = self._augment[WEAK].draw(draws, self._shape)
        return _Drawn(plans, turns, to_rotate, Parcel(send, self.device))

    def batch(self, step: int) -> dict[str, Tensor]:
        """Everything that the step's ``train_step`` asks for, on the device, images normalised."""
        images = _Images(self.images, step)  # loader workers fork, which is safe only while no thread draws
        drawn = self._drawn(step)
        sent = drawn.parcel.unpack()
        images.index = images.index or {kind: sent[kind] for kind in (LABELLED, UNLABELLED)}
        out: dict[str, Tensor] = {}
        for strength, views in self._by_strength().items():
            plan = drawn.plans[strength]
            if strength in sent:
                made = self._kernel.views(
                    images.pool, sent[strength], plan, self.normalise.scale, self.normalise.shift, self.channels,
                    self.channels_last,
                )  # fmt: skip
            else:
                x = torch.cat([images[v.images].repeat(v.count, 1, 1, 1) for v in views.values()])
                made = self.normalise(self._augment[strength].apply(x, plan))
            out.update(zip(views, made.split([v.count * self.size[v.images] for v in views.values()]), strict=True))
        if "x_ulb_s_0_rot" in self.parameters:
            out["x_ulb_s_0_rot"] = quarter_turns(out["x_ulb_s_0"], drawn.turns)
            out["rot_v"] = drawn.turns.to(self.device, non_blocking=True)
        if "x_ulb_rot" in self.parameters:
            n = min(self.size.values())
            # spread over the images, so that those of several processes are together those of one
            some = (torch.arange(n) * self.size[UNLABELLED] // n).to(self.device, non_blocking=True)
            weak = self._augment[WEAK].apply(images[UNLABELLED][some], drawn.to_rotate)
            turns = torch.arange(4).repeat_interleave(n)
            out["x_ulb_rot"] = quarter_turns(self.normalise(weak).repeat(4, 1, 1, 1), turns)
            out["rot_v"] = turns.to(self.device, non_blocking=True)
        index = images.index
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


class Normaliser:
    """Images to zero mean and unit variance per channel, ``channels`` wide; (N, c, H, W) uint8, or float in [0, 1].

    Args:
        mean, std: (c,), as fractions.

    Attributes:
        scale, shift: (1, c, 1, 1) on the device; what a byte is multiplied by, and what is added then.

    Raises:
        DataError: the data's channels cannot serve a net that wants ``channels``.
    """

    def __init__(self, mean: Tensor, std: Tensor, channels: int, device: torch.device) -> None:
        have = len(mean)
        if have not in (1, channels):
            raise DataError(f"the net takes {channels} channel(s), but the images have {have}")
        self._mean, self._std = mean.view(1, -1, 1, 1).to(device), std.view(1, -1, 1, 1).to(device)
        self.scale, self.shift = 1 / (255 * self._std), -self._mean / self._std
        self._repeat = channels if have != channels else 1

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float().mul_(self.scale).add_(self.shift) if x.dtype == torch.uint8 else (x - self._mean) / self._std
        return x.repeat(1, self._repeat, 1, 1) if self._repeat > 1 else x


def augmentation(name: str, weak: Augmentation | None = None, ops: int | None = None) -> Augmentation:
    """The augmentation of this name; one that begins with a weak view (RandAugment) is preceded by ``weak``.

    Args:
        ops: operations per view, for those that draw some.

    Raises:
        DataError: not known, or it does not draw operations.
    """
    if name not in AUGMENTATIONS:
        raise DataError(f"augmentation: unknown {name!r}; known: {', '.join(AUGMENTATIONS)}")
    chosen = AUGMENTATIONS[name]
    if ops is not None:
        if "ops" not in signature(chosen.draw).parameters:
            raise DataError(f"hard_ops: {name} draws no operations; randaugment does")
        chosen = replace(chosen, draw=partial(chosen.draw, ops=ops))
    return chosen if weak is None or name not in AFTER_WEAK else _after(weak, chosen)


def _after(first: Augmentation, then: Augmentation) -> Augmentation:
    """``then`` of the views that ``first`` gives; of a window and a plan it is one plan."""

    def draw(draws: BatchRandom, shape: tuple[int, ...]) -> tuple[Any, Any]:
        return first.draw(draws, shape), then.draw(draws, shape)

    def merged(draws: BatchRandom, shape: tuple[int, ...]) -> Plan:
        window, plan = draw(draws, shape)
        return replace(plan, window=window.window)

    def both(images: Tensor, drawn: tuple[Any, Any]) -> Tensor:
        x = first.apply(images, drawn[0])
        return then.apply(x if x.dtype == torch.uint8 else (x * 255).round_().clamp_(0, 255).byte(), drawn[1])

    if first in (crop, crop_flip):
        return replace(then, draw=merged)
    return Augmentation(draw, both)
