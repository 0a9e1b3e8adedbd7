"""Labels images with a trained net: ``muscle-plugin predict``."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from muscle_plugin.data.images import decode_all, images_at, unknown_files
from muscle_plugin.data.normalise import Normaliser
from muscle_plugin.device import choose_device
from muscle_plugin.errors import DamagedError, DataError
from muscle_plugin.files import load_tensors, refuse_existing, write_text
from muscle_plugin.nets.build import net_builder
from muscle_plugin.run_files import BEST, checkpoint_of, saved_checkpoints
from muscle_plugin.text import first_line, one_line, shown
from muscle_plugin.training.host import refuse_newer
from muscle_plugin.usb.calls import usb_calls_on

__all__ = ["Predictor", "write_predictions"]

_DECODED_AT_ONCE = 2048  # images held in memory


@dataclass(frozen=True)
class Trained:
    """A trained net and what must be known to use it.

    Attributes:
        net: with its weights, in evaluation mode, on the CPU.
        about: ``classes``, ``img_size``, ``channels``, ``mean``, ``std``, ``net_options``: of the images and the net.
        content: of the checkpoint.
    """

    net: nn.Module
    about: dict[str, Any]
    content: dict[str, Any]


def read_trained(checkpoint: Path) -> Trained:
    """The averaged net of a checkpoint.

    Raises:
        ValueError: not such a file.
        DamagedError: damaged; with the other checkpoints of the run.
    """
    try:
        content = load_tensors(checkpoint, "cpu")
    except DamagedError as e:
        run_dir = checkpoint.parent
        others = [str(p) for p in (*saved_checkpoints(run_dir), run_dir / BEST) if p != checkpoint and p.is_file()]
        raise DamagedError(f"{e}{'; the run has also ' if others else ''}{', '.join(others)}") from None
    refuse_newer(content, checkpoint)
    return build_trained(content, checkpoint)


def build_trained(content: dict[str, Any], source: Path) -> Trained:
    """The averaged net of a checkpoint's content.

    Args:
        source: where it is from, for messages.

    Raises:
        ValueError: something is missing in it, or its weights do not fit the net that it names.
    """
    about = content.get("images")
    if not isinstance(about, dict):
        raise ValueError(f"{source}: does not say what images it was trained on; it is not a run's checkpoint")
    if faults := _faults(content, about):
        raise ValueError(f"{source}: not a whole checkpoint: {', '.join(faults)} is missing, or not what it should be")
    try:
        with usb_calls_on(torch.device("cpu")):
            build = net_builder(
                content["net"], content["net_from_name"], len(about["mean"]), about["img_size"], about["net_options"]
            )
            net = build(num_classes=len(about["classes"]))
    except (AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as e:
        name = shown(content["net"])
        raise ValueError(f"{source}: its net {name} cannot be built ({first_line(e)})") from None
    weights = {k: v for k, v in content["ema_model"].items() if isinstance(k, str)}
    try:
        net.load_state_dict(weights)
    except (RuntimeError, TypeError):
        # some algorithms wrap the net with heads of their own and keep it as `backbone`
        inner = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
        try:
            net.load_state_dict(inner)
        except (RuntimeError, TypeError) as e:
            raise ValueError(f"{source}: its weights do not fit net {content['net']} ({first_line(e)})") from None
    return Trained(net.eval(), about, content)


class Classifier(nn.Module):
    """A trained net that takes images as they are: (N, 3, img_size, img_size) uint8 RGB to (N, C) logits.

    The net's normalisation is inside, and for nets of grey images the conversion (ITU-R 601 luma, as Pillow's).

    Raises:
        DataError: the net takes another number of channels than the images have.
    """

    def __init__(self, trained: Trained, device: torch.device) -> None:
        super().__init__()
        self.net = trained.net.to(device)
        mean, std = torch.tensor(trained.about["mean"]), torch.tensor(trained.about["std"])
        self._luma = torch.tensor([0.299, 0.587, 0.114], device=device).view(1, 3, 1, 1) if len(mean) == 1 else None
        self._normalise = Normaliser(mean, std, trained.about["channels"], device)

    def forward(self, images: Tensor) -> Tensor:
        if self._luma is not None:
            images = (images * self._luma).sum(1, keepdim=True).round().to(torch.uint8)
        return self.net(self._normalise(images))["logits"].float()


class Predictor:
    """The averaged net of a checkpoint, with the image size, statistics and class names that it was trained with.

    Args:
        checkpoint: ``latest_model.pth`` or ``model_best.pth`` of a run, or what :func:`read_trained` made of one.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Attributes:
        step: training steps that the weights have seen.
        classes: names, in the order of the probabilities.
        img_size: side of the images, in pixels.
        classifier: uint8 images to logits, on ``device``.

    Raises:
        ValueError: not such a file.
        DeviceError: no such device.
    """

    def __init__(self, checkpoint: str | Path | Trained, device: str = "auto") -> None:
        self.device = choose_device(device)
        trained = checkpoint if isinstance(checkpoint, Trained) else read_trained(Path(checkpoint))
        self.step: int = trained.content["it"]
        self.classes: list[str] = trained.about["classes"]
        self.img_size: int = trained.about["img_size"]
        self.classifier = Classifier(trained, self.device)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(N, C) float32 logits, on the CPU, of (N, 3, img_size, img_size) uint8 RGB images.

        Raises:
            ValueError: images of another kind or shape, for which the net would give numbers, too, but wrong ones.
        """
        wanted = (3, self.img_size, self.img_size)
        if not isinstance(images, Tensor) or images.dtype != torch.uint8 or tuple(images.shape[1:]) != wanted:
            found = f"{getattr(images, 'dtype', '')} {tuple(getattr(images, 'shape', ()))}".strip()
            raise ValueError(
                f"expected a uint8 tensor of RGB images (N, {', '.join(map(str, wanted))}), received"
                f" {type(images).__name__} {found}"
            )
        return self.classifier(images.to(self.device)).cpu()

    def probabilities(self, images: Tensor) -> Tensor:
        """(N, C) float32 class probabilities, on the CPU, of (N, 3, img_size, img_size) uint8 RGB images.

        Raises:
            ValueError: as :meth:`logits`.
        """
        return self.logits(images).softmax(1)


def _faults(content: dict[str, Any], about: dict[str, Any]) -> list[str]:
    """What a checkpoint lacks, or has of another kind, of all that is needed to use its net."""

    def numbers(values: Any) -> bool:
        return isinstance(values, list) and len(values) in (1, 3) and all(isinstance(x, (int, float)) for x in values)

    classes, size, options = about.get("classes"), about.get("img_size"), about.get("net_options")
    whole = {
        "it": type(content.get("it")) is int,
        "net": isinstance(content.get("net"), str),
        "net_from_name": isinstance(content.get("net_from_name"), bool),
        "ema_model": isinstance(content.get("ema_model"), dict),
        "classes": isinstance(classes, list) and len(classes) > 1 and all(isinstance(c, str) for c in classes),
        "img_size": type(size) is int and 4 <= size <= 1024,
        "net_options": isinstance(options, dict) and all(isinstance(k, str) for k in options),
        "mean, std": numbers(about.get("mean"))
        and numbers(about.get("std"))
        and len(about["mean"]) == len(about["std"]),
        "channels": about.get("channels") in (1, 3),
    }
    return [name for name, good in whole.items() if not good]


def _no_formula(text: str, before: str) -> str:
    """The text of a cell, with ``before`` in front where a spreadsheet would take it for a formula and compute it."""
    risky = text[:1] in ("=", "@", "\t", "\r") or (text[:1] in ("+", "-") and not re.fullmatch(r"[+-]?[\d.]*", text))
    return before + text if risky else text


def label_images(
    predictor: Predictor, files: Sequence[Path], skip_bad_images: bool, batch: int = 256
) -> Iterator[tuple[Path, str, float]]:
    """(file, class, its probability) of every image that can be read.

    Raises:
        DataError: one cannot, and ``skip_bad_images`` is not set.
    """
    for first in range(0, len(files), _DECODED_AT_ONCE):
        part = files[first : first + _DECODED_AT_ONCE]
        images: np.ndarray = np.empty((len(part), 3, predictor.img_size, predictor.img_size), np.uint8)
        bad = decode_all(part, predictor.img_size, images)
        for reason in bad.values():
            if not skip_bad_images:
                raise DataError(f"{reason}. --skip-bad-images leaves such files out")
            print(f"note: left out {one_line(reason)}", file=sys.stderr)
        good = [i for i in range(len(part)) if i not in bad]
        for start in range(0, len(good), batch):
            chosen = good[start : start + batch]
            probability, label = predictor.probabilities(torch.from_numpy(images[chosen])).max(1)
            for i, p, c in zip(chosen, probability.tolist(), label.tolist(), strict=True):
                yield part[i], predictor.classes[c], p


def write_predictions(
    checkpoint: Path, images: Path, out: Path, device: str = "auto", batch: int = 256, skip_bad_images: bool = False,
    overwrite: bool = False,
) -> str:  # fmt: skip
    """Write a table of file (relative to ``images``), class and probability; returns a line that says what was done.

    Args:
        checkpoint: a run's ``latest_model.pth``, or its directory.
        images: a folder of images, at any depth, or one image.

    Raises:
        DataError, DeviceError, ValueError: an input cannot be had or read; nothing has been written.
        OSError: ``out`` cannot be written.
    """
    if batch < 1:
        raise ValueError("--batch: must be at least 1")
    if not overwrite:
        refuse_existing(out, "--overwrite replaces it")
    files = images_at(images)
    used = checkpoint_of(checkpoint)
    predictor = Predictor(used, device)
    root = images.parent if images.is_file() else images
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(("file", "class", "probability"))
    rows = 0
    for path, label, probability in label_images(predictor, files, skip_bad_images, batch):
        table.writerow(
            (_no_formula(path.relative_to(root).as_posix(), "./"), _no_formula(label, "'"), f"{probability:.6f}")
        )
        rows += 1
    write_text(out, text.getvalue())
    passed_over = "".join(f"; {line}" for line in unknown_files([images])) if images.is_dir() else ""
    return f"{rows} images labelled by {used} (averaged weights, step {predictor.step}): {out}{passed_over}"
