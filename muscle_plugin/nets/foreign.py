"""Nets of torchvision and of plugins, with the calling convention of USB's nets."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from muscle_plugin.errors import InputError
from muscle_plugin.nets.base import BackboneNet, cut_last_linear
from muscle_plugin.nets.weights import misfit, read_weights
from muscle_plugin.registry.names import PLUGIN_NETS
from muscle_plugin.text import fault_in, first_line


def torchvision_statistics(name: str, path: str = "") -> tuple[tuple[float, ...], tuple[float, ...], str] | None:
    """Mean and standard deviation of the pixels, and interpolation, with which the weights in the file of torchvision's name
    ``path`` were trained; of a file of any other name the model's default weights."""
    import torchvision

    try:
        published = torchvision.models.get_model_weights(name)
    except ValueError:
        return None
    made = next((w for w in published if Path(w.url).name == Path(path).name), published.DEFAULT).transforms()
    return tuple(made.mean), tuple(made.std), made.interpolation.value


def torchvision_net(
    name: str, num_classes: int, pretrained: bool = False, pretrained_path: str | Path | None = None
) -> BackboneNet:
    """Build a classifier of torchvision whose last linear layer is replaced by a new head. It takes images of three channels;
    its pretrained weights are a file of a state dict, with a classifier or without."""
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise InputError(f"net: torchvision has no {name!r}; known: {', '.join(known)}")
    net = torchvision.models.get_model(name, weights=None)
    cut = cut_last_linear(net)
    if cut is None:
        raise InputError(f"net: torchvision's {name} does not end in a linear layer")
    if pretrained:
        if not pretrained_path:
            raise InputError(
                f"net: pretrained weights of torchvision's {name} are read from a file: --pretrain_path FILE"
            )
        read, head = read_weights(Path(pretrained_path)), f"{cut[0]}."
        state = {n: t for n, t in read.items() if not n.startswith(head)}
        if fault := misfit(state, net.state_dict()):
            raise InputError(f"net: {pretrained_path}: not weights of torchvision's {name}: {fault}")
        net.load_state_dict(state, strict=False)
    whole = BackboneNet(in_channels=3)
    whole.backbone = net
    whole.set_heads(cut[1].in_features, num_classes)
    return whole


def plugged_net(
    name: str,
    num_classes: int,
    in_channels: int,
    img_size: int,
    pretrained: bool = False,
    pretrained_path: str | Path | None = None,
) -> nn.Module:
    """Build the net that a plugin registered under ``name``, and try it on two images; what it does wrong is an InputError of
    one line that names the plugin. Pretrained weights are refused: the function itself loads what it wants."""
    if pretrained:
        raise InputError(f"net: {name} has no pretrained weights")
    entry = PLUGIN_NETS[name]
    what = f"{entry.place}: net {name!r}"
    given = {"num_classes": num_classes, "channels": in_channels, "img_size": img_size}
    takes = inspect.signature(entry.build).parameters
    everything = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    try:
        net = entry.build(**{n: v for n, v in given.items() if everything or n in takes})
    except Exception as e:
        raise InputError(fault_in(e, entry.place, what)) from e
    if not isinstance(net, nn.Module):
        raise InputError(f"{what}: must return an nn.Module, got {type(net).__name__}")
    images = torch.rand(2, in_channels, img_size, img_size, generator=torch.Generator().manual_seed(0))
    was_training = net.training
    net.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            out = net(images)
        except Exception as e:
            fault = fault_in(e, entry.place, f"{what} cannot take images of shape {tuple(images.shape)}")
            raise InputError(fault) from e
        if isinstance(out, Tensor):
            net = _wrapped(net, images, out, num_classes, what)
        else:
            _check(net, images, out, num_classes, what)
    return net.train(was_training)


def _wrapped(net: nn.Module, images: Tensor, logits: Tensor, num_classes: int, what: str) -> BackboneNet:
    """The classifier that gives ``logits``, with its last linear layer as the head."""
    cut = cut_last_linear(net, num_classes)
    if cut is None or logits.shape != (2, num_classes):
        raise InputError(
            f"{what} gives {tuple(logits.shape)} for 2 images; expected (2, {num_classes}) from an nn.Linear of {num_classes}"
            " outputs at its end, or {'logits': ..., 'feat': ...}"
        )
    path, head = cut
    whole = BackboneNet(images.shape[1])
    whole.classifier, whole.backbone, whole.num_features = head, net, head.in_features
    try:
        torch.testing.assert_close(whole(images)["logits"], logits, rtol=1e-3, atol=1e-4)
    except Exception as e:
        raise InputError(
            f"{what} does not end in its last nn.Linear, {path}: something comes after it (softmax? it is not wanted);"
            " return {'logits': ..., 'feat': ...}"
        ) from e
    return whole


def _check(net: nn.Module, images: Tensor, out: Any, num_classes: int, what: str) -> None:
    """Refuse a net that has not USB's calling convention; set ``num_features`` if it lacks that alone."""
    is_mapping = isinstance(out, Mapping)
    found = {k: tuple(getattr(v, "shape", ())) for k, v in out.items()} if is_mapping else type(out).__name__
    reason = ""
    try:
        logits, feat = out["logits"], out["feat"]
        found_again = net(feat, only_fc=True), net(images, only_feat=True)
        shapes = [tuple(x.shape) for x in (logits, feat, *found_again)]
        right = shapes == 2 * [(2, num_classes), (2, feat.shape[-1])]
    except Exception as e:
        right, reason = False, f" ({first_line(e)})"
    if not right:
        raise InputError(
            f"{what}: its forward gives {found} for 2 images{reason}; expected"
            f" {{'logits': (2, {num_classes}), 'feat': (2, F)}}, feat alone with only_feat=True (of images), logits alone with"
            " only_fc=True (of feat); USBNet's does"
        )
    if not hasattr(net, "num_features"):
        net.num_features = feat.shape[1]
