"""The optimiser's update, by one fused kernel on a GPU, and the learning-rate schedule."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from muscle_plugin.schedules import schedule
from muscle_plugin.settings.schema import RunSettings

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


def compute_update_on(optimizer: Optimizer, device: torch.device) -> None:
    """Let SGD and AdamW update by fused kernels on a GPU.

    The loss scaler of fp16 then skips a step with overflowing gradients without asking the device for the flag. On a CPU
    the optimiser is a hundredth of a step, and rounding stays what it was.
    """
    if device.type != "cuda":
        return
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, False
    optimizer._step_supports_amp_scaling = True  # what these set when they are made with fused=True


def keep_how(saved: dict[str, Any], optimizer: Optimizer) -> None:
    """In an optimiser's saved state, replace how the saving run, maybe on another device, computed by how this one does."""
    for theirs, ours in zip(saved["param_groups"], optimizer.param_groups, strict=False):
        theirs.update({k: ours[k] for k in ("fused", "foreach") if k in ours})


def restarting_schedule(
    optimizer: Optimizer, settings: RunSettings, steps: int, restarts: Sequence[int]
) -> LRScheduler:
    """The schedule ``lr_schedule`` of a run of so many steps, begun anew at each of ``restarts``."""
    starts = sorted({s for s in (0, *restarts) if 0 <= s < steps})
    options: dict[str, dict[str, float]] = {
        "usb": {"warmup": settings.num_warmup_iter},
        "cosine": {"reaches_zero_at": settings.lr_zero_at},
    }
    name = settings.lr_schedule
    parts = [schedule(name, b - a, **options.get(name, {})) for a, b in pairwise([*starts, steps])]

    def multiplier(step: int) -> float:
        part = bisect(starts, step) - 1
        return parts[part](step - starts[part])

    return torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier)
