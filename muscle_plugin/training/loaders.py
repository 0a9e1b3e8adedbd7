"""A hosted algorithm's batches as the loaders that ``semilearn.Trainer.fit`` takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from muscle_plugin.data.views import LABELLED, UNLABELLED
from muscle_plugin.errors import RunError

if TYPE_CHECKING:
    from muscle_plugin.training.host import Host


class StepLoader:
    """One kind of image of the steps that follow the algorithm's present one, an epoch per iteration.

    Yields, for each step, the entries of ``Batches.batch`` that belong to labelled or to unlabelled images.

    Raises:
        RunError: on iteration, steps have been taken but no weight was updated (the ``Trainer`` of USB's git main).
    """

    sampler = None

    def __init__(self, algorithm: Host, kind: str, shared: dict[int, dict[str, Tensor]]) -> None:
        self._algorithm, self._kind, self._shared = algorithm, kind, shared

    def __len__(self) -> int:
        return max(1, self._algorithm.num_iter_per_epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        algorithm = self._algorithm
        first = algorithm.it
        for step in range(first, first + len(self)):
            if algorithm.it > 0 and not algorithm.updates:
                raise RunError(
                    "semilearn's Trainer has taken a step without updating the weights: that of USB's git main calls no"
                    " hooks (patches/main mends it); use algorithm.train()"
                )
            yield {k: v for k, v in self._batch(step).items() if self._is_mine(k)}

    def _batch(self, step: int) -> dict[str, Tensor]:
        """That of the step, made once for both kinds."""
        if step not in self._shared:
            self._shared.clear()
            self._shared[step] = self._algorithm.batches.batch(step)
        return self._shared[step]

    def _is_mine(self, name: str) -> bool:
        view = self._algorithm.batches.views.get(name)
        labelled = view.images == LABELLED if view is not None else name in ("idx_lb", "y_lb")
        return labelled == (self._kind == LABELLED)


def step_loaders(algorithm: Host) -> tuple[StepLoader, StepLoader]:
    """The labelled and the unlabelled loader of an algorithm whose steps are prepared."""
    shared: dict[int, dict[str, Tensor]] = {}
    return StepLoader(algorithm, LABELLED, shared), StepLoader(algorithm, UNLABELLED, shared)
