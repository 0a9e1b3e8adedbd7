"""The random numbers of augmentations: of several views at once, and of one process's part of a batch.

A view's numbers are those of its own generator for the whole batch, whatever it is made together with and however many
processes share the batch. So views can be augmented in one go, which costs a fraction of the calls, and several processes
make the very views that one would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Whose numbers are drawn: ``count`` views each of ``whole`` images, of which images ``start`` to ``stop`` are here.

    The generator is one of the CPU: the same draws everywhere, and known without waiting for a GPU.
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

    def last(self, numbers: Tensor) -> Tensor:
        """Of numbers (..., drawn) those of the images here."""
        if self.stop - self.start == self.whole:
            return numbers
        return numbers.unflatten(-1, (self.count, self.whole))[..., self.start : self.stop].flatten(-2)


class BatchRandom:
    """BatchRandom for the images of ``parts``, one part after the other, n in all."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = tuple(parts)

    @classmethod
    def of(cls, generator: Random, n: int) -> BatchRandom:
        """BatchRandom for ``n`` images from one generator; of draws, these themselves."""
        return generator if isinstance(generator, BatchRandom) else cls([Part(generator, 1, n, 0, n)])

    def _all(self, draw: Callable[[Part], Tensor]) -> Tensor:
        return torch.cat([p.last(draw(p)) for p in self._parts], -1)

    def uniform(self, low: float, high: float, *slots: int) -> Tensor:
        """(*slots, n) float32 between ``low`` and ``high``."""
        drawn = self._all(lambda p: torch.rand(*slots, p.drawn, generator=p.generator, dtype=torch.float32))
        return drawn if (low, high) == (0, 1) else drawn * (high - low) + low

    def integers(self, below: int, *slots: int) -> Tensor:
        """(*slots, n) int64 from 0 to ``below - 1``."""
        return self._all(lambda p: torch.randint(below, (*slots, p.drawn), generator=p.generator))

    def coins(self, *slots: int) -> Tensor:
        """(*slots, n) bool, true half of the time."""
        return self.uniform(0, 1, *slots) < 0.5

    def normal(self, *shape: int) -> Tensor:
        """(n, *shape) float32 of the standard normal distribution."""
        rows = [
            torch.randn(p.drawn, *shape, generator=p.generator, dtype=torch.float32).movedim(0, -1) for p in self._parts
        ]
        return torch.cat([p.last(x) for p, x in zip(self._parts, rows, strict=True)], -1).movedim(-1, 0)


#: What an augmentation draws from.
Random: TypeAlias = torch.Generator | BatchRandom
