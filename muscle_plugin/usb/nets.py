"""USB's own nets for images."""

from __future__ import annotations

import contextlib
import http.client
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from muscle_plugin.errors import InputError
from muscle_plugin.files import load_tensors
from muscle_plugin.text import first_line
from muscle_plugin.usb.names import nets


def names() -> list[str]:
    """Names of USB's nets for images. Those for text and sound have no number at the end, and would fetch their weights."""
    return sorted(n for n, x in vars(nets).items() if n[-1].isdigit() and not n.startswith("_") and callable(x))


def usb_net(
    name: str, num_classes: int, pretrained: bool = False, pretrained_path: str | Path | None = None
) -> nn.Module:
    """Build a net of :func:`names`; its pretrained weights come from a file or a URL, and are read without running code."""
    build = getattr(nets, name)
    if not pretrained:
        return build(num_classes=num_classes)
    where = str(pretrained_path or "")
    from_url = "://" in where
    if not from_url and not Path(where).is_file():
        raise InputError(
            f"net: {where or 'pretrain_path'}: no such file of weights for {name}; give --pretrain_path FILE"
        )
    try:
        if not from_url:
            load_tensors(Path(where))
        with _weights_only():
            return build(num_classes=num_classes, pretrained=True, pretrained_path=where)
    except (OSError, http.client.HTTPException) as e:
        instead = "without a network give a copy of it as --pretrain_path FILE, or --use_pretrain false"
        raise InputError(f"net: {where}: cannot be downloaded ({e}); {instead}") from e
    except (LookupError, RuntimeError, TypeError, ValueError, AttributeError, EOFError, pickle.UnpicklingError) as e:
        raise InputError(f"net: {where}: not weights of {name} as USB publishes them ({first_line(e)})") from e


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Make ``torch.load`` refuse code. USB 0.3.2 leaves ``weights_only`` to torch: off before 2.6, and in torch.hub."""
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        os.environ.pop(key)
        if before is not None:
            os.environ[key] = before
