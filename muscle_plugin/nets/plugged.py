"""Nets of plugins: built, tried on two images, and given the calling convention of USB's nets if they lack it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from muscle_plugin.errors import InputError
from muscle_plugin.nets.base import BackboneNet, cut_out, last_linear
from muscle_plugin.nets.options import refuse_pretrained
from muscle_plugin.registry.names import PLUGIN_NETS
from muscle_plugin.text import fault_in, first_line, shown


class WrappedNet(BackboneNet):
    """A classifier whose linear layer ``path``, its last step, becomes the head: that layer's input is the feature."""

    def __init__(self, net: nn.Module, path: str, in_channels: int) -> None:
        super().__init__(in_channels)
        self.classifier = head = cut_out(net, path)
        self.backbone, self.num_features = net, head.in_features


def plugged_net(
    name: str,
    num_classes: int,
    in_channels: int,
    img_size: int,
    pretrained: bool = False,
    pretrained_path: str | Path | None = None,
) -> nn.Module:
    """Build the net that a plugin registered.

    Args:
        name: under which it is registered.
        num_classes: outputs.
        in_channels: channels of the images.
        img_size: side of the images, in pixels.
        pretrained: refused: the plugin's function loads what it wants.

    Raises:
        InputError: the function fails, or returns no net that can be used; one line that names the plugin.
    """
    refuse_pretrained(name, pretrained)
    return _Trial(name, num_classes, in_channels, img_size).net()


class _Trial:
    """Builds a plugin's net and tries it on blank images."""

    def __init__(self, name: str, num_classes: int, channels: int, img_size: int) -> None:
        self.entry = PLUGIN_NETS[name]
        self.what = f"{self.entry.place}: net {name!r}"
        self.classes = num_classes
        self.given = {"num_classes": num_classes, "channels": channels, "img_size": img_size}
        shape, generator = (2, channels, img_size, img_size), torch.Generator().manual_seed(0)
        self.images = torch.rand(*shape, generator=generator)

    def fault(self, text: str) -> NoReturn:
        raise InputError(f"{self.what}: {text}")

    def net(self) -> nn.Module:
        takes = inspect.signature(self.entry.build).parameters.values()
        everything = any(p.kind is p.VAR_KEYWORD for p in takes)
        arguments = {n: v for n, v in self.given.items() if everything or n in {p.name for p in takes}}
        try:
            net = self.entry.build(**arguments)
        except Exception as e:
            raise InputError(fault_in(e, self.entry.place, self.what)) from e
        if not isinstance(net, nn.Module):
            self.fault(f"must return an nn.Module, got {type(net).__name__}")
        was_training = net.training
        net.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            out = self.output(net)
            if isinstance(out, Tensor):
                net = self.wrapped(net, out)
                out = self.output(net)
            self.check(net, out)
        return net.train(was_training)

    def output(self, net: nn.Module) -> object:
        try:
            return net(self.images)
        except Exception as e:
            what = f"{self.what} cannot take images of shape {tuple(self.images.shape)}"
            raise InputError(fault_in(e, self.entry.place, what)) from e

    def wrapped(self, net: nn.Module, logits: Tensor) -> nn.Module:
        """The classifier with its last linear layer as the head."""
        if tuple(logits.shape) != (2, self.classes):
            self.fault(
                f"gives {tuple(logits.shape)} for 2 images; expected (2, {self.classes}), a number for each class"
            )
        path = last_linear(net, self.classes)
        if not path:
            self.fault(
                f"has no nn.Linear of {self.classes} outputs at its end, before which the features would be; return"
                " {'logits': ..., 'feat': ...}"
            )
        whole = WrappedNet(net, path, self.images.shape[1])
        try:
            out = whole(self.images)["logits"]
            same = out.shape == logits.shape and torch.allclose(out, logits, rtol=1e-3, atol=1e-4)
        except Exception:
            same = False
        if not same:
            self.fault(
                f"does not end in its last nn.Linear, {path}: something comes after it (softmax? it is not wanted);"
                " return {'logits': ..., 'feat': ...}"
            )
        return whole

    def check(self, net: nn.Module, out: object) -> None:
        wanted = f"expected {{'logits': (N, {self.classes}), 'feat': (N, F)}}"
        if not isinstance(out, Mapping):
            self.fault(f"its forward gives {type(out).__name__}; {wanted}, or the logits alone")
        for key in ("logits", "feat"):
            if not isinstance(out.get(key), Tensor):
                self.fault(f"its forward gives no {key}, but {', '.join(map(str, out)) or 'nothing'}; {wanted}")
        logits, feat = out["logits"], out["feat"]
        if tuple(logits.shape) != (2, self.classes):
            self.fault(f"its logits have shape {tuple(logits.shape)} for 2 images; {wanted}")
        if feat.ndim != 2 or len(feat) != 2:
            self.fault(f"its feat has shape {tuple(feat.shape)} for 2 images; {wanted}")
        advice = (
            "its forward must take only_feat=True (images to feat) and only_fc=True (feat to logits); USBNet's does"
        )
        try:
            parts = net(self.images, only_feat=True), net(feat, only_fc=True)
        except Exception as e:
            self.fault(f"{advice} ({shown(first_line(e))})")
        if any(not isinstance(x, Tensor) or x.shape != y.shape for x, y in zip(parts, (feat, logits), strict=True)):
            self.fault(advice)
        if not hasattr(net, "num_features"):
            net.num_features = feat.shape[1]  # type: ignore[assignment]
