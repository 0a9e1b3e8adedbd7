"""Prepares a run's nets: batch norm over processes, initial weights, memory layout, ``torch.compile``."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from muscle_plugin import distributed
from muscle_plugin.data.batches import Batches
from muscle_plugin.data.source import Source
from muscle_plugin.device import autocast_context
from muscle_plugin.errors import ConfigError, InputError, UserError
from muscle_plugin.nets.build import NetBuilder
from muscle_plugin.nets.frozen import Encoder, FeatureHead
from muscle_plugin.nets.tune import Backbone, refusing_unused_adapters
from muscle_plugin.nets.weights import load_weights, of_head
from muscle_plugin.run_files import checkpoint_of
from muscle_plugin.settings.schema import RunSettings
from muscle_plugin.text import first_line, out_of_memory
from muscle_plugin.usb.calls import usb_calls_on


def frozen_encoder(
    backbone: Backbone | None, settings: RunSettings, build: NetBuilder, channels: int, device: torch.device, precision: str
) -> Encoder | None:  # fmt: skip
    """The frozen ``backbone``, which gets its digest; None if more of the net than a head is trained."""
    if backbone is None or backbone.tune != "head":
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what has no weights there is the same for each seed
        net = backbone.net(build, 2)
    if not any(of_head(n) for n, _ in net.named_parameters()):
        raise InputError("tune: head: the net has no head that is called classifier, fc or head")
    size = settings.input_size
    blank = torch.zeros(2, channels, size, size, device=device)
    channels_last, _ = settle_layout(net.eval().to(device), blank, settings.net)
    encoder = Encoder(net, device, autocast_context(precision, device), channels_last)
    backbone.digest = encoder.digest
    return encoder


def settle_layout(net: nn.Module, blank: Tensor, name: str) -> tuple[bool, list[str]]:
    """Put a net, in eval mode, into the memory layout in which it can compute ``blank`` images: whether that is channels last,
    and notes for the user. What it cannot compute at all is an InputError."""
    notes: list[str] = []
    # channels last makes convolutions a sixth faster, on a CPU too; a net that flattens feature maps by ``view`` cannot
    layouts = (torch.channels_last, torch.contiguous_format)
    for layout in layouts if blank.dim() == 4 else layouts[1:]:
        try:
            with torch.no_grad(), usb_calls_on(blank.device):
                net.to(memory_format=layout)(blank.contiguous(memory_format=layout))  # type: ignore[call-overload]
            return layout is torch.channels_last, notes
        except (RuntimeError, ValueError) as e:
            if out_of_memory(e) or isinstance(e, UserError):
                raise
            if layout is torch.contiguous_format:
                size = " x ".join(map(str, blank.shape[2:]))
                raise InputError(f"net: {name} cannot take images of {size}: {first_line(e)}") from e
            notes.append(f"net {name} cannot compute channels last, which is faster ({first_line(e)})")
    raise AssertionError("unreachable")


def count_parameters(net: nn.Module, encoder: Encoder | None) -> tuple[int, int]:
    """Count the frozen parameters, those of the encoder among them, and the trained ones."""
    encoders = 0 if encoder is None else sum(p.numel() for n, p in encoder.net.named_parameters() if not of_head(n))
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    return encoders + sum(p.numel() for p in net.parameters()) - trained, trained


def prepare(
    nets: Sequence[nn.Module], settings: RunSettings, batches: Batches, source: Source, device: torch.device
) -> list[str]:
    """Give the first of equal nets the weights that ``init_from`` names, and all of them their memory layout and compiled
    forward; returns notes for the user."""
    first, size, notes = nets[0], settings.input_size, []
    if settings.tune == "head":
        # at most 2,000 training images, evenly chosen
        features = batches.fixed_features(source.train[:: max(1, -(-len(source.train) // 2000))])
        for head in (m for net in nets for m in net.modules() if isinstance(m, FeatureHead)):
            head.standardise_by(features)
    elif settings.init_from and settings.tune == "full":
        count = load_weights(first, checkpoint_of(Path(settings.init_from)), settings.init_head)
        notes.append(f"{count} of the net's {len(first.state_dict())} tensors are from {settings.init_from}")
    first.eval()
    with refusing_unused_adapters(first) if settings.tune == "lora" else contextlib.nullcontext():
        batches.channels_last, found = settle_layout(first, batches.blank(2, size), settings.net)
    notes += found
    first.train()
    for net in nets:
        if batches.channels_last:
            net.to(memory_format=torch.channels_last).register_forward_pre_hook(_images_channels_last)
        if settings.compile != "no":
            net.forward = CompiledForward(net, settings.compile)
    return notes


#: In the message of PyTorch's batch norm, also as ``torch.compile`` passes it on.
_ONE_VALUE = "more than 1 value per channel"


@contextlib.contextmanager
def enough_images_for(net: str, size: Mapping[str, int]) -> Iterator[None]:
    """Turn what PyTorch raises where batch norm has one value per channel into a ConfigError that says what to do.
    ``size``: kind -> images per step in this process."""
    try:
        yield
    except (ValueError, RuntimeError) as e:
        if _ONE_VALUE not in str(e):
            raise
        images = " + ".join(f"{n} {kind}" for kind, n in size.items())
        each = " in each process" if distributed.world_size() > 1 else ""
        fault = (
            f"net: batch norm in {net} needs two or more images in a forward pass; a step has {images} images{each}. Raise"
            " --batch_size or --ratio, or choose a larger --img_size or another --net"
        )
        raise ConfigError([fault]) from e


def _images_channels_last(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A hook before a net's forward. Its weights alone do not decide the layout where they are computed in the forward pass
    (weight norm of ``cnn13``), and pooling in the other layout takes twelve times as long."""
    images, *rest = args
    if isinstance(images, Tensor) and images.dim() == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    return (images, *rest)


class CompiledForward:
    """Stands in for ``net.forward``: compiled while the net trains, as written while it evaluates.

    As an attribute of the instance it is inside ``net.__call__``: hooks on the net (MUSCLE's forward capture) and USB's
    batch-norm controller stay outside the compiled part, and parameters keep their names. A compiled graph serves one batch
    size; the second size compiles one for any size. A copy of the net has its own.
    """

    def __init__(self, net: nn.Module, mode: str) -> None:
        self.net, self.mode = net, mode
        self.as_written = type(net).forward.__get__(net)
        self.compiled = torch.compile(self.as_written, mode=mode)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.net.training:
            return self.as_written(*args, **kwargs)
        try:
            return self.compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as e:
            if out_of_memory(e) or _ONE_VALUE in str(e):
                raise
            raise InputError(
                f"compile: {type(self.net).__name__} cannot be compiled ({type(e).__name__}: {first_line(e)}); use --compile no"
            ) from e

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledForward:
        return CompiledForward(memo[id(self.net)], self.mode)


def check_compiler(mode: str, device: torch.device) -> None:
    """Raise an InputError that says what is missing if nothing can be compiled here."""
    if mode == "no":
        return
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns that there is no GPU
    try:
        torch.compile(lambda x: x.sin() + 1, mode=mode)(torch.zeros(8, device=device))
    except Exception as e:  # whatever a compiler, or its absence, brings up
        if out_of_memory(e):
            raise
        if device.type == "cpu" and not any(shutil.which(c) for c in ("g++", "clang++", "c++")):
            raise InputError("compile: needs a C++ compiler such as g++, which is not here; use --compile no") from e
        what = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler that works"
        raise InputError(f"compile: needs {what} ({type(e).__name__}: {first_line(e)}); use --compile no") from e


class _SyncOnCPU(nn.SyncBatchNorm):
    """PyTorch's ``SyncBatchNorm``, which needs GPUs, on CPUs; for the same number of images in every process."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or distributed.world_size() == 1:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum or 0.0,
                self.eps,
            )  # fmt: skip
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        others = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        mean = distributed.mean(x.mean(others))
        centred = x - mean.view(shape)
        variance = distributed.mean((centred**2).mean(others))
        n = x.numel() // x.shape[1] * distributed.world_size()
        with torch.no_grad():
            self.num_batches_tracked += 1
            share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance * n / max(n - 1, 1), share)
        out = centred * (variance + self.eps).rsqrt().view(shape)
        return out * self.weight.view(shape) + self.bias.view(shape) if self.affine else out


def synchronise_batch_norm(net: nn.Module, device: torch.device) -> nn.Module:
    """The net with its batch norms' statistics taken over all processes; an InputError for a kind that only a GPU can
    synchronise."""
    net = convert_sync_batchnorm(net)
    for name, module in net.named_modules() if device.type != "cuda" else ():
        if type(module) is nn.SyncBatchNorm:
            module.__class__ = _SyncOnCPU
        elif isinstance(module, nn.SyncBatchNorm):
            raise InputError(f"sync_bn: {type(module).__name__} ({name}) needs GPUs; give --sync_bn false")
    return net
