"""The host's hooks, in place of USB's of the same names: nothing here waits for the device but at log steps."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from muscle_plugin import distributed
from muscle_plugin.memory import memory_for
from muscle_plugin.schedules import ema_momentum
from muscle_plugin.training.ema import EMA
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


class HostParamUpdateHook(Hook):
    """Backward pass, gradient clipping, optimiser and schedule."""

    def after_train_step(self, algorithm: Any) -> None:
        scaler, optimizer = algorithm.loss_scaler, algorithm.optimizer
        loss, gradient, skipped = algorithm.out_dict["loss"], None, None
        scaler.scale(loss).backward()
        algorithm.average_gradients()
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


class HostEMAHook(Hook):
    """Averages the weights; the average lives in ``algorithm.ema_model``."""

    def before_run(self, algorithm: Any) -> None:
        if algorithm.it == 0:
            algorithm.ema_model.load_state_dict(algorithm.model.state_dict())
        algorithm.ema_model.requires_grad_(False)
        own_buffers = not getattr(algorithm, "ema_copies_buffers", True)
        algorithm.ema = EMA(algorithm.model, algorithm.ema_model, algorithm.ema_m, own_buffers)

    def after_train_step(self, algorithm: Any) -> None:
        if getattr(algorithm, "ema_warms_up", False):
            algorithm.ema.decay = ema_momentum(algorithm.it + 1, algorithm.ema_m)
        algorithm.ema.update()


class HostEvaluationHook(Hook):
    """Evaluates every ``num_eval_iter`` steps and at the end, if there are test images; keeps every top-1 accuracy."""

    def after_train_step(self, algorithm: Any) -> None:
        if not (self.every_n_iters(algorithm, algorithm.num_eval_iter) or self.is_last_iter(algorithm)):
            return
        if not len(algorithm.loader_dict["eval"]):
            return
        less = f"a smaller --eval_batch_size (it is {algorithm.args.eval_batch_size})"
        with algorithm.not_training(), memory_for("an evaluation", less):
            algorithm.monitor.check_now(algorithm, algorithm.it + 1)
            algorithm.last_metrics = algorithm.evaluate("eval")
        algorithm.log_dict.update(algorithm.last_metrics)
        top1 = algorithm.log_dict["eval/top-1-acc"]
        algorithm.evaluations.append(top1)
        if top1 > algorithm.best_eval_acc or len(algorithm.evaluations) == 1:
            algorithm.best_eval_acc, algorithm.best_it = top1, algorithm.it
        share = algorithm.log_dict["eval/top_class_share"]
        algorithm.monitor.see_evaluation(algorithm, algorithm.it + 1, share, self.is_last_iter(algorithm))

    def after_run(self, algorithm: Any) -> None:
        algorithm.results_dict = {
            "eval/best_acc": algorithm.best_eval_acc,
            "eval/best_it": algorithm.best_it,
            **accuracies(algorithm.evaluations),
        }


def accuracies(evaluations: list[float]) -> dict[str, float]:
    """Best, last, and the median of the last 20 evaluations, as fractions; NaN-free only if there was an evaluation."""
    if not evaluations:
        return {}
    return {
        "best_top1": max(evaluations),
        "last_top1": evaluations[-1],
        "median20_top1": statistics.median(evaluations[-20:]),
    }


class HostLoggingHook(Hook):
    """Averages the step's values between log steps, each over the steps that had it, and hands them to the run's log."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[str, Any] = {}
        self.steps = 0
        self.without: dict[str, int] = {}  # steps, of those, that lacked a value

    def after_train_step(self, algorithm: Any) -> None:
        now = {k: v for k, v in algorithm.log_dict.items() if k.startswith("eval/")}
        without = dict(getattr(self, "without", {}))  # a checkpoint of an earlier version has none
        without |= {k: without.get(k, 0) + 1 for k in self.sums if k not in algorithm.log_dict}
        values = {k: v for k, v in algorithm.log_dict.items() if k not in now}
        without |= {k: self.steps for k in values if self.steps and k not in self.sums}
        self.sums |= added(self.sums, values)
        self.steps, self.without = self.steps + 1, without
        if now or self.every_n_iters(algorithm, algorithm.num_log_iter) or self.is_last_iter(algorithm):
            health, step = algorithm.monitor, algorithm.it + 1
            counts = health.counts()
            found = list(read({**self.sums, **counts}).values())  # all in one transfer
            found = distributed.mean(torch.tensor(found, dtype=torch.float64)).tolist()
            counts = dict(zip(counts, found[len(self.sums) :], strict=True))
            means = {k: v / (self.steps - without.get(k, 0)) for k, v in zip(self.sums, found, strict=False)}
            health.check(algorithm, step, counts, {k: v for k, v in means.items() if isinstance(self.sums[k], Tensor)})
            if algorithm.loss_scaler.is_enabled():
                now["train/skipped_steps"] = int(counts["skipped"])
            rate = algorithm.optimizer.param_groups[-1]["lr"]
            algorithm.record({"lr": float(rate), **means, **now})
            health.last_line = {"step": step, **means}
            self.sums, self.steps, self.without = {}, 0, {}

    def on_cpu(self) -> dict[str, Any]:
        """The sums since the last log line."""
        return {k: v.detach().cpu() if isinstance(v, Tensor) else v for k, v in self.sums.items()}


def added(sums: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Numbers and scalar tensors, each added to the sum of its name if there is one; tensors of a type by one operation."""
    out = {k: v.detach() if isinstance(v, Tensor) else v for k, v in values.items()}
    alike: dict[Any, list[str]] = {}
    for name in out.keys() & sums.keys():
        kinds = [(x.dtype, x.device) if isinstance(x, Tensor) else None for x in (out[name], sums[name])]
        alike.setdefault(kinds[0] if kinds[0] == kinds[1] else None, []).append(name)
    out |= {name: sums[name] + out[name] for name in alike.pop(None, ())}
    for names in alike.values():
        out |= dict(zip(names, torch._foreach_add([sums[n] for n in names], [out[n] for n in names]), strict=True))
    return out


def read(values: dict[str, Any]) -> dict[str, float]:
    """Numbers and scalar tensors as numbers, the latter in one transfer."""
    tensors = [k for k, v in values.items() if isinstance(v, Tensor)]
    # some may be on the CPU: what an algorithm has there, a continued run's sums
    device = next((values[k].device for k in tensors if not values[k].is_cpu), torch.device("cpu"))
    parts = [values[k].to(device, torch.float64, non_blocking=True).reshape(()) for k in tensors]
    numbers = torch.stack(parts).tolist() if tensors else []
    on_device = dict(zip(tensors, numbers, strict=True))
    return {k: on_device[k] if k in on_device else float(v) for k, v in values.items()}


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
