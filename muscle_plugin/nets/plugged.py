"""Nets of plugins: built, tried on two images, and given the calling convention of USB's nets if they lack it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from muscle_plugin.errors import InputError
from muscle_plugin.nets.base import BackboneNet, cut_last_linear
from muscle_plugin.registry.names import PLUGIN_NETS
from muscle_plugin.text import fault_in, first_line, shown


class WrappedNet(BackboneNet):
    """A classifier whose last step, a linear layer, has been cut off and becomes the head: its input is the feature."""

    def __init__(self, net: nn.Module, head: nn.Linear, in_channels: int) -> None:
        super().__init__(in_channels)
        self.classifier, self.backbone, self.num_features = head, net, head.in_features


def plugged_net(
    name: str,
    num_classes: int,
    in_channels: int,
    img_size: int,
    pretrained: bool = False,
    pretrained_path: str | Path | None = None,
) -> nn.Module:
    """Build the net that a plugin registered under ``name``.

    Raises:
        InputError: the function fails, or returns no net that can be used; one line that names the plugin. Or pretrained
            weights are asked for: the function itself loads what it wants.
    """
    if pretrained:
        raise InputError(f"net: {name} has no pretrained weights")
    return _Trial(name, num_classes, in_channels, img_size).net()


class _Trial:
    """Builds a plugin's net and tries it on blank images."""

    def __init__(self, name: str, num_classes: int, channels: int, img_size: int) -> None:
        self.entry = PLUGIN_NETS[name]
        self.what = f"{self.entry.place}: net {name!r}"
        self.classes = num_classes
        self.given = {"num_classes": num_classes, "channels": channels, "img_size": img_size}
        self.images = torch.rand(2, channels, img_size, img_size, generator=torch.Generator().manual_seed(0))

    def fault(self, text: str) -> NoReturn:
        raise InputError(f"{self.what}: {text}")

    def net(self) -> nn.Module:
        takes = inspect.signature(self.entry.build).parameters
        everything = any(p.kind is p.VAR_KEYWORD for p in takes.values())
        arguments = {n: v for n, v in self.given.items() if everything or n in takes}
        try:
            net = self.entry.build(**arguments)
        except Exception as e:
            raise InputError(fault_in(e, self.entry.place, self.what)) from e
        if not isinstance(net, nn.Module):
            self.fault(f"must return an nn.Module, got {type(net).__name__}")
        was_training = net.training
        net.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                out = net(self.images)
            except Exception as e:
                what = f"{self.what} cannot take images of shape {tuple(self.images.shape)}"
                raise InputError(fault_in(e, self.entry.place, what)) from e
            if isinstance(out, Tensor):
                net = self.wrapped(net, out)
            else:
                self.check(net, out)
        return net.train(was_training)

    def wrapped(self, net: nn.Module, logits: Tensor) -> nn.Module:
        """The classifier with its last linear layer as the head."""
        if tuple(logits.shape) != (2, self.classes):
            self.fault(
                f"gives {tuple(logits.shape)} for 2 images; expected (2, {self.classes}), a number for each class"
            )
        cut = cut_last_linear(net, self.classes)
        if cut is None:
            self.fault(f"has no nn.Linear of {self.classes} outputs at its end; return {{'logits': ..., 'feat': ...}}")
        path, head = cut
        whole = WrappedNet(net, head, self.images.shape[1])
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
        """Refuse a net that has not USB's calling convention; set ``num_features`` if it lacks that alone."""
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
