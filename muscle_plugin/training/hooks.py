"""The host's hooks, in place of USB's of the same names: nothing here waits for the device except at log steps."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from muscle_plugin import distributed
from muscle_plugin.device import memory_for
from muscle_plugin.schedules import ema_momentum
from muscle_plugin.training.ema import EMA
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
    from muscle_plugin.training.host import Host

#: Values of a step by name: numbers, and scalar tensors on the device.
Values = dict[str, float | Tensor]


class HostParamUpdateHook(Hook):
    """Backward pass, gradient clipping, optimiser and schedule."""

    def after_train_step(self, algorithm: Host) -> None:
        scaler, optimizer = algorithm.loss_scaler, algorithm.optimizer
        loss, gradient, skipped = algorithm.out_dict["loss"], None, None
        scaler.scale(loss).backward()
        if algorithm.args.world_size > 1:
            average_gradients(algorithm)
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
        algorithm.stop_if_warming_up()


def average_gradients(algorithm: Host) -> None:
    """Replace the gradients, and running statistics that processes have of their own images, by their means over processes:
    with them every process takes the same step."""
    distributed.average_(p.grad for p in algorithm.model.parameters() if p.grad is not None)
    if not algorithm.args.sync_bn:
        teachers = algorithm.ema_model.buffers() if has_own_statistics(algorithm) else ()
        distributed.average_([*algorithm.model.buffers(), *teachers])


def has_own_statistics(algorithm: Host) -> bool:
    """Whether the averaged net takes batch statistics of images itself, in place of copying the net's."""
    return not getattr(algorithm, "ema_copies_buffers", True)


class HostEMAHook(Hook):
    """Averages the weights; the average lives in ``algorithm.ema_model``."""

    def before_run(self, algorithm: Host) -> None:
        if algorithm.it == 0:
            algorithm.ema_model.load_state_dict(algorithm.model.state_dict())
        algorithm.ema_model.requires_grad_(False)
        algorithm.ema = EMA(
            algorithm.model, algorithm.ema_model, algorithm.ema_m, own_buffers=has_own_statistics(algorithm)
        )

    def after_train_step(self, algorithm: Host) -> None:
        assert algorithm.ema is not None
        if getattr(algorithm, "ema_warms_up", False):
            algorithm.ema.decay = ema_momentum(algorithm.it + 1, algorithm.ema_m)
        algorithm.ema.update()


class HostEvaluationHook(Hook):
    """Evaluates every ``num_eval_iter`` steps and at the end, if there are test images; keeps every top-1 accuracy."""

    def after_train_step(self, algorithm: Host) -> None:
        last = self.is_last_iter(algorithm)
        if not (self.every_n_iters(algorithm, algorithm.num_eval_iter) or last):
            return
        if not len(algorithm.loader_dict["eval"]):
            return
        less = f"a smaller --eval_batch_size (it is {algorithm.args.eval_batch_size})"
        with algorithm.clock.paused(), memory_for("an evaluation", less):
            algorithm.monitor.check_now(algorithm.it + 1, algorithm.nets)
            algorithm.last_metrics = algorithm.evaluate("eval")
        algorithm.log_dict.update(algorithm.last_metrics)
        top1 = algorithm.log_dict["eval/top-1-acc"]
        algorithm.evaluations.append(top1)
        if top1 > algorithm.best_eval_acc or len(algorithm.evaluations) == 1:
            algorithm.best_eval_acc, algorithm.best_it = top1, algorithm.it
        counts = algorithm.source.test_labels.bincount()
        share, largest = algorithm.log_dict["eval/top_class_share"], float(counts.max()) / int(counts.sum())
        algorithm.monitor.see_evaluation(algorithm.it + 1, share, largest, last)

    def after_run(self, algorithm: Host) -> None:
        algorithm.results_dict = {
            "eval/best_acc": algorithm.best_eval_acc,
            "eval/best_it": algorithm.best_it,
            **accuracies(algorithm.evaluations),
        }


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
        steps: since the last log step.
        without: how many of them lacked a value.
    """

    sums: Values
    steps: int
    without: dict[str, int]

    def __init__(self) -> None:
        super().__init__()
        self.sums, self.steps, self.without = {}, 0, {}

    def after_train_step(self, algorithm: Host) -> None:
        now = {k: v for k, v in algorithm.log_dict.items() if k.startswith("eval/")}
        values = {k: v for k, v in algorithm.log_dict.items() if k not in now}
        missing = {k: self.without.get(k, 0) + 1 for k in self.sums if k not in algorithm.log_dict}
        late = {k: self.steps for k in values if self.steps and k not in self.sums}
        self.without |= missing | late
        self.sums |= added(self.sums, values)
        self.steps += 1
        if now or self.every_n_iters(algorithm, algorithm.num_log_iter) or self.is_last_iter(algorithm):
            monitor, step = algorithm.monitor, algorithm.it + 1
            found = list(read({**self.sums, **monitor.counts()}).values())  # all in one transfer
            found = distributed.mean(torch.tensor(found, dtype=torch.float64)).tolist()
            counts = dict(zip(monitor.counts(), found[len(self.sums) :], strict=True))
            means = {k: v / (self.steps - self.without.get(k, 0)) for k, v in zip(self.sums, found, strict=False)}
            monitor.check(step, counts, {k: v for k, v in means.items() if isinstance(self.sums[k], Tensor)})
            if algorithm.loss_scaler.is_enabled():
                now["train/skipped_steps"] = int(counts["skipped"])
            rate = algorithm.optimizer.param_groups[-1]["lr"]
            algorithm.record({"lr": float(rate), **means, **now})
            monitor.last_line = {"step": step, **means}
            self.sums, self.steps, self.without = {}, 0, {}


def added(sums: Mapping[str, float | Tensor], values: Mapping[str, float | Tensor]) -> Values:
    """Each value added to the sum of its name if there is one; tensors of a type by one operation."""
    out: Values = {k: v.detach() if isinstance(v, Tensor) else v for k, v in values.items()}
    alike: dict[object, list[str]] = {}
    for name in out.keys() & sums.keys():
        kinds = [(x.dtype, x.device) if isinstance(x, Tensor) else None for x in (out[name], sums[name])]
        alike.setdefault(kinds[0] if kinds[0] == kinds[1] else None, []).append(name)
    out |= {name: sums[name] + out[name] for name in alike.pop(None, ())}
    for names in alike.values():
        out |= dict(zip(names, torch._foreach_add([sums[n] for n in names], [out[n] for n in names]), strict=True))
    return out


def read(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Values as numbers; tensors in one transfer."""
    tensors = {k: v for k, v in values.items() if isinstance(v, Tensor)}
    # some may be on the CPU: what an algorithm has there, a continued run's sums
    device = next((t.device for t in tensors.values() if not t.is_cpu), torch.device("cpu"))
    parts = [t.to(device, torch.float64, non_blocking=True).reshape(()) for t in tensors.values()]
    numbers = dict(zip(tensors, torch.stack(parts).tolist() if parts else [], strict=True))
    return {k: numbers[k] if k in numbers else float(v) for k, v in values.items()}


#: USB's hook -> the host's. None: the host's loop does that work itself.
REPLACEMENTS: dict[type, type | None] = {
    ParamUpdateHook: HostParamUpdateHook,
    EMAHook: HostEMAHook,
    EvaluationHook: HostEvaluationHook,
    LoggingHook: HostLoggingHook,
    CheckpointHook: None,
    DistSamplerSeedHook: None,
    TimerHook: None,
}
