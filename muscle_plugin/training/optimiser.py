"""How the optimiser's update is computed: by one fused kernel on a GPU, and whatever a checkpoint says of it."""

from __future__ import annotations

from typing import Any

import torch

#: What a group's entry says of how, not of what, is computed.
HOW = ("fused", "foreach")


def compute_update_on(optimizer: Any, device: torch.device) -> None:
    """Let SGD and AdamW update by fused kernels on a GPU.

    The loss scaler of fp16 then skips a step with overflowing gradients without asking the device for the flag. On a CPU
    the optimiser is a hundredth of a step, and rounding stays what it was.
    """
    if device.type != "cuda":
        return
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, False
    optimizer._step_supports_amp_scaling = True  # what these set when they are made with fused=True


def keep_how(saved: dict[str, Any], optimizer: Any) -> None:
    """In an optimiser's state of a checkpoint, put how this run computes in place of how the run that saved it did: on
    another device, or before there were fused kernels."""
    for theirs, ours in zip(saved["param_groups"], optimizer.param_groups, strict=False):
        theirs.update({k: ours[k] for k in HOW if k in ours})
