"""Weights from a file, .safetensors or torch's format: a checkpoint of this package, of USB or timm, or a plain state dict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from muscle_plugin.errors import InputError
from muscle_plugin.files import load_safetensors, load_tensors


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


def load_weights(net: nn.Module, path: Path, with_head: bool, whole: bool = False) -> int:
    """Load every weight whose name and shape fit, of the classifier ``with_head`` only, and return how many did; an
    InputError if that is less than half of the net's without its classifier, or, ``whole``, not all of these."""
    found, own = read_weights(path), net.state_dict()
    wanted = {n: t for n, t in own.items() if with_head or not of_head(n, top=whole)}
    wrapped = {f"backbone.{n}": t for n, t in found.items()}
    unwrapped = {n.removeprefix("backbone."): t for n, t in found.items()}
    fits = [
        {n: t for n, t in state.items() if n in wanted and t.shape == wanted[n].shape}
        for state in (found, wrapped, unwrapped)
    ]
    best = max(fits, key=len)
    if 2 * len(best) < len([n for n in own if not of_head(n)]):
        raise InputError(
            f"init_from: {path}: only {len(best)} of the net's {len(own)} weights are there, by name and shape; is it of"
            " another net?"
        )
    backbone = [n for n in own if not of_head(n, top=True) and not n.endswith("num_batches_tracked")]
    if whole and (missing := [n for n in backbone if n not in best]):
        raise InputError(
            f"init_from: {path}: {len(missing)} of the backbone's {len(backbone)} weights are missing or of another shape"
            f" ({missing[0]}, ...), and what is frozen must be there"
        )
    net.load_state_dict(own | best)
    return len(best)


def of_head(name: str, top: bool = False) -> bool:
    """Whether a tensor of this name belongs to a net's classifier; ``top``: of a net that no other module holds, where parts of
    a backbone may have such names."""
    parts = name.split(".")
    return not {"classifier", "classifier2", "fc", "head"}.isdisjoint(parts[:1] if top else parts)
