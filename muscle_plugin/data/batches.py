"""The batch of any training step: its images, their views and labels, as a function of (seed, step)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from muscle_plugin.data.augment import AFTER_WEAK, Augmentation, augmentation
from muscle_plugin.data.batch_random import BatchRandom, BatchSlice
from muscle_plugin.data.loader import Ahead, Parcel, ResidentImages, StreamedImages, fits
from muscle_plugin.data.normalise import AS_THEY_ARE, Normaliser, Preprocessing, pixel_statistics
from muscle_plugin.data.randaugment import apply as apply_plan
from muscle_plugin.data.sampler import IndexStream
from muscle_plugin.data.source import Source
from muscle_plugin.data.splits import Split
from muscle_plugin.data.views import LABELLED, MEDIUM, STRONG, UNLABELLED, WEAK, View, check_shared_equally, views_of
from muscle_plugin.seeding import derive
from muscle_plugin.text import shown

#: Images whose views ``Batches.features`` draws at a time.
FEATURES_AT_A_TIME = 256


class Encode(Protocol):
    """Computes (n, num_features) features of n normalised images."""

    num_features: int

    def __call__(self, images: Tensor) -> Tensor: ...


class Batches:
    """Makes the batch of any training step from its number alone.

    Args:
        labelled, unlabelled: images of either kind per step, over all processes.
        parameters, usb_name: the parameters of ``train_step``, and the name of the USB class whose step it is.
        weak, strong: names of augmentations.
        channels: channels that the net takes; a single channel is repeated.
        device: where the views are made.
        data_on: ``device``: the images live there, as uint8; ``host``: they stay where they are and are copied step by
            step, by ``workers`` processes; ``auto``: on the device if they fit.
        strong_ops: operations per strong view, for augmentations that draw some; None: the augmentation's own number.
        rank, world: this process and their number; each makes its own part of the batch.
        preprocessing: how the net takes images.
        encoder: normalised images to (n, F) features, which take the images' place in a batch; None: the images themselves.

    Attributes:
        size: kind -> this process's images of that kind per step.
        order: kind -> which of the images of that kind a step takes.
        statistics: mean and standard deviation by which pixels are normalised, by channel.
        to_net: images, uint8 or float in [0, 1], to what the net takes.
        channels_last: whether a view's channels lie side by side in memory; the values are the same.
        notes: remarks for the user on how views are made.

    Raises:
        DataError: a parameter or an augmentation is unknown, or the processes cannot share the images equally.
    """

    def __init__(
        self, source: Source, split: Split, labelled: int, unlabelled: int, parameters: Sequence[str], usb_name: str,
        weak: str, strong: str, channels: int, seed: int, device: torch.device, data_on: str = "device", workers: int = 0,
        strong_ops: int | None = None, rank: int = 0, world: int = 1, preprocessing: Preprocessing = AS_THEY_ARE,
        encoder: Encode | None = None,
    ) -> None:  # fmt: skip
        check_shared_equally(labelled, unlabelled, world)
        self._rank, self._world = rank, world
        self.device, self.seed, self.parameters, self.channels = device, seed, tuple(parameters), channels
        self.views = self._asked = views_of(parameters, usb_name)
        weakly = augmentation(weak)
        # USB's medium view is one operation of RandAugment; of an augmentation that draws none it is a strong view
        self._augment: dict[str, Augmentation] = {
            WEAK: weakly,
            MEDIUM: augmentation(strong, weakly, 1 if strong in AFTER_WEAK else None),
            STRONG: augmentation(strong, weakly, strong_ops),
        }
        self._labels = source.train_labels[split.labelled].to(device)
        self.size = {LABELLED: labelled // world, UNLABELLED: unlabelled // world}
        members = {LABELLED: source.train[split.labelled], UNLABELLED: source.train[split.unlabelled]}
        self.order = {k: IndexStream(len(m), world * self.size[k], seed, k, rank, world) for k, m in members.items()}
        self.resident = data_on == "device" or (data_on == "auto" and fits(source.images, device))
        self.images: ResidentImages | StreamedImages
        if self.resident:
            self.images = ResidentImages(source.images, members, device)
        else:
            self.images = StreamedImages(source.images, members, self.order, device, workers)
        self._shape = source.images.shape[1:]
        self.statistics = preprocessing.statistics or pixel_statistics(source)
        self.normalise = Normaliser(*self.statistics, channels, device, preprocessing.size, preprocessing.interpolation)
        self.preprocessing, self._encoder = preprocessing, encoder
        self.to_net: Callable[[Tensor], Tensor] = self.normalise
        if encoder is not None:
            self.to_net = lambda images: encoder(self.normalise(images))
        self.channels_last = False
        self.notes: list[str] = []
        self._kernel = self._find_kernel()
        # drawing takes CPU time, during which a GPU would wait
        self._drawn = Ahead(self._draw, device) if device.type == "cuda" else self._draw

    def add_views(self, views: Mapping[str, View]) -> None:
        """Make these views, and no other ones, beside those that the step asks for: a view of count V is (V * N, ...),
        V-major."""
        self.views = {**self._asked, **views}
        if isinstance(self._drawn, Ahead):
            self._drawn.forget()

    def prepare(self, strengths: Iterable[str] | None = None) -> None:
        """Build caches before training starts, for views of these strengths (None: those that the step asks for)."""

    @property
    def fixed(self) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """All images of the source without augmentation, and the transform that turns some of them into net inputs."""
        return self.images.pool, self.to_net

    def blank(self, n: int, size: int) -> Tensor:
        """What the net takes for ``n`` images of ``size`` x ``size``, all zero."""
        shape = (self.channels, size, size) if self._encoder is None else (self._encoder.num_features,)
        return torch.zeros(n, *shape, device=self.device)

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return everything that the step's ``train_step`` asks for, on the device, images as the net takes them."""
        out = self.images_of(step)
        if self._encoder is None:
            return out
        images = {name: x for name, x in out.items() if x.dim() == 4}
        if not images:
            return out
        features = self._encoder(torch.cat([*images.values()]))
        return {**out, **dict(zip(images, features.split([len(x) for x in images.values()]), strict=True))}

    def images_of(self, step: int) -> dict[str, Tensor]:
        """As :meth:`batch`, with normalised images also where the net takes their features."""
        pool = self.images.of_step(step)
        plans, parcel = self._drawn(step)
        sent = parcel.unpack()
        out = {name: there for name, there in sent.items() if name in self.parameters}
        if "y_lb" in self.parameters:
            out["y_lb"] = self._labels[sent["idx_lb"]]
        for strength, views in self._by_strength().items():
            plan, packed = plans[strength], sent.get(f"{strength} plan")
            if packed is None:
                made = self.normalise(self._augment[strength].apply(pool[sent[strength]], plan))
            else:
                scale, shift = self.normalise.scale, self.normalise.shift
                made = self._kernel.views(pool, packed, plan, scale, shift, self.channels, self.channels_last)  # type: ignore[union-attr]
                made = self.normalise.resize(made)
            out.update(zip(views, made.split([v.count * self.size[v.images] for v in views.values()]), strict=True))
        if "x_ulb_s_0_rot" in self.parameters:
            out["x_ulb_s_0_rot"] = quarter_turns(out["x_ulb_s_0"], sent["rot_v"])
        if "x_ulb_rot" in self.parameters:
            weak = self._augment[WEAK].apply(pool[sent["to rotate"]], plans["to rotate"])
            out["x_ulb_rot"] = quarter_turns(self.normalise(weak).repeat(4, 1, 1, 1), sent["rot_v"])
        return out

    def features(
        self,
        net: nn.Module,
        members: Tensor,
        step: int,
        batch: int,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> Tensor:
        """Return (n, F) float32 features, on the device, of this process's part of the images, in order: those that a net in
        eval mode computes of weak views or, where the net takes the features of a frozen backbone, these features without
        augmentation.

        Args:
            net: takes ``only_feat``, as USB's nets do.
            members: (N,) indices into the source's images.
            step: with the seed, fixes the augmentation.
            batch: images that the net is given at a time, at most; views do not depend on it.
            precision: makes the context of a forward pass.
        """
        if self._encoder is not None:
            own = self._own(len(members))
            return self.fixed_features(members[own.start : own.stop])
        was_training, parts = net.training, []
        generator = self._generator_for("features", step)
        pool, weak = self.images.pool, self._augment[WEAK]
        own = self._own(len(members))
        net.eval()
        with torch.no_grad():
            for first in range(0, len(members), FEATURES_AT_A_TIME):
                chunk = members[first : first + FEATURES_AT_A_TIME]
                start, stop = (min(max(i - first, 0), len(chunk)) for i in (own.start, own.stop))
                chosen = chunk[start:stop].to(pool.device, non_blocking=True)
                images = pool[chosen].to(self.device, non_blocking=True)
                # drawn for the others too, so that views do not depend on the number of processes
                random = BatchRandom([BatchSlice(generator, 1, len(chunk), start, stop)])
                views = weak.apply(images, weak.draw(random, self._shape))
                for part in views.split(batch) if len(views) else ():
                    normalised = self.normalise(part)
                    with precision():
                        parts.append(net(normalised, only_feat=True).float())
        net.train(was_training)
        return torch.cat(parts)

    def _own(self, n: int) -> range:
        """This process's part of n images."""
        return range(n * self._rank // self._world, n * (self._rank + 1) // self._world)

    def fixed_features(self, members: Tensor) -> Tensor:
        """(n, F) float32 features, on the device, that the encoder computes of n images without augmentation."""
        images, to_net = self.fixed
        parts = members.to(images.device).split(FEATURES_AT_A_TIME)
        return torch.cat([to_net(images[part].to(self.device)) for part in parts])

    def _generator_for(self, name: str, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(derive(self.seed, "view", name, step))

    def _random(self, step: int, views: Mapping[str, tuple[int, int]]) -> BatchRandom:
        """Random numbers for views, name -> (how many, of how many images here): those that one process would draw."""
        slices = []
        for name, (count, n) in views.items():
            start = n * self._rank
            slices.append(BatchSlice(self._generator_for(name, step), count, n * self._world, start, start + n))
        return BatchRandom(slices)

    def _by_strength(self) -> dict[str, dict[str, View]]:
        """strength -> its views, which are made in one go."""
        found = {s: {n: v for n, v in self.views.items() if v.strength == s} for s in self._augment}
        return {strength: views for strength, views in found.items() if views}

    def _draw(self, step: int) -> tuple[dict[str, Any], Parcel]:
        """What is drawn for a step: the parameters of the views by strength, and what the device needs: by strength the rows of
        the views' images or, for the kernel, the packed plan, which has them; entries of the batch by their own names."""
        index = {kind: stream.batch(step) for kind, stream in self.order.items()}
        rows = self.images.rows(index)
        plans, send = {}, {"idx_lb": index[LABELLED], "idx_ulb": index[UNLABELLED]}
        for strength, views in self._by_strength().items():
            augment = self._augment[strength]
            random = self._random(step, {n: (v.count, self.size[v.images]) for n, v in views.items()})
            plans[strength] = plan = augment.draw(random, self._shape)
            of_views = torch.cat([rows[v.images].repeat(v.count) for v in views.values()])
            if self._kernel is not None and augment.apply is apply_plan and self._kernel.takes(plan):
                send[f"{strength} plan"] = self._kernel.pack(plan, of_views, *self._shape[1:])
            else:
                send[strength] = of_views
        if "x_ulb_s_0_rot" in self.parameters:
            send["rot_v"] = self._random(step, {"rot_v": (1, self.size[UNLABELLED])}).integers(4)
        if "x_ulb_rot" in self.parameters:
            n = min(self.size.values())
            plans["to rotate"] = self._augment[WEAK].draw(self._random(step, {"x_ulb_rot": (1, n)}), self._shape)
            # spread over the images, so that those of several processes are together those of one
            send["to rotate"] = rows[UNLABELLED][torch.arange(n) * self.size[UNLABELLED] // n]
            send["rot_v"] = torch.arange(4).repeat_interleave(n)
        return plans, Parcel(send, self.device)

    def _find_kernel(self) -> ModuleType | None:
        """The module of the Triton kernel that makes views, on a GPU for which Triton compiles it; None if it cannot."""
        by_plan = any(augment.apply is apply_plan for augment in self._augment.values())
        can_run = self.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
        if not by_plan or not can_run or os.environ.get("MUSCLE_VIEW_KERNEL") == "0":
            return None
        try:
            from muscle_plugin.data import kernel

            if not kernel.fits(self._shape) or len(self.statistics[0]) != self._shape[0]:
                return None
            why = kernel.why_not(self.device, self._shape, self.channels)
        except Exception as e:  # whatever is missing, or a compiler raises; Triton gives the reason in its last line
            why = f"{type(e).__name__}: {shown(''.join(str(e).strip().splitlines()[-1:]))}"
        if why is not None:
            self.notes.append(f"views are made without Triton, more slowly ({why})")
            return None
        return kernel


class LabelledPasses:
    """Batches of labelled images only, weakly augmented, ``steps`` per iteration: for USB code that iterates
    ``loader_dict["train_lb"]`` itself (the warm-up of Dash)."""

    sampler = None

    def __init__(self, batches: Batches, steps: int) -> None:
        self._batches, self._steps, self._done = batches, steps, 0

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for _ in range(self._steps):
            batch = self._batches.batch(self._done)
            self._done += 1
            yield {k: batch[k] for k in ("x_lb", "y_lb")}


def quarter_turns(images: Tensor, turns: Tensor) -> Tensor:
    """Turn each image counter-clockwise by its number of quarter turns, (N,)."""
    turned = torch.stack([images.rot90(k, (2, 3)) for k in range(4)])
    return turned[turns, torch.arange(len(turns), device=turns.device)]
