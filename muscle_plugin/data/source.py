"""A classification data set in memory, and the options for reading one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from muscle_plugin.data.images import PixelRange

_RESIZED_AT_A_TIME = 1024  # images; all of them as floats would need four times their memory


@dataclass(frozen=True)
class Source:
    """A classification data set.

    Attributes:
        images: (P, channels, H, W) uint8, in memory or mapped from a file.
        labels: (P,) int64; -1 for an unlabelled image.
        train: (N,) int64 indices of the training images, labelled or not.
        test: (M,) int64 indices of the test images; may be empty. Training never sees them.
        classes: class names, in label order.
        subclasses, subclass_names: (P,) int64 finer labels and their names, if the data set has them (CIFAR-20).
        notes: remarks for the user on how the data was read.
        names: (P,) file names of the images, if each has a file of its own.
        pixel_range: black and white among grey values of more than 8 bits, if there were files of such.
    """

    images: Tensor
    labels: Tensor
    train: Tensor
    test: Tensor
    classes: tuple[str, ...]
    subclasses: Tensor | None = None
    subclass_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    names: Sequence[str] = ()
    pixel_range: PixelRange | None = None

    @property
    def train_labels(self) -> Tensor:
        """(N,) labels of the training images."""
        return self.labels[self.train]

    @property
    def test_labels(self) -> Tensor:
        """(M,) labels of the test images."""
        return self.labels[self.test]

    def name_of(self, image: int) -> str:
        """Name an image in a message: its file, or its position among the training or test images."""
        if self.names:
            return self.names[image]
        kind, members = ("test", self.test) if image in self.test else ("training", self.train)
        return f"{kind} image {members.tolist().index(image)}"


@dataclass(frozen=True)
class SourceOptions:
    """What a reader of a data set may need.

    Attributes:
        img_size: side in pixels to which image files of varying size are resized.
        seed: seed of the train/test split, for data sets without a fixed one (Mini-ImageNet).
        labels_csv: table of labels of an image folder.
        skip_bad_images: leave out unreadable image files instead of failing.
        cache_dirs: folders for packed array files, by preference.
        pixel_range: black and white among grey values of more than 8 bits; None: as the files say, or show.
        allow_outside: follow links out of ``data_dir``, and accept files outside it in ``labels_csv``.
    """

    data_dir: Path
    img_size: int
    seed: int = 0
    labels_csv: Path | None = None
    skip_bad_images: bool = False
    cache_dirs: Sequence[Path] = ()
    allow_outside: bool = False
    pixel_range: PixelRange | None = None


def resize(images: Tensor, size: int) -> Tensor:
    """Resize uint8 images to (N, channels, size, size), bilinear and antialiased; images of that size are returned as is."""
    if images.shape[-2:] == (size, size):
        return images
    out = torch.empty((*images.shape[:2], size, size), dtype=torch.uint8)
    for part, target in zip(images.split(_RESIZED_AT_A_TIME), out.split(_RESIZED_AT_A_TIME), strict=True):
        scaled = F.interpolate(part.float(), (size, size), mode="bilinear", align_corners=False, antialias=True)
        target.copy_(scaled.round_().clamp_(0, 255))
    return out


def consecutive(train: int, test: int) -> tuple[Tensor, Tensor]:
    """Indices of ``train`` training images followed by ``test`` test images."""
    return torch.arange(train), torch.arange(train, train + test)
