"""Seconds of training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """Counts seconds of training, over all continuations of a run.

    Attributes:
        counted: seconds up to the last pause.
    """

    def __init__(self) -> None:
        self.counted = 0.0
        self._began: float | None = None

    def start(self) -> None:
        self._began = time.perf_counter()

    def seconds(self) -> float:
        """Seconds so far."""
        return self.counted + (time.perf_counter() - self._began if self._began is not None else 0.0)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, time does not count: an evaluation, a checkpoint."""
        self.counted, self._began = self.seconds(), None
        yield
        self.start()
