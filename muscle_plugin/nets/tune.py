"""Trains a part of a pretrained net: its head, and its normalisation layers or low-rank adapters (LoRA)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from muscle_plugin.errors import InputError
from muscle_plugin.nets.build import NetBuilder, head_options
from muscle_plugin.nets.frozen import sha256
from muscle_plugin.nets.weights import load_weights, of_head
from muscle_plugin.settings.schema import RunSettings

#: Layers that have adapters by default, where a net has them: attention and MLP of timm's and USB's transformers.
LORA_TARGETS = ("qkv", "proj", "fc1", "fc2")
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)

#: Options of :class:`~.frozen.FeatureHead`.
HeadOptions = dict[Literal["hidden", "dropout", "double_head", "l2_feature"], float | bool]


class Backbone(BaseModel):
    """The pretrained backbone of a run that trains a part of its net. Checkpoints hold this in place of what is frozen.

    Attributes:
        tune: what is trained: ``head``, ``norm`` or ``lora``.
        digest: SHA-256 of the frozen weights; empty until they are loaded.
        pretrained: whether the net is built with pretrained weights.
        path: absolute path, or URL, of the file of the weights; None: an installed package, timm's hub, or the plugin of the
            net has them.
        from_run: whether the file is what ``init_from`` names.
        head: options of the head, of ``head``.
        rank, alpha, targets: of ``lora``.
    """

    model_config = ConfigDict(strict=True)

    tune: Literal["head", "norm", "lora"]
    digest: str = ""
    pretrained: bool = False
    path: str | None = None
    from_run: bool = False
    head: HeadOptions | None = None
    rank: int = Field(8, ge=1, le=1024)
    alpha: float = Field(16.0, gt=0, allow_inf_nan=False)
    targets: str | None = None

    @property
    def origin(self) -> str:
        """Where the weights come from, for messages."""
        return self.path or ("an installed package or timm's hub" if self.pretrained else "the plugin of the net")

    def net(self, build: NetBuilder, num_classes: int, with_head: bool = False) -> nn.Module:
        """Build the net with the backbone's weights, and ``with_head`` with those of the classifier where they fit.

        Raises:
            InputError: weights are missing or do not fit.
        """
        if self.path is not None and "://" not in self.path and not Path(self.path).is_file():
            raise InputError(f"{self.path}: no such file of the backbone's weights")
        if not self.from_run:
            return build(num_classes=num_classes, pretrained=self.pretrained, pretrained_path=self.path or "")
        net = build(num_classes=num_classes)
        load_weights(net, Path(str(self.path)), with_head)
        return net

    def freeze(self, net: nn.Module) -> None:
        """Freeze all of a net, in place, but its head and normalisation layers, or its head and the adapters that it is given.

        Raises:
            InputError: it has no such layers, or peft is missing.
        """
        net.requires_grad_(False)
        if self.tune == "lora":
            trained = _with_adapters(net, self.rank, self.alpha, self.targets)
        else:
            trained = [p for m in net.modules() if is_norm(m) for p in m.parameters(recurse=False)]
            if not trained:
                raise InputError(
                    "tune: norm: the net has no normalisation layers with weights; give --tune head or lora"
                )
        heads = [p for n, p in net.named_parameters() if of_head(n)]
        if not heads:
            raise InputError(f"tune: {self.tune}: the net has no head that is called classifier, fc or head")
        for p in (*trained, *heads):
            p.requires_grad_(True)


def backbone_of(settings: RunSettings, init_from: Path | None) -> Backbone | None:
    """The backbone that settings ask for, without its digest; None if all of the net is trained. ``init_from``: the file that
    the setting names."""
    s = settings
    if s.tune == "full":
        return None
    path = str(init_from or s.pretrain_path) or None
    return Backbone(
        tune=s.tune,
        pretrained=s.use_pretrain,
        path=str(Path(path).resolve()) if path and "://" not in path else path,
        from_run=init_from is not None,
        head=head_options(s) if s.tune == "head" else None,  # type: ignore[arg-type]
        rank=s.lora_rank,
        alpha=s.lora_alpha or 2.0 * s.lora_rank,
        targets=s.lora_targets,
    )


def tuned_builder(build: NetBuilder, backbone: Backbone, with_head: bool) -> NetBuilder:
    """What builds nets of which a part is trained. The first one, USB's ``model``, has the backbone's weights, ``with_head``
    those of its classifier too, and gives the backbone its digest."""

    def build_part(num_classes: int, **_: object) -> nn.Module:
        first = not backbone.digest
        net = backbone.net(build, num_classes, with_head) if first else build(num_classes=num_classes)
        backbone.freeze(net)
        if first:
            backbone.digest = frozen_digest(net)
        return net

    return build_part


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer: of PyTorch, of timm (its classes are PyTorch's or called so), or by name."""
    return isinstance(module, _NORMS) or bool(re.search(r"Norm(Act|Tlu)?(\dd\w{0,3})?$", type(module).__name__))


def frozen_digest(net: nn.Module) -> str:
    """SHA-256 of the frozen parameters, by their names without adapters."""
    return sha256({n.replace(".base_layer.", "."): p for n, p in net.named_parameters() if not p.requires_grad})


def share_frozen(net: nn.Module, other: nn.Module) -> None:
    """Put the frozen parameters of a net, themselves, in place of those of another one of the same kind."""
    for name, p in list(net.named_parameters()):
        if not p.requires_grad:
            path, _, last = name.rpartition(".")
            setattr(other.get_submodule(path), last, p)


# -- low-rank adapters


def check_peft() -> None:
    """Raise an InputError if peft is missing."""
    if find_spec("peft") is None:
        raise InputError("tune: lora needs peft, which is not installed: pip install 'muscle-plugin[lora]'")


def _with_adapters(net: nn.Module, rank: int, alpha: float, targets: str | None) -> list[nn.Parameter]:
    """Give linear layers adapters, in place, and return the adapters' parameters."""
    check_peft()
    torch.backends.mha.set_fastpath_enabled(False)  # it computes with the layers' weights, past their adapters
    from peft import LoraConfig, inject_adapter_in_model

    linear = [n for n, m in net.named_modules() if isinstance(m, nn.Linear) and not of_head(n)]
    found = {
        t: [n for n in linear if f".{n}".endswith(f".{t}")] for t in (targets or ",".join(LORA_TARGETS)).split(",")
    }
    missing = [t for t, names in found.items() if not names]
    if missing if targets else len(missing) == len(found):
        there = ", ".join(sorted({n.rpartition(".")[2] for n in linear}))
        what = f"its linear layers are {there}" if there else "it has none: give --tune norm or head"
        raise InputError(f"lora_targets: the net has no linear layer called {' or '.join(missing)}; {what}")
    names = sorted({n for names in found.values() for n in names})
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names), net)  # type: ignore[arg-type]
    return [p for p in net.parameters() if p.requires_grad]


def _adapted(net: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in net.named_modules() if hasattr(m, "base_layer") and hasattr(m, "lora_A")}


@contextlib.contextmanager
def refusing_unused_adapters(net: nn.Module) -> Iterator[None]:
    """Raise an InputError if a forward pass within computes with the weight of a layer itself, and not with its adapter."""
    layers = _adapted(net)
    used: set[nn.Module] = set()
    handles = [m.register_forward_hook(lambda m, *_: used.add(m)) for m in layers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    names = [{n.rpartition(".")[2] for n, m in layers.items() if (m in used) == what} for what in (False, True)]
    unused, others = (", ".join(sorted(n)) for n in names)
    if unused:
        raise InputError(
            f"lora_targets: adapters of {unused} would have no effect, since the net computes with the layers' weights itself;"
            f" it can have those of {others or 'other layers'}"
        )


def merge_adapters(net: nn.Module) -> None:
    """Add the adapters to the weights of their layers, in place: the net is then as it was built."""
    for name, module in _adapted(net).items():
        module.merge()  # type: ignore[operator]
        path, _, last = name.rpartition(".")
        setattr(net.get_submodule(path), last, module.base_layer)
    if hasattr(net, "peft_config"):
        del net.peft_config
