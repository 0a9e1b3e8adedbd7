"""Initial weights from a checkpoint: of this package, of USB, of timm, or a plain state dict, .safetensors too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from muscle_plugin.files import load_safetensors, load_tensors

#: Last parts of a net's parameter names that make up its classifier.
HEADS = ("classifier", "classifier2", "fc", "head")


def load_weights(net: nn.Module, path: Path, with_head: bool) -> int:
    """Take over every weight whose name and shape fit, and return how many.

    Args:
        with_head: the classifier too.

    Raises:
        ValueError: unreadable, or less than half of the net's weights (without its classifier) are in the file.
    """
    found = load_safetensors(path) if path.suffix == ".safetensors" else _state_dict(load_tensors(path, "cpu"))
    own = net.state_dict()
    wanted = {n: t for n, t in own.items() if with_head or not _of_head(n)}
    best: dict[str, Tensor] = {}
    for prefix in ("", "backbone.", "module."):  # a wrapper's, of the file or of the net
        for candidate in (
            {prefix + n: t for n, t in found.items()},
            {n.removeprefix(prefix): t for n, t in found.items()},
        ):
            fit = {n: t for n, t in candidate.items() if n in wanted and t.shape == wanted[n].shape}
            best = max(best, fit, key=len)
    if 2 * len(best) < len([n for n in own if not _of_head(n)]):
        raise ValueError(
            f"init_from: {path}: only {len(best)} of the net's {len(own)} weights are there, by name and shape; is it of"
            " another net?"
        )
    net.load_state_dict(own | best)
    return len(best)


def _state_dict(content: dict[str, Any]) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint, or what else holds tensors by name."""
    for key in ("ema_model", "model", "state_dict"):
        if isinstance(content.get(key), dict):
            return {n: t for n, t in content[key].items() if isinstance(t, Tensor)}
    return {n: t for n, t in content.items() if isinstance(t, Tensor)}


def _of_head(name: str) -> bool:
    return any(part in HEADS for part in name.split("."))
