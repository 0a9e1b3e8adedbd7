"""Weights from a file, .safetensors or torch's format: a checkpoint of this package, of USB or timm, or a plain state dict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from muscle_plugin.errors import InputError
from muscle_plugin.files import load_safetensors, load_tensors

#: Names of modules that are classifiers.
HEADS = frozenset(["classifier", "classifier2", "fc", "head"])


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, without the prefix of a parallel model; of a checkpoint the averaged weights."""
    content: object = load_safetensors(path) if path.suffix == ".safetensors" else load_tensors(path)
    for key in ("ema_model", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    assert isinstance(content, dict)
    found = {str(n).removeprefix("module."): t for n, t in content.items() if isinstance(t, Tensor)}
    if not found:
        raise InputError(f"{path}: holds no state dict (names and tensors)")
    return found


def misfit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Say in one line which weights are missing, superfluous or of another shape; empty if all fit."""
    missing = [n for n in wanted if n not in state and not n.endswith("num_batches_tracked")]
    superfluous = [n for n in state if n not in wanted]
    shapes = [
        f"{n} {tuple(state[n].shape)} for {tuple(v.shape)}"
        for n, v in wanted.items()
        if n in state and state[n].shape != v.shape
    ]
    faults = {"missing": missing, "not in the model": superfluous, "of another shape": shapes}
    return "; ".join(
        f"{what}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for what, names in faults.items()
        if names
    )


def load_weights(net: nn.Module, path: Path, with_head: bool) -> int:
    """Load the weights in a file by name, the classifier's only ``with_head``, and return the number of tensors loaded.

    A net that holds another as ``backbone`` can be loaded from the other's weights, and the other way round. Heads may be
    absent.

    Raises:
        InputError: another weight is missing or of another shape, or a part of the net has weights that only the file has.
    """
    found, own = read_weights(path), net.state_dict()
    inside, heads = "backbone." if any(n.startswith("backbone.") for n in own) else "", classifiers(net)
    body = {n: t for n, t in own.items() if n.startswith(inside) and not n.startswith(heads)}
    parts = {n[len(inside) :].partition(".")[0] for n in body}

    def of_body(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = {n: n[len(inside) :].split(".") for n in state if n.startswith(inside) and not n.startswith(heads)}
        return {n: state[n] for n, at in named.items() if n in own or (at[0] in parts and HEADS.isdisjoint(at))}

    wrapped = {f"backbone.{n}": t for n, t in found.items()}
    unwrapped = {n.removeprefix("backbone."): t for n, t in found.items()}
    best = max((found, wrapped, unwrapped), key=lambda state: len(state.keys() & body.keys()))
    if fault := misfit(of_body(best), body):
        raise InputError(f"init_from: {path}: these weights do not fit the net: {fault}")
    fits = {n: t for n, t in best.items() if n in own and t.shape == own[n].shape and (with_head or n in body)}
    if with_head and not any(n.startswith(heads) for n in fits):
        raise InputError(f"init_head: {path}: holds no classifier of the net's size")
    net.load_state_dict(own | fits)
    return len(fits)


def classifiers(net: nn.Module) -> tuple[str, ...]:
    """What the names of the tensors of a net's classifiers begin with."""
    named = {n: (m, n.split(".")) for n, m in net.named_modules()}
    # a backbone's own `head` without its linear layer is part of how it pools
    return tuple(
        f"{n}."
        for n, (m, at) in named.items()
        if at[-1] in HEADS and (isinstance(m, nn.Linear) or "backbone" not in at)
    ) or (" ",)


def of_head(name: str) -> bool:
    """Whether a tensor of this name belongs to the classifier of a net that no other module holds."""
    return name.partition(".")[0] in HEADS
