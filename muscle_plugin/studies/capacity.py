"""How many runs of a sweep are executed at a time, and the share of a GPU that each gets."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from muscle_plugin.errors import InputError
from muscle_plugin.studies.jobs import Job
from muscle_plugin.studies.pool import runs_per_gpu


@dataclass(frozen=True)
class Capacity:
    """What a sweep takes of this machine.

    Attributes:
        gpus: names by which CUDA knows the GPUs that runs may use.
        at_once: runs at a time.
        share: of a GPU, for each run; None: not asked for.
        devices: the setting ``device`` of the runs.
    """

    gpus: tuple[str, ...]
    at_once: int
    share: float | None
    devices: frozenset[str]

    @property
    def shared(self) -> bool:
        """Whether runs share a GPU."""
        return self.at_once > len(self.gpus) > 0

    def refuse_absent_gpus(self) -> None:
        """Raise :class:`InputError` if runs ask for GPUs and there are none for them."""
        if not self.gpus and (self.share or "cuda" in self.devices):
            asked = "--gpus_per_run" if self.share else "device cuda"
            why = "--device cpu" if self.devices == {"cpu"} else "this machine has no usable GPU"
            raise InputError(f"{asked}: asks for GPUs, but there are none for these runs ({why}); leave it out")


def capacity(jobs: Sequence[Job], asked: int | None, share: float | None) -> tuple[Capacity, str]:
    """What runs can have, and a note if that is less than what was asked for.

    Args:
        jobs: the runs.
        asked: runs at a time (``--jobs``); None: one per GPU, without GPUs one per CPU core.
        share: of a GPU, for each run (``--gpus_per_run``).
    """
    devices = frozenset(job.resolved.settings.device for job in jobs)
    gpus = () if devices == {"cpu"} else visible_gpus()
    room = len(gpus) * runs_per_gpu(share or 1)
    at_once, note = asked or room or cpu_cores(), ""
    if at_once > room > 0:
        if share is None:
            share = math.floor(10_000 / -(-at_once // len(gpus))) / 10_000  # Ray counts in ten thousandths
        else:
            runs = "1 run" if room == 1 else f"{room} runs"
            note = f"--jobs {at_once}: {runs} at a time, for which --gpus_per_run {share:g} leaves room"
            at_once = room
    return Capacity(gpus, at_once, share, devices), note


def cpu_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> tuple[str, ...]:
    """Names by which CUDA knows the GPUs that this process may use."""
    import torch

    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(count)]
    # a process sees, and counts, only one of the parts of a GPU (MIG); each run gets one of them
    return tuple(names if count and names[0].startswith("MIG-") else names[:count])
