"""Nets of this package. Each returns ``{"logits", "feat"}`` and takes ``only_fc``/``only_feat``, as USB's do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from muscle_plugin.data.names import NETS
from muscle_plugin.nets.cnn13 import cnn13
from muscle_plugin.nets.small_cnn import small_cnn

OWN_NETS: dict[str, Callable[..., Any]] = {"small_cnn": small_cnn, "cnn13": cnn13}

assert tuple(OWN_NETS) == NETS

__all__ = ["OWN_NETS", "cnn13", "small_cnn"]
