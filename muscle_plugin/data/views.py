"""Views: which of them a training step needs is read off the parameters of its ``train_step``, by one table.

USB decides this by the algorithm's name in its data set class. Here a parameter's name is enough, save for the three
algorithms in which ``x_ulb_s`` is a second weak view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from muscle_plugin.data.augment import AUGMENTATIONS, to_float
from muscle_plugin.data.sampler import IndexStream
from muscle_plugin.data.sources import DataError, Source
from muscle_plugin.data.splits import Split
from muscle_plugin.seeding import derive

LABELLED, UNLABELLED = "labelled", "unlabelled"
WEAK, HARD = "weak", "hard"


@dataclass(frozen=True)
class View:
    """One view of the images of a batch: of which images, how augmented, how many draws per image."""

    images: str
    strength: str
    count: int = 1


#: Parameter of ``train_step`` -> the view it wants.
VIEWS: dict[str, View] = {
    "x_lb": View(LABELLED, WEAK),
    "x_lb_s": View(LABELLED, HARD),
    "x_ulb_w": View(UNLABELLED, WEAK),
    "x_ulb_s": View(UNLABELLED, HARD),
    "x_ulb_s_0": View(UNLABELLED, HARD),
    "x_ulb_s_1": View(UNLABELLED, HARD),
}
#: USB classes whose ``x_ulb_s`` is a second weak view.
SECOND_WEAK_VIEW = frozenset({"pimodel", "meanteacher", "mixmatch"})
#: Parameters that are not images.
INDICES = ("idx_lb", "idx_ulb", "y_lb")
#: Parameters that are rotations of other views; ``rot_v`` holds the number of quarter turns.
ROTATIONS = ("x_ulb_s_0_rot", "x_ulb_rot", "rot_v")


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
    """Each image turned counter-clockwise by ``turns`` (N,) quarters."""
    out = images.clone()
    for k in (1, 2, 3):
        chosen = turns == k
        out[chosen] = torch.rot90(images[chosen], k, (2, 3))
    return out


class Batches:
    """Makes the batch of any training step from its number alone.

    Args:
        source: the data set; its training images are moved to ``device`` once, as uint8.
        split: which of them are labelled and unlabelled.
        labelled, unlabelled: J and I, images of either kind per step.
        parameters: the parameters of ``train_step``.
        usb_name: the name of the USB class whose step it is.
        weak, hard: names of augmentations.
        channels: channels that the net wants; a single channel is repeated.
        seed: the run's seed.

    Raises:
        DataError: a parameter or an augmentation is not known.
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
    ) -> None:
        self.device, self.seed, self.parameters, self.channels = device, seed, tuple(parameters), channels
        self.views: dict[str, View] = views_of(parameters, usb_name)
        self._augment = {WEAK: _augmentation(weak), HARD: _augmentation(hard)}
        self._images = {
            LABELLED: source.train[split.labelled].to(device),
            UNLABELLED: source.train[split.unlabelled].to(device),
        }
        self._labels = source.train_labels[split.labelled].to(device)
        self.size = {LABELLED: labelled, UNLABELLED: unlabelled}
        self._streams = {
            LABELLED: IndexStream(len(split.labelled), labelled, seed, LABELLED),
            UNLABELLED: IndexStream(len(split.unlabelled), unlabelled, seed, UNLABELLED),
        }
        self.normalise = normaliser(source, channels, device)
        self._generator = torch.Generator(device)

    def add_views(self, views: Mapping[str, View]) -> None:
        """Make these views too, under these names (MUSCLE's hard views; count V gives (V * N, ...), V-major)."""
        self.views = {**self.views, **views}

    def _generator_for(self, name: str, step: int) -> torch.Generator:
        return self._generator.manual_seed(derive(self.seed, "view", name, step))

    def batch(self, step: int) -> dict[str, Tensor]:
        """Everything that the step's ``train_step`` asks for, on the device, images normalised."""
        index = {k: s.batch(step).to(self.device, non_blocking=True) for k, s in self._streams.items()}
        images = {k: self._images[k][i] for k, i in index.items()}
        out: dict[str, Tensor] = {}
        for name, view in self.views.items():
            x = images[view.images]
            x = x.repeat(view.count, 1, 1, 1) if view.count > 1 else x
            out[name] = self.normalise(self._augment[view.strength](x, self._generator_for(name, step)))
        if "x_ulb_s_0_rot" in self.parameters:
            turns = torch.randint(
                4, (len(out["x_ulb_s_0"]),), generator=self._generator_for("rot_v", step), device=self.device
            )
            out["x_ulb_s_0_rot"], out["rot_v"] = quarter_turns(out["x_ulb_s_0"], turns), turns
        if "x_ulb_rot" in self.parameters:
            n = min(self.size.values())
            weak = self._augment[WEAK](images[UNLABELLED][:n], self._generator_for("x_ulb_rot", step))
            turns = torch.arange(4, device=self.device).repeat_interleave(n)
            out["x_ulb_rot"], out["rot_v"] = quarter_turns(self.normalise(weak).repeat(4, 1, 1, 1), turns), turns
        values = {"idx_lb": index[LABELLED], "idx_ulb": index[UNLABELLED], "y_lb": self._labels[index[LABELLED]]}
        return out | {k: v for k, v in values.items() if k in self.parameters}


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
    """Images without augmentation, in order, ``batch`` at a time: what evaluation reads."""

    sampler = None

    def __init__(self, images: Tensor, labels: Tensor, normalise: Callable[[Tensor], Tensor], batch: int) -> None:
        self._images, self._labels, self._normalise, self._batch = images, labels, normalise, batch

    def __len__(self) -> int:
        return -(-len(self._labels) // self._batch)

    def __iter__(self):  # type: ignore[no-untyped-def]
        for start in range(0, len(self._labels), self._batch):
            part = slice(start, start + self._batch)
            yield {"x_lb": self._normalise(to_float(self._images[part])), "y_lb": self._labels[part]}


def normaliser(source: Source, channels: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Float images in [0, 1] to zero mean and unit variance per channel (over the training images), ``channels`` wide.

    Raises:
        DataError: the data's channels cannot serve a net that wants ``channels``.
    """
    have = source.train.shape[1]
    if have not in (1, channels):
        raise DataError(f"the net takes {channels} channel(s), but the images have {have}")
    sample = source.train[:: max(1, len(source.train) // 10_000)].float() / 255
    mean = sample.mean((0, 2, 3)).view(1, -1, 1, 1).to(device)
    std = sample.std((0, 2, 3)).clamp_min(1e-3).view(1, -1, 1, 1).to(device)

    def normalise(x: Tensor) -> Tensor:
        x = (x - mean) / std
        return x.repeat(1, channels, 1, 1) if have != channels else x

    return normalise


def _augmentation(name: str):  # type: ignore[no-untyped-def]
    if name not in AUGMENTATIONS:
        raise DataError(f"augmentation: unknown {name!r}; known: {', '.join(AUGMENTATIONS)}")
    return AUGMENTATIONS[name]
