"""The order of images: a stream of permutations, addressed by step."""

from __future__ import annotations

import torch
from torch import Tensor

from muscle_plugin.seeding import derive


class IndexStream:
    """Batches of indices from an endless chain of permutations of ``range(n)``.

    Every pass holds each index once; a batch may span two passes, so that no image is dropped and few (labelled) images
    repeat equally often. Batch t is a function of (seed, name, t): there is no state to save.
    Of the ``batch`` indices each process takes its own part, equal to within one.
    """

    def __init__(self, n: int, batch: int, seed: int, name: str, rank: int = 0, world: int = 1) -> None:
        self.n, self.batch_size, self._seed, self._name = n, batch, seed, name
        self._part = slice(rank * batch // world, (rank + 1) * batch // world)
        self._kept = -1, torch.empty(0, dtype=torch.int64)  # a pass, and its permutation

    def _permutation(self, number: int) -> Tensor:
        kept, order = self._kept  # at once: a thread that draws ahead may be here too
        if number != kept:
            generator = torch.Generator().manual_seed(derive(self._seed, "order", self._name, number))
            order = torch.randperm(self.n, generator=generator)
            self._kept = number, order
        return order

    def batch(self, step: int) -> Tensor:
        """Return this process's part of the batch of a step, counted from 0: int64 indices."""
        parts, first = [torch.empty(0, dtype=torch.int64)], step * self.batch_size
        start, stop = first + self._part.start, first + self._part.stop
        while start < stop:
            number, offset = divmod(start, self.n)
            take = min(stop - start, self.n - offset)
            parts.append(self._permutation(number)[offset : offset + take])
            start += take
        return torch.cat(parts)
