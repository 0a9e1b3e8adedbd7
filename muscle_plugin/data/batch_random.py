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
    """``count`` views each of images ``start`` to ``stop`` of a batch of ``whole`` images.

    The generator is on the CPU: it draws the same numbers everywhere, known without waiting for a GPU. It draws for the whole
    batch, of which the slice keeps its part.
    """

    generator: torch.Generator
    count: int
    whole: int
    start: int
    stop: int

    @property
    def drawn(self) -> int:
        """Images for which numbers are drawn."""
        return self.count * self.whole

    def own(self, numbers: Tensor) -> Tensor:
        """Of numbers (..., drawn), those of the slice's images."""
        if self.stop - self.start == self.whole:
            return numbers
        return numbers.unflatten(-1, (self.count, self.whole))[..., self.start : self.stop].flatten(-2)


class BatchRandom:
    """Random numbers for the n images of all slices, one slice after the other."""

    def __init__(self, slices: Sequence[BatchSlice]) -> None:
        self._slices = tuple(slices)

    @classmethod
    def of(cls, generator: torch.Generator | BatchRandom, n: int) -> BatchRandom:
        """Random numbers for ``n`` images from one generator; a BatchRandom is returned as is."""
        return generator if isinstance(generator, BatchRandom) else cls([BatchSlice(generator, 1, n, 0, n)])

    def _all(self, draw: Callable[[BatchSlice], Tensor]) -> Tensor:
        return torch.cat([s.own(draw(s)) for s in self._slices], -1)

    def uniform(self, low: float, high: float, *slots: int) -> Tensor:
        """(*slots, n) float32 between ``low`` and ``high``."""
        drawn = self._all(lambda s: torch.rand(*slots, s.drawn, generator=s.generator, dtype=torch.float32))
        return drawn if (low, high) == (0, 1) else drawn * (high - low) + low

    def integers(self, below: int, *slots: int) -> Tensor:
        """(*slots, n) int64 from 0 to ``below - 1``."""
        return self._all(lambda s: torch.randint(below, (*slots, s.drawn), generator=s.generator))

    def coins(self, *slots: int) -> Tensor:
        """(*slots, n) bool, true half of the time."""
        return self.uniform(0, 1, *slots) < 0.5

    def normal(self, *shape: int) -> Tensor:
        """(n, *shape) float32 of the standard normal distribution."""

        def draw(s: BatchSlice) -> Tensor:
            return torch.randn(s.drawn, *shape, generator=s.generator, dtype=torch.float32).movedim(0, -1)

        return self._all(draw).movedim(-1, 0)
