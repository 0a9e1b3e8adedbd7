"""The optimiser's update, by one fused kernel on a GPU, and the learning-rate schedule."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from muscle_plugin.schedules import schedule

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

#: A group's entries that say how, not what, is computed.
HOW = ("fused", "foreach")


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
    """In an optimiser's saved state, replace how the saving run computed by how this one does: it may have had another
    device."""
    for theirs, ours in zip(saved["param_groups"], optimizer.param_groups, strict=False):
        theirs.update({k: ours[k] for k in HOW if k in ours})


def restarting_schedule(optimizer: Optimizer, args: Namespace, restarts: Sequence[int]) -> LRScheduler:
    """The schedule ``args.lr_schedule``, begun anew at each of the steps ``restarts``."""
    starts = sorted({s for s in (0, *restarts) if 0 <= s < args.num_train_iter})
    ends = [*starts[1:], args.num_train_iter]
    options: dict[str, dict[str, float]] = {
        "usb": {"warmup": args.num_warmup_iter},
        "cosine": {"reaches_zero_at": args.lr_zero_at},
    }
    name = args.lr_schedule
    parts = [schedule(name, b - a, **options.get(name, {})) for a, b in zip(starts, ends, strict=True)]

    def multiplier(step: int) -> float:
        part = max(i for i, start in enumerate(starts) if start <= step)
        return parts[part](step - starts[part])

    return torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier)
