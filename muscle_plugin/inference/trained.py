"""A trained net as a checkpoint or an exported folder describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from torch import Tensor, nn

from muscle_plugin.data.images import PixelRange
from muscle_plugin.data.normalise import Normaliser
from muscle_plugin.errors import DamagedError, InputError
from muscle_plugin.files import load_tensors
from muscle_plugin.nets.build import NetBuilder, net_builder
from muscle_plugin.nets.frozen import FeatureHead, FrozenNet, digest
from muscle_plugin.nets.tune import Backbone, HeadOptions, frozen_digest, merge_adapters
from muscle_plugin.nets.weights import misfit
from muscle_plugin.run_files import BEST, checkpoint_of, refuse_newer, saved_checkpoints
from muscle_plugin.text import first_line, shown
from muscle_plugin.usb.calls import usb_calls_on


class NetInfo(BaseModel):
    """What must be known of a trained net to use it: the names of the classes in the order of the logits; the ``channels`` of
    the images that the net is given, ``mean`` and ``std`` by which they are normalised, as fractions, and whether they were
    ``grey``; the side at which the net gets them, ``net_size`` (None: ``img_size``), by which ``interpolation``; whose
    ``weights`` it has, the EMA teacher's or the net's own, and how many training steps they have seen; and the options of
    the ``head`` of a frozen backbone."""

    model_config = ConfigDict(strict=True, frozen=True)

    net: str
    net_from_name: bool
    net_options: dict[str, Any]
    classes: list[str] = Field(min_length=2)
    img_size: int = Field(ge=4, le=1024)
    net_size: int | None = Field(None, ge=4, le=1024)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    channels: Literal[1, 3]
    grey: bool = False
    mean: list[float]
    std: list[float]
    pixel_values: PixelRange | None = None
    step: int = Field(validation_alias=AliasChoices("it", "step"))
    weights: Literal["averaged", "live"] = "averaged"
    algorithm: str | None = Field(None, validation_alias=AliasChoices("algorithm_name", "algorithm"))
    dataset: str | None = None
    head: HeadOptions | None = None

    @field_validator("std")
    @classmethod
    def _per_channel(cls, std: list[float], others: ValidationInfo) -> list[float]:
        if len(std) not in (1, 3) or len(others.data.get("mean", ())) != len(std):
            raise ValueError("one number per channel")
        return std

    @property
    def input_size(self) -> int:
        """Side at which the net gets the images."""
        return self.net_size or self.img_size


@dataclass(frozen=True)
class Trained:
    """A trained net with its weights, in evaluation mode, on the CPU; and what must be known to use it."""

    net: nn.Module
    info: NetInfo


def read_trained(checkpoint: Path, pretrain_path: Path | None = None) -> Trained:
    """Read the EMA teacher of a checkpoint. Of a damaged one, the DamagedError names the run's other checkpoints. The weights
    of a frozen backbone, which are not in it, are read from where the run had them, or from ``pretrain_path``."""
    try:
        content = load_tensors(checkpoint)
    except DamagedError as e:
        run_dir = checkpoint.parent
        others = [str(p) for p in (*saved_checkpoints(run_dir), run_dir / BEST) if p != checkpoint and p.is_file()]
        raise DamagedError(f"{e}{'; the run has also ' if others else ''}{', '.join(others)}") from None
    refuse_newer(content, checkpoint)
    about, settings = content.get("images"), content.get("settings")
    if not isinstance(about, dict):
        raise InputError(f"{checkpoint}: does not say what images it was trained on; it is not a run's checkpoint")
    live = isinstance(settings, dict) and settings.get("ema_m") == 0
    info = {**about, **content, "weights": "live" if live else "averaged"}
    backbone = content.get("backbone")
    if pretrain_path is not None and backbone is None:
        raise InputError(f"--pretrain_path: not needed: {checkpoint} holds all weights of its net")
    return rebuild(info, content.get("ema_model"), checkpoint, backbone, pretrain_path)


def rebuild(
    about: Mapping[str, Any], weights: object, source: Path, frozen: object = None, pretrain_path: Path | None = None
) -> Trained:
    """Build a trained net from the content of a :class:`NetInfo`, a state dict and that of a :class:`Backbone`, none checked
    yet; an InputError about them names their ``source``."""
    try:
        backbone = None if frozen is None else Backbone.model_validate(frozen)
        info = NetInfo.model_validate({**about, "head": backbone.head} if backbone else about)
    except ValidationError as e:
        faults = ", ".join(dict.fromkeys(str(x["loc"][0] if x["loc"] else "backbone") for x in e.errors()))
        raise InputError(f"{source}: not a whole checkpoint: {faults} is missing, or not what it should be") from None
    try:
        with usb_calls_on("cpu"):
            build = net_builder(info.net, info.net_from_name, len(info.mean), info.input_size, info.net_options)
            net = part = _with_backbone(build, info, backbone, pretrain_path)
            if info.head is not None:
                head = FeatureHead(net.num_features, len(info.classes), **info.head)  # type: ignore[arg-type]
                net = FrozenNet(net, head)
                part = net if backbone is None else head
    except (InputError, MemoryError, RuntimeError) as e:  # the latter two of a size that no net has
        of_weights = backbone is not None and "weights" in str(e)
        advice = "; give the file of its backbone's weights as --pretrain_path FILE" if of_weights else ""
        raise InputError(f"{source}: its net {shown(info.net)} cannot be built ({first_line(e)}){advice}") from None
    found = weights if isinstance(weights, dict) else {}
    tensors = {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, Tensor)}
    # some algorithms wrap the net with heads of their own and keep it as `backbone`
    inner = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
    kept = {n for n, p in part.named_parameters() if backbone is not None and not p.requires_grad}
    wanted = {n: t for n, t in part.state_dict().items() if n not in kept}
    fault = misfit(tensors, wanted)
    if fault and misfit(inner, wanted):
        raise InputError(f"{source}: its weights do not fit net {shown(info.net)}: {fault}")
    part.load_state_dict(inner if fault else tensors, strict=False)
    if backbone is not None:
        merge_adapters(part)
    return Trained(net.eval(), info)


def _with_backbone(
    build: NetBuilder, info: NetInfo, backbone: Backbone | None, pretrain_path: Path | None
) -> nn.Module:
    """Build a net, with the weights of its frozen backbone and the adapters that were trained, if it has these."""
    if backbone is None:
        return build(num_classes=len(info.classes))
    if pretrain_path is not None:
        backbone = backbone.model_copy(update={"path": str(checkpoint_of(pretrain_path))})
    elif backbone.path and "://" in backbone.path:  # a checkpoint is not to have anything fetched
        raise InputError(f"its backbone's weights are at {shown(backbone.path)}, and are not fetched")
    net = backbone.net(build, len(info.classes))
    if backbone.tune != "head":
        backbone.freeze(net)
    if (digest(net) if backbone.tune == "head" else frozen_digest(net)) != backbone.digest:
        raise InputError(f"it was trained with other weights than those of {backbone.origin}")
    return net


class Classifier(nn.Module):
    """A trained net that takes images as they are: (N, 3, img_size, img_size) uint8 RGB to (N, C) logits.

    Resizing and normalisation are inside, and for nets of grey images the conversion (ITU-R 601 luma, as Pillow's).
    ``net`` replaces ``trained.net``; it may return logits alone.
    """

    def __init__(self, trained: Trained, device: torch.device, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = (trained.net if net is None else net).to(device)
        info = trained.info
        mean, std = torch.tensor(info.mean), torch.tensor(info.std)
        self._luma: Tensor = torch.tensor([0.299, 0.587, 0.114], device=device).view(1, 3, 1, 1)
        self._grey = info.grey or len(mean) == 1
        self._normalise = Normaliser(mean, std, info.channels, device, info.net_size, info.interpolation)
        # makes what resizes, which an exporter would else see made
        self._normalise.resize(torch.zeros(1, info.channels, info.img_size, info.img_size, device=device))

    def forward(self, images: Tensor) -> Tensor:
        if self._grey:
            images = (images * self._luma).sum(1, keepdim=True).round().to(torch.uint8)
        out = self.net(self._normalise(images))
        return (out if isinstance(out, Tensor) else out["logits"]).float()
