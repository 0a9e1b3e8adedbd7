"""Schedules: pure functions of a step that return a multiplier (of a learning rate or a weight) or an EMA's momentum.

A step may be a fraction and may count epochs, as long as all arguments of a call count the same thing.
:func:`schedule` builds a learning-rate schedule from its name and the length of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from muscle_plugin.errors import InputError

__all__ = ["Schedule", "constant", "cosine", "ema_momentum", "schedule", "sigmoid_rampup", "usb_cosine"]

#: From a step to the factor on the learning rate.
Schedule = Callable[[float], float]


def constant(step: float) -> float:
    """1 at every step."""
    return 1.0


def cosine(step: float, end: float) -> float:
    """``(1 + cos(pi step / end)) / 2``: from 1 at step 0 to 0 at ``end``, and 0 from there on.

    A run may stop before ``end``: label propagation (Iscen et al. 2019), and MUSCLE's section 5.2 after it, train 180
    epochs of a schedule that reaches 0 at epoch 210. Loshchilov and Hutter 2017, equation 5, without restarts.
    """
    return (1 + math.cos(math.pi * _share(step, end))) / 2


def usb_cosine(step: float, total: float, warmup: float = 0, num_cycles: float = 7 / 16) -> float:
    """``step / warmup`` before step ``warmup``, then ``max(0, cos(pi num_cycles (step - warmup) / (total - warmup)))``.

    FixMatch's ``cos(7 pi k / 16 K)`` (Sohn et al. 2020, section 2.4), after USB's linear warm-up
    (``get_cosine_schedule_with_warmup``). It ends at cos(7 pi / 16) = 0.195, not at 0.
    """
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, math.cos(math.pi * num_cycles * ((step - warmup) / max(1, total - warmup))))


def sigmoid_rampup(step: float, length: float) -> float:
    """``exp(-5 (1 - step / length)^2)``: from exp(-5) = 0.0067 at step 0 to 1 at ``length``, and 1 from there on.

    The weight of the consistency loss of Temporal Ensembling (Laine and Aila 2017) and Mean Teacher (Tarvainen and
    Valpola 2017). 1 throughout if ``length`` is 0.
    """
    return math.exp(-5 * (1 - _share(step, length)) ** 2)


def ema_momentum(step: float, momentum: float) -> float:
    """``min(1 - 1 / (step + 1), momentum)`` for step 0, 1, ...: the mean of the first steps, then ``momentum``.

    Mean Teacher's average of weights. Label propagation's code counts from 1: its first update has momentum 1/2.
    """
    return min(1 - 1 / (step + 1), momentum)


def _share(step: float, length: float) -> float:
    """``step / length`` clipped to [0, 1]; 1 if the length is 0."""
    return min(max(step / length, 0.0), 1.0) if length > 0 else 1.0


def schedule(
    name: str, total_steps: float, *, warmup: float = 0, num_cycles: float = 7 / 16, reaches_zero_at: float = 1.0
) -> Schedule:
    """Build a learning-rate schedule.

    Args:
        name: ``usb`` (:func:`usb_cosine`), ``cosine`` (:func:`cosine`) or ``constant``.
        total_steps: length of the run.
        warmup, num_cycles: of ``usb``; ``warmup`` in steps.
        reaches_zero_at: of ``cosine``: a multiple of ``total_steps``, 1 or more, such as 210/180.

    Raises:
        InputError: no such schedule, or a value out of range.
    """
    if not 0 < total_steps < math.inf:
        raise InputError(f"schedule: total_steps must be more than 0, got {total_steps}")
    if not (0 <= warmup <= total_steps and 0 <= num_cycles < math.inf and 1 <= reaches_zero_at < math.inf):
        raise InputError(
            f"schedule: warmup must be between 0 and the run's {total_steps} steps, num_cycles 0 or more and reaches_zero_at 1"
            f" or more, got {warmup}, {num_cycles} and {reaches_zero_at}"
        )
    if (name != "usb" and (warmup, num_cycles) != (0, 7 / 16)) or (name != "cosine" and reaches_zero_at != 1):
        raise InputError("schedule: warmup and num_cycles are options of usb, reaches_zero_at is one of cosine")
    if name == "usb":
        return partial(usb_cosine, total=total_steps, warmup=warmup, num_cycles=num_cycles)
    if name == "cosine":
        return partial(cosine, end=total_steps * reaches_zero_at)
    if name == "constant":
        return constant
    raise InputError(f"schedule: unknown {name!r}; known: usb, cosine, constant")
