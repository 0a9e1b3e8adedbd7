"""Labels images with a trained net: ``muscle-plugin predict``."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from muscle_plugin.data.images import decode_all, find_pixel_range, images_at, unknown_files
from muscle_plugin.device import choose_device
from muscle_plugin.errors import DataError, InputError
from muscle_plugin.files import refuse_existing, write_text
from muscle_plugin.inference.trained import Classifier, Trained, read_trained
from muscle_plugin.run_files import checkpoint_of
from muscle_plugin.text import one_line

__all__ = ["Predictor", "write_predictions"]


class Predictor:
    """The averaged net of a checkpoint, with the image size, statistics and class names that it was trained with.

    Args:
        checkpoint: ``latest_model.pth`` or ``model_best.pth`` of a run, or a :class:`~.trained.Trained` net.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        pretrain_path: file of the frozen backbone's weights, of a run with ``tune``; None: where the run had them.

    Attributes:
        step: training steps that the weights have seen.
        classes: names, in the order of the probabilities.
        img_size: side of the images, in pixels.
        info: what the checkpoint says of the net.
        classifier: uint8 images to logits, on ``device``.

    Raises:
        InputError: not such a file, USB is needed for its net and not installed, or its backbone's weights are not there.
        DeviceError: no such device.
    """

    def __init__(
        self, checkpoint: str | Path | Trained, device: str = "auto", pretrain_path: str | Path | None = None
    ) -> None:
        self.device = choose_device(device)
        weights = Path(pretrain_path) if pretrain_path else None
        trained = checkpoint if isinstance(checkpoint, Trained) else read_trained(Path(checkpoint), weights)
        self.info = info = trained.info
        self.step, self.classes, self.img_size = info.step, info.classes, info.img_size
        self.classifier = Classifier(trained, self.device)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(N, C) float32 logits, on the CPU, of (N, 3, img_size, img_size) uint8 RGB images.

        Raises:
            InputError: images of another type or shape, for which the net would give numbers, too, but wrong ones.
        """
        side = self.img_size
        if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.shape[1:] != (3, side, side):
            found = f"{type(images).__name__} {getattr(images, 'dtype', '')} {tuple(getattr(images, 'shape', ()))}"
            raise InputError(f"expected a uint8 tensor of RGB images (N, 3, {side}, {side}), received {found}")
        return self.classifier(images.to(self.device)).cpu()

    def probabilities(self, images: Tensor) -> Tensor:
        """(N, C) float32 class probabilities, on the CPU, of images as :meth:`logits` takes them."""
        return self.logits(images).softmax(1)


def label_images(
    predictor: Predictor, files: Sequence[Path], skip_bad_images: bool, batch: int
) -> Iterator[tuple[Path, str, float]]:
    """Yield (file, class, its probability) of every readable image; DataError for another, unless ``skip_bad_images``."""
    pixel_range = predictor.info.pixel_values
    if pixel_range is None:  # training needed none
        pixel_range, notes = find_pixel_range(files, None)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    for first in range(0, len(files), batch):
        part = files[first : first + batch]
        images: np.ndarray = np.empty((len(part), 3, predictor.img_size, predictor.img_size), np.uint8)
        bad = decode_all(part, predictor.img_size, images, pixel_range)
        for reason in bad.values():
            if not skip_bad_images:
                raise DataError(f"{reason}. --skip-bad-images leaves such files out")
            print(f"note: left out {one_line(reason)}", file=sys.stderr)
        if good := [i for i in range(len(part)) if i not in bad]:
            probability, label = predictor.probabilities(torch.from_numpy(images[good])).max(1)
            for i, p, c in zip(good, probability.tolist(), label.tolist(), strict=True):
                yield part[i], predictor.classes[c], p


def write_predictions(
    checkpoint: Path, images: Path, out: Path, device: str = "auto", batch: int = 256, skip_bad_images: bool = False,
    overwrite: bool = False, pretrain_path: Path | None = None,
) -> str:  # fmt: skip
    """Write a table of file (relative to ``images``), class and probability; returns a line that says what was done.

    Args:
        checkpoint: a run's ``latest_model.pth``, or its directory.
        images: a folder of images, at any depth, or one image.
        pretrain_path: as of :class:`Predictor`.

    Raises:
        DataError, DeviceError, InputError: an input cannot be had or read; nothing has been written.
        WriteError: ``out`` cannot be written.
    """
    if batch < 1:
        raise InputError("--batch: must be at least 1")
    if not overwrite:
        refuse_existing(out, "--overwrite replaces it")
    files = images_at(images)
    used = checkpoint_of(checkpoint)
    predictor = Predictor(used, device, pretrain_path)
    root = images.parent if images.is_file() else images
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(("file", "class", "probability"))
    rows = list(label_images(predictor, files, skip_bad_images, batch))
    for path, label, probability in rows:
        file = _no_formula(path.relative_to(root).as_posix(), "./")
        table.writerow((file, _no_formula(label, "'"), f"{probability:.6f}"))
    write_text(out, text.getvalue())
    ignored = "".join(f"; {line}" for line in unknown_files([images])) if images.is_dir() else ""
    return f"{len(rows)} images labelled by {used} ({predictor.info.weights} weights, step {predictor.step}): {out}{ignored}"


def _no_formula(text: str, before: str) -> str:
    """The text of a cell, with ``before`` in front where a spreadsheet would compute it as a formula."""
    risky = text[:1] in ("=", "@", "\t", "\r") or (text[:1] in ("+", "-") and not re.fullmatch(r"[+-]?[\d.]*", text))
    return before + text if risky else text
