"""The random numbers of augmentations, for several views at once and for one process's part of a batch.

A view's numbers are those of its own generator for the whole batch, whichever views are made with it and however many
processes share the batch. So several views can be augmented together, which takes a fraction of the calls, and several
processes make exactly the views that one would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchSlice:
    """``count`` views each of images ``start`` to ``stop`` of a batch of ``whole`` images, for all of which numbers are drawn.

    The generator is on the CPU: it draws the same numbers everywhere, known without waiting for a GPU.
    """

    generator: torch.Generator
    count: int
    whole: int
    start: int
    stop: int


class BatchRandom:
    """Random numbers for the n images of all slices, one slice after the other."""

    def __init__(self, slices: Sequence[BatchSlice]) -> None:
        self._slices = slices

    @classmethod
    def of(cls, generator: torch.Generator, n: int) -> BatchRandom:
        """Random numbers for ``n`` images from one generator."""
        return cls([BatchSlice(generator, 1, n, 0, n)])

    def _draw(self, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        parts = []
        for s in self._slices:
            numbers = draw(s.count * s.whole, s.generator)
            if s.stop - s.start < s.whole:
                numbers = numbers.unflatten(-1, (s.count, s.whole))[..., s.start : s.stop].flatten(-2)
            parts.append(numbers)
        return torch.cat(parts, -1)

    def uniform(self, low: float, high: float, *slots: int) -> Tensor:
        """(*slots, n) float32 between ``low`` and ``high``."""
        return self._draw(lambda n, g: torch.rand(*slots, n, generator=g, dtype=torch.float32)) * (high - low) + low

    def integers(self, below: int, *slots: int) -> Tensor:
        """(*slots, n) int64 from 0 to ``below - 1``."""
        return self._draw(lambda n, g: torch.randint(below, (*slots, n), generator=g))

    def coins(self, *slots: int) -> Tensor:
        """(*slots, n) bool, true half of the time."""
        return self.uniform(0, 1, *slots) < 0.5

    def normal(self, *shape: int) -> Tensor:
        """(n, *shape) float32 of the standard normal distribution."""
        drawn = self._draw(lambda n, g: torch.randn(n, *shape, generator=g, dtype=torch.float32).movedim(0, -1))
        return drawn.movedim(-1, 0)
