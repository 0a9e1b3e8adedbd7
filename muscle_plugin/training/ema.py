"""Averaged weights, with the interface of USB's EMA and without its two state-dict loads per step."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EMA:
    """Keeps ``ema_model`` at the exponential moving average of ``model``.

    Parameters are averaged, ``shadow <- decay * shadow + (1 - decay) * parameter``; buffers (running statistics of
    batch norm) are copied from the model, as USB does, or left to the averaged net's own forward passes.

    Args:
        model: the trained net.
        ema_model: a net of the same structure; it holds the average.
        decay: momentum in [0, 1); 0 makes the average the model itself.
        own_buffers: leave the averaged net's buffers alone.

    Attributes:
        backup: the model's own weights while it computes with the averages, else empty.
    """

    def __init__(self, model: nn.Module, ema_model: nn.Module, decay: float, own_buffers: bool = False) -> None:
        self.decay = decay
        self._parameters = list(model.parameters())
        self._averages = list(ema_model.parameters())
        buffers, copies = dict(model.named_buffers()), dict(ema_model.named_buffers())
        self._buffers = [] if own_buffers else list(buffers.values())
        self._copies = [] if own_buffers else [copies[n] for n in buffers]
        self._names = [n for n, _ in model.named_parameters()]
        self.backup: list[Tensor] = []

    @property
    def shadow(self) -> dict[str, Tensor]:
        """Averages by parameter name."""
        return dict(zip(self._names, (a.data for a in self._averages), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present weights into the average. To be called once per step."""
        torch._foreach_lerp_(self._averages, self._parameters, 1 - self.decay)
        if self._buffers:
            torch._foreach_copy_(self._copies, self._buffers)

    def apply_shadow(self) -> None:
        """Let the model compute with the averages until :meth:`restore`."""
        self.backup = [p.data for p in self._parameters]
        for p, a in zip(self._parameters, self._averages, strict=True):
            p.data = a.data

    def restore(self) -> None:
        """Give the model its own weights back."""
        for p, own in zip(self._parameters, self.backup, strict=True):
            p.data = own
        self.backup = []
