"""A trained net as a checkpoint or an exported folder describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from muscle_plugin.data.views import Normaliser
from muscle_plugin.errors import DamagedError, InputError
from muscle_plugin.files import load_tensors
from muscle_plugin.nets.build import net_builder
from muscle_plugin.nets.weights import misfit
from muscle_plugin.run_files import BEST, refuse_newer, saved_checkpoints
from muscle_plugin.text import first_line, shown
from muscle_plugin.usb.calls import usb_calls_on


@dataclass(frozen=True)
class Trained:
    """A trained net and what must be known to use it.

    Attributes:
        net: with its weights, in evaluation mode, on the CPU.
        name: of the net, as the setting ``net``.
        from_torchvision: whether the name is torchvision's.
        options: see :class:`muscle_plugin.nets.NetOptions`.
        classes: class names, in the order of the logits.
        img_size: side of the images, in pixels.
        channels: of the images that the net is given.
        mean, std: of the training images, per channel, as fractions.
        step: training steps that the weights have seen.
        averaged: whether the weights are the EMA teacher's.
        algorithm, dataset: that the net was trained by and on, where known.
    """

    net: nn.Module
    name: str
    from_torchvision: bool
    options: dict[str, object]
    classes: list[str]
    img_size: int
    channels: int
    mean: list[float]
    std: list[float]
    step: int
    averaged: bool
    algorithm: str | None
    dataset: str | None

    @property
    def kind(self) -> str:
        """Which weights these are."""
        return "averaged" if self.averaged else "live"


def read_trained(checkpoint: Path) -> Trained:
    """Read the EMA teacher of a checkpoint.

    Raises:
        InputError: not a checkpoint, or USB is needed for its net and not installed.
        DamagedError: damaged; the message names the run's other checkpoints.
    """
    try:
        content = load_tensors(checkpoint)
    except DamagedError as e:
        run_dir = checkpoint.parent
        others = [str(p) for p in (*saved_checkpoints(run_dir), run_dir / BEST) if p != checkpoint and p.is_file()]
        raise DamagedError(f"{e}{'; the run has also ' if others else ''}{', '.join(others)}") from None
    refuse_newer(content, checkpoint)
    return rebuild(content, checkpoint)


def rebuild(content: Mapping[str, Any], source: Path) -> Trained:
    """Build the net that a checkpoint describes, with its averaged weights.

    Args:
        content: of the checkpoint: ``net``, ``net_from_name``, ``ema_model``, ``it`` and ``images``.
        source: file or folder that it is from, for messages.

    Raises:
        InputError: something is missing in it, its net cannot be built here, or its weights do not fit the net.
    """
    about = content.get("images")
    if not isinstance(about, dict):
        raise InputError(f"{source}: does not say what images it was trained on; it is not a run's checkpoint")
    if faults := _faults(content, about):
        raise InputError(f"{source}: not a whole checkpoint: {', '.join(faults)} is missing, or not what it should be")
    name, options = content["net"], about["net_options"]
    try:
        with usb_calls_on("cpu"):
            build = net_builder(name, content["net_from_name"], len(about["mean"]), about["img_size"], options)
            net = build(num_classes=len(about["classes"]))
    except InputError as e:
        raise InputError(f"{source}: its net cannot be built: {e}") from None
    except (MemoryError, RuntimeError) as e:  # of a size that no net has
        raise InputError(f"{source}: its net {shown(name)} cannot be built ({first_line(e)})") from None
    _load(net, content["ema_model"], f"{source}: its weights do not fit net {shown(name)}")
    settings = content.get("settings")
    return Trained(
        net.eval(),
        name,
        content["net_from_name"],
        options,
        **{k: about[k] for k in ("classes", "img_size", "channels", "mean", "std")},
        step=content["it"],
        averaged=not (isinstance(settings, dict) and settings.get("ema_m") == 0),
        algorithm=content.get("algorithm_name"),
        dataset=about.get("dataset"),
    )


def _load(net: nn.Module, weights: Mapping[object, object], what: str) -> None:
    tensors = {k: v for k, v in weights.items() if isinstance(k, str) and isinstance(v, Tensor)}
    # some algorithms wrap the net with heads of their own and keep it as `backbone`
    inner = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
    wanted = net.state_dict()
    state = tensors if not misfit(tensors, wanted) else inner
    if misfit(state, wanted):
        raise InputError(f"{what}: {misfit(tensors, wanted)}")
    net.load_state_dict(state, strict=False)


def _faults(content: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    """What a checkpoint lacks, or has of another kind, of all that is needed to use its net."""

    def numbers(values: object) -> bool:
        return isinstance(values, list) and len(values) in (1, 3) and all(isinstance(x, (int, float)) for x in values)

    classes, size, options = about.get("classes"), about.get("img_size"), about.get("net_options")
    mean, std = about.get("mean"), about.get("std")
    same_length = isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std)
    whole = {
        "it": type(content.get("it")) is int,
        "net": isinstance(content.get("net"), str),
        "net_from_name": isinstance(content.get("net_from_name"), bool),
        "ema_model": isinstance(content.get("ema_model"), dict),
        "classes": isinstance(classes, list) and len(classes) > 1 and all(isinstance(c, str) for c in classes),
        "img_size": type(size) is int and 4 <= size <= 1024,
        "net_options": isinstance(options, dict) and all(isinstance(k, str) for k in options),
        "mean, std": same_length and numbers(mean) and numbers(std),
        "channels": about.get("channels") in (1, 3),
    }
    return [name for name, good in whole.items() if not good]


class Classifier(nn.Module):
    """A trained net that takes images as they are: (N, 3, img_size, img_size) uint8 RGB to (N, C) logits.

    The net's normalisation is inside, and for nets of grey images the conversion (ITU-R 601 luma, as Pillow's).

    Raises:
        DataError: the net takes another number of channels than the images have.
    """

    def __init__(self, trained: Trained, device: torch.device) -> None:
        super().__init__()
        self.net = trained.net.to(device)
        mean, std = torch.tensor(trained.mean), torch.tensor(trained.std)
        self._luma = torch.tensor([0.299, 0.587, 0.114], device=device).view(1, 3, 1, 1) if len(mean) == 1 else None
        self._normalise = Normaliser(mean, std, trained.channels, device)

    def forward(self, images: Tensor) -> Tensor:
        if self._luma is not None:
            images = (images * self._luma).sum(1, keepdim=True).round().to(torch.uint8)
        return self.net(self._normalise(images))["logits"].float()
