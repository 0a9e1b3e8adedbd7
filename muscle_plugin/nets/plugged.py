"""Nets of plugins: built, tried on two images, and given the calling convention of USB's nets if they lack it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from muscle_plugin.nets.base import USBNet, grouped, groups_in_order
from muscle_plugin.nets.options import refuse_pretrained
from muscle_plugin.registry.extension import PLUGIN_NETS
from muscle_plugin.text import first_line, shown


class WrappedNet(USBNet):
    """A classifier whose last step is a linear layer, which becomes the head: what goes into it is the feature.

    Args:
        net: the classifier; its layer ``path`` is replaced by nothing.
        path: name of the linear layer.
        in_channels: channels of the images.
    """

    OPTIONS = ()

    def __init__(self, net: nn.Module, path: str, in_channels: int) -> None:
        super().__init__(in_channels)
        parent, _, last = path.rpartition(".")
        head = net.get_submodule(path)
        assert isinstance(head, nn.Linear)
        setattr(net.get_submodule(parent), last, nn.Identity())
        self.backbone = net
        self.num_features = head.in_features
        self.classifier = head

    def features(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def group_matcher(self, coarse: bool = False, prefix: str = "") -> Any:
        """Groups in the order of the net's modules; see :meth:`USBNet.group_matcher`."""
        return grouped(groups_in_order(n for n, _ in self.backbone.named_parameters()), prefix)


def plugged_net(
    name: str, num_classes: int, in_channels: int, img_size: int, pretrained: bool = False, pretrained_path: Any = None
) -> nn.Module:
    """The net that a plugin registered.

    Args:
        name: under which it is registered.
        num_classes: outputs.
        in_channels: channels of the images.
        img_size: side of the images, in pixels.
        pretrained: refused: the plugin's function loads what it wants.

    Raises:
        ValueError: its function fails, or returns no net that can be used; one line that names the plugin.
    """
    refuse_pretrained(name, pretrained)
    return _Builder(name, num_classes, in_channels, img_size).net()


class _Builder:
    def __init__(self, name: str, num_classes: int, channels: int, img_size: int) -> None:
        self.entry = PLUGIN_NETS[name]
        self.what = f"{self.entry.place}: net {name!r}"
        self.classes = num_classes
        self.given = {"num_classes": num_classes, "channels": channels, "img_size": img_size}

    def fault(self, text: str) -> NoReturn:
        raise ValueError(f"{self.what}: {text}")

    def net(self) -> nn.Module:
        from muscle_plugin.registry.plugins import fault_in

        takes = inspect.signature(self.entry.build).parameters.values()
        everything = any(p.kind is p.VAR_KEYWORD for p in takes)
        arguments = {n: v for n, v in self.given.items() if everything or n in {p.name for p in takes}}
        try:
            net = self.entry.build(**arguments)
        except Exception as e:
            raise ValueError(fault_in(e, self.entry.place, self.what)) from e
        if not isinstance(net, nn.Module):
            self.fault(f"must return an nn.Module, got {type(net).__name__}")
        was_training = net.training
        net.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            size, channels = self.given["img_size"], self.given["channels"]
            images = torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))
            out = self.output(net, images)
            if isinstance(out, Tensor):
                net = self.wrapped(net, images, out)
                out = self.output(net, images)
            self.check(net, images, out)
        return net.train(was_training)

    def output(self, net: nn.Module, images: Tensor) -> Any:
        from muscle_plugin.registry.plugins import fault_in

        try:
            return net(images)
        except Exception as e:
            what = f"{self.what} cannot take images of shape {tuple(images.shape)}"
            raise ValueError(fault_in(e, self.entry.place, what)) from e

    def wrapped(self, net: nn.Module, images: Tensor, logits: Tensor) -> nn.Module:
        """The classifier with its last linear layer as the head."""
        expected = (len(images), self.classes)
        if tuple(logits.shape) != expected:
            self.fault(
                f"gives {tuple(logits.shape)} for 2 images; expected (2, {self.classes}), a number for each class"
            )
        layers = [
            n for n, m in net.named_modules() if isinstance(m, nn.Linear) and m.out_features == self.classes and n
        ]
        if not layers:
            self.fault(
                f"has no nn.Linear of {self.classes} outputs at its end, before which the features would be; return"
                " {'logits': ..., 'feat': ...}"
            )
        whole = WrappedNet(net, layers[-1], images.shape[1])
        try:
            out = whole(images)["logits"]
            same = out.shape == logits.shape and torch.allclose(out, logits, rtol=1e-3, atol=1e-4)
        except Exception:
            same = False
        if not same:
            self.fault(
                f"does not end in its last nn.Linear, {layers[-1]}: something comes after it (softmax? it is not wanted);"
                " return {'logits': ..., 'feat': ...}"
            )
        return whole

    def check(self, net: nn.Module, images: Tensor, out: Any) -> None:
        wanted = f"expected {{'logits': (N, {self.classes}), 'feat': (N, F)}}"
        if not isinstance(out, Mapping):
            self.fault(f"its forward gives {type(out).__name__}; {wanted}, or the logits alone")
        for key in ("logits", "feat"):
            if not isinstance(out.get(key), Tensor):
                self.fault(f"its forward gives no {key}, but {', '.join(map(str, out)) or 'nothing'}; {wanted}")
        logits, feat = out["logits"], out["feat"]
        if tuple(logits.shape) != (len(images), self.classes):
            self.fault(f"its logits have shape {tuple(logits.shape)} for 2 images; {wanted}")
        if feat.ndim != 2 or len(feat) != len(images):
            self.fault(f"its feat has shape {tuple(feat.shape)} for 2 images; {wanted}")
        advice = (
            "its forward must take only_feat=True (images to feat) and only_fc=True (feat to logits); USBNet's does"
        )
        try:
            same = net(images, only_feat=True), net(feat, only_fc=True)
        except Exception as e:
            self.fault(f"{advice} ({shown(first_line(e))})")
        for found, like in zip(same, (feat, logits), strict=True):
            if not isinstance(found, Tensor) or found.shape != like.shape:
                self.fault(advice)
        if not hasattr(net, "num_features"):
            net.num_features = feat.shape[1]  # type: ignore[assignment]
