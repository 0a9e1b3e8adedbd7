"""The host's hooks, in place of USB's of the same names, and what they drive: the optimiser, its schedule, the average.

Nothing here waits for the device except at log steps.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from muscle_plugin import distributed
from muscle_plugin.device import memory_for
from muscle_plugin.schedules import ema_momentum, schedule
from muscle_plugin.settings.schema import RunSettings
from muscle_plugin.training.state import outside_state
from muscle_plugin.usb.names import (
    CheckpointHook,
    DistSamplerSeedHook,
    EMAHook,
    EvaluationHook,
    Hook,
    LoggingHook,
    ParamUpdateHook,
    TimerHook,
)

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from muscle_plugin.training.host import Host


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
    name, warmup, zero_at = settings.lr_schedule, settings.num_warmup_iter, settings.lr_zero_at
    parts = [schedule(name, b - a, warmup=warmup, reaches_zero_at=zero_at) for a, b in pairwise([*starts, steps])]

    def multiplier(step: int) -> float:
        part = bisect(starts, step) - 1
        return parts[part](step - starts[part])

    return torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier)


class HostParamUpdateHook(Hook):
    """Backward pass, gradient clipping, optimiser and schedule."""

    def after_train_step(self, algorithm: Host) -> None:
        scaler, optimizer = algorithm.loss_scaler, algorithm.optimizer
        loss, gradient, skipped = algorithm.out_dict["loss"], None, None
        scaler.scale(loss).backward()
        if distributed.world_size() > 1:  # with these means every process takes the same step
            distributed.average_(p.grad for p in algorithm.model.parameters() if p.grad is not None)
            if not algorithm.settings.sync_bn:  # running statistics are of a process's own images
                teachers = algorithm.ema_model.buffers() if has_own_statistics(algorithm) else ()
                distributed.average_([*algorithm.model.buffers(), *teachers])
        if algorithm.clip_grad > 0:
            scaler.unscale_(optimizer)
            gradient = torch.nn.utils.clip_grad_norm_(algorithm.model.parameters(), algorithm.clip_grad)
        scaler.step(optimizer)
        if scaler.is_enabled():  # its flags are public nowhere; after update() they are gone
            skipped = torch.stack([*scaler._found_inf_per_device(optimizer).values()]).sum()
            gradient = torch.where(skipped > 0, float("inf"), 0.0)
        scaler.update()
        log = getattr(algorithm, "log_dict", {})  # none yet in Dash's warm-up
        algorithm.monitor.observe(algorithm.it + 1, loss, gradient, skipped, log)
        if algorithm.scheduler is not None:
            algorithm.scheduler.step()
        algorithm.model.zero_grad(set_to_none=True)
        algorithm.updates += 1


def has_own_statistics(algorithm: Host) -> bool:
    """Whether the averaged net takes batch statistics of images itself, in place of copying the net's."""
    return not getattr(algorithm, "ema_copies_buffers", True)


class EMA:
    """Keeps ``ema_model`` at the exponential moving average of ``model``: USB's EMA without its two state-dict loads per step.

    Parameters are averaged, ``average <- decay * average + (1 - decay) * parameter``, except the ones that the nets
    share; buffers (running statistics of batch norm) are copied from the model, as USB does, or with ``own_buffers`` left to
    the averaged net's own forward passes.

    Attributes:
        backup: the model's own weights while it computes with the averages, else empty.
    """

    def __init__(self, model: nn.Module, ema_model: nn.Module, decay: float, own_buffers: bool = False) -> None:
        self.decay = decay
        pairs = [(p, a) for p, a in zip(model.parameters(), ema_model.parameters(), strict=True) if p is not a]
        self._parameters, self._averages = [p for p, _ in pairs], [a for _, a in pairs]
        buffers = {} if own_buffers else dict(model.named_buffers())
        copies = dict(ema_model.named_buffers())
        self._buffers, self._copies = list(buffers.values()), [copies[n] for n in buffers]
        self.backup: list[Tensor] = []

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present weights into the average. To be called once per step."""
        torch._foreach_lerp_(self._averages, self._parameters, 1 - self.decay)
        if self._buffers:
            torch._foreach_copy_(self._copies, self._buffers)

    def apply_shadow(self) -> None:
        """Let the model compute with the averages until :meth:`restore`."""
        self.backup = [p.data for p in self._parameters]
        for p, a in zip(self._parameters, self._averages, strict=True):
            p.data = a.data

    def restore(self) -> None:
        """Give the model its own weights back."""
        for p, own in zip(self._parameters, self.backup, strict=True):
            p.data = own
        self.backup = []


class HostEMAHook(Hook):
    """Averages the weights; the average lives in ``algorithm.ema_model``."""

    def before_run(self, algorithm: Host) -> None:
        if algorithm.it == 0:
            algorithm.ema_model.load_state_dict(algorithm.model.state_dict())
        algorithm.ema_model.requires_grad_(False)
        algorithm.ema = EMA(algorithm.model, algorithm.ema_model, algorithm.ema_m, has_own_statistics(algorithm))

    def after_train_step(self, algorithm: Host) -> None:
        assert algorithm.ema is not None
        if getattr(algorithm, "ema_warms_up", False):
            algorithm.ema.decay = ema_momentum(algorithm.it + 1, algorithm.ema_m)
        algorithm.ema.update()


class HostEvaluationHook(Hook):
    """Evaluates every ``num_eval_iter`` steps and at the end, if there are test images; keeps every top-1 accuracy."""

    def after_train_step(self, algorithm: Host) -> None:
        last = self.is_last_iter(algorithm)
        due = last or self.every_n_iters(algorithm, algorithm.num_eval_iter)
        if not due or not len(algorithm.loader_dict["eval"]):
            return
        less = f"a smaller --eval_batch_size (it is {algorithm.settings.eval_batch_size})"
        with algorithm.clock.paused(), memory_for("an evaluation", less):
            algorithm.monitor.check_now(algorithm.it + 1, algorithm.nets)
            algorithm.last_metrics = algorithm.evaluate("eval")
        algorithm.log_dict.update(algorithm.last_metrics)
        top1, share = (algorithm.last_metrics[f"eval/{k}"] for k in ("top-1-acc", "top_class_share"))
        algorithm.evaluations.append(top1)
        if top1 > algorithm.best_eval_acc or len(algorithm.evaluations) == 1:
            algorithm.best_eval_acc, algorithm.best_it = top1, algorithm.it
        counts = algorithm.source.test_labels.bincount()
        algorithm.monitor.see_evaluation(
            algorithm.it + 1, share, float(counts.max()) / int(counts.sum()), last, algorithm.settings.ema_m
        )

    def after_run(self, algorithm: Host) -> None:
        algorithm.results_dict = {
            "eval/best_acc": algorithm.best_eval_acc,
            "eval/best_it": algorithm.best_it,
            **accuracies(algorithm.evaluations),
        }


class Stopwatch:
    """Counts seconds of training, over all continuations of a run, in place of USB's timer, which waits for the device.

    Attributes:
        counted: seconds up to the last pause.
    """

    def __init__(self) -> None:
        self.counted = 0.0
        self._began: float | None = None

    def start(self) -> None:
        self._began = time.perf_counter()

    def seconds(self) -> float:
        return self.counted + (time.perf_counter() - self._began if self._began is not None else 0.0)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, time does not count: an evaluation, a checkpoint."""
        self.counted, self._began = self.seconds(), None
        yield
        self.start()


def accuracies(evaluations: list[float]) -> dict[str, float]:
    """Best, last, and the median of the last 20 evaluations, as fractions; empty without one."""
    if not evaluations:
        return {}
    return {
        "best_top1": max(evaluations),
        "last_top1": evaluations[-1],
        "median20_top1": statistics.median(evaluations[-20:]),
    }


@outside_state
class HostLoggingHook(Hook):
    """Averages the step's values between log steps, each over the steps that had it, and hands them to the run's log.

    Attributes:
        sums: of each value since the last log step; a process has those of its own images.
        counts: the steps that had it.
    """

    sums: dict[str, float | Tensor]
    counts: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.sums, self.counts = {}, Counter()

    def after_train_step(self, algorithm: Host) -> None:
        now = {k: v for k, v in algorithm.log_dict.items() if k.startswith("eval/")}
        values = {k: v for k, v in algorithm.log_dict.items() if k not in now}
        self.sums |= added(self.sums, values)
        self.counts.update(values.keys())
        if now or self.every_n_iters(algorithm, algorithm.num_log_iter) or self.is_last_iter(algorithm):
            monitor, step = algorithm.monitor, algorithm.it + 1
            found = list(read({**self.sums, **monitor.counts()}).values())  # all in one transfer
            found = distributed.mean(torch.tensor(found, dtype=torch.float64)).tolist()
            counts = dict(zip(monitor.counts(), found[len(self.sums) :], strict=True))
            means = {k: v / self.counts[k] for k, v in zip(self.sums, found, strict=False)}
            monitor.check(step, counts, {k: v for k, v in means.items() if isinstance(self.sums[k], Tensor)})
            if algorithm.loss_scaler.is_enabled():
                now["train/skipped_steps"] = int(counts["skipped"])
            rate = algorithm.optimizer.param_groups[-1]["lr"]
            algorithm.record({"lr": float(rate), **means, **now})
            if "train/entropy" in means:
                monitor.see_entropy(step, means["train/entropy"])
            if "train/util_ratio" in means:
                cutoff = getattr(algorithm.settings, "p_cutoff", None)
                monitor.see_utilisation(step, algorithm.num_train_iter, means["train/util_ratio"], cutoff)
            monitor.state.last_line = {"step": step, **means}
            self.sums, self.counts = {}, Counter()


def added(sums: Mapping[str, float | Tensor], values: Mapping[str, float | Tensor]) -> dict[str, float | Tensor]:
    """Each value added to the sum of its name if there is one; tensors by one operation, if they are of one type."""
    out = {k: v.detach() if isinstance(v, Tensor) else v for k, v in values.items()}
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    for name in out.keys() & sums.keys():
        old, new = sums[name], out[name]
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            tensors[name] = old, new
        else:
            out[name] = old + new
    if tensors:
        out |= dict(zip(tensors, torch._foreach_add(*zip(*tensors.values(), strict=True)), strict=True))
    return out


def read(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Values as numbers; tensors in one transfer."""
    tensors = {k: v for k, v in values.items() if isinstance(v, Tensor)}
    # some may be on the CPU: what an algorithm has there, a continued run's sums
    device = next((t.device for t in tensors.values() if not t.is_cpu), torch.device("cpu"))
    parts = [t.to(device, torch.float64, non_blocking=True).reshape(()) for t in tensors.values()]
    numbers = dict(zip(tensors, torch.stack(parts).tolist() if parts else [], strict=True))
    return {k: numbers[k] if k in numbers else float(v) for k, v in values.items()}


#: Hooks of USB whose work the host's loop does itself.
NOT_NEEDED = (CheckpointHook, DistSamplerSeedHook, TimerHook)
#: USB's hook -> the host's.
REPLACEMENTS: dict[type, type] = {
    ParamUpdateHook: HostParamUpdateHook,
    EMAHook: HostEMAHook,
    EvaluationHook: HostEvaluationHook,
    LoggingHook: HostLoggingHook,
}
