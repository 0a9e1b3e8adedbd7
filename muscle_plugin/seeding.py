"""Seeds: every random stream of a run is a function of the run's seed and of the stream's purpose.

Nothing that draws data uses PyTorch's global generator: the order of images and their views at step t depend on (seed, t)
alone. A resumed run therefore sees what it would have seen, and two algorithms with one seed see the same.
"""

from __future__ import annotations

import random
import zlib

import numpy as np
import torch


def derive(seed: int, *path: int | str) -> int:
    """Return a 63-bit seed for the stream named by ``path``, independent of streams with other names."""
    words = [zlib.crc32(p.encode()) if isinstance(p, str) else p for p in path]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)[0]) >> 1  # NumPy 1 shifts no uint64


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch, from which USB's code draws."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
