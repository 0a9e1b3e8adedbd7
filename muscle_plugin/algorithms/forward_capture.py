"""Captures, and extends, the forward passes that a USB class makes inside its ``train_step``.

A USB class calls ``self.model`` itself. To add MUSCLE without forwarding any image twice, the capture (a) keeps the logits
that the class computes anyway, and (b) appends extra views to the input of one of these calls, and cuts their outputs off
before the class sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from muscle_plugin.errors import RunError


@dataclass(frozen=True)
class Rows:
    """The rows that hold one view: ``start`` to ``stop`` of the step's ``call``-th forward, counted from 0."""

    call: int
    start: int
    stop: int
    with_gradient: bool


@dataclass
class Call:
    """One forward of the net; a ``live`` one is computed by its own weights, not by the averaged ones."""

    images: Tensor
    live: bool
    with_gradient: bool
    logits: Tensor | None = None


class ForwardCapture:
    """Context manager around one ``train_step``: ``calls`` has the calls of ``model``, without the extra views.

    The ``extra_views``, (M, ...) images, are appended to the call ``carrier``, counted from 0; ``extra_logits`` has their
    (M, C) logits. ``live`` says whether the net holds its own weights; ``rows`` are the images each call must have, if given.
    """

    def __init__(
        self, model: nn.Module, live: Callable[[], bool], extra_views: Tensor | None = None, carrier: int | None = None,
        rows: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        self._model, self._live, self._extra_views, self._carrier, self._rows = model, live, extra_views, carrier, rows
        self.calls: list[Call] = []
        self.extra_logits: Tensor | None = None

    def __enter__(self) -> ForwardCapture:
        self._handles = [
            self._model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            self._model.register_forward_hook(self._after),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        number, images = len(self.calls), args[0]
        self.calls.append(Call(images, self._live() and not kwargs, torch.is_grad_enabled()))
        if self._rows and (number >= len(self._rows) or len(images) != self._rows[number]):
            raise RunError(
                f"call {number} of the net in this step has {len(images)} images, unlike the step that was planned for"
                f" {self._rows}; set --mi_batch_norm separate for an algorithm whose steps differ"
            )
        if number == self._carrier and self._extra_views is not None:
            return (torch.cat([images, self._extra_views]), *args[1:]), kwargs
        return None

    def _after(self, _: nn.Module, args: tuple[Any, ...], output: object) -> Mapping[str, Any] | None:
        call = self.calls[-1]
        if not isinstance(output, Mapping) or "logits" not in output:
            return None
        n = len(call.images)
        if len(self.calls) - 1 == self._carrier and self._extra_views is not None:
            self.extra_logits = output["logits"][n:]
            output = {k: v[:n] if isinstance(v, Tensor) else v for k, v in output.items()}
        call.logits = output["logits"]
        return output

    def logits(self, rows: Rows) -> Tensor:
        logits = self.calls[rows.call].logits
        assert logits is not None
        return logits[rows.start : rows.stop]

    def find(self, view: Tensor) -> Rows | None:
        """Find where a view was forwarded by the net's own weights, with gradient if anywhere. It compares contents, which is
        too slow for every step."""
        n = len(view)
        for number, call in sorted(enumerate(self.calls), key=lambda x: not x[1].with_gradient):
            images = call.images
            if not call.live or call.logits is None or images.shape[1:] != view.shape[1:]:
                continue
            for start in (images == view[0]).flatten(1).all(1).nonzero().flatten().tolist():
                if start + n <= len(images) and torch.equal(images[start : start + n], view):
                    return Rows(number, start, start + n, call.with_gradient)
        return None
