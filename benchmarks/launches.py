"""Operations that a training step dispatches, by part: on a GPU each costs the CPU 5 to 10 microseconds.

    python benchmarks/launches.py [--algorithms muscle_fixmatch fixmatch muscle] [--net cnn13] [--batch 64] [--precision fp32]

No GPU and no data set are needed. The views are made of tensors on PyTorch's "meta" device, which has no memory: what is
drawn and planned on the CPU, copied to the device and dispatched there are told apart by where the tensors are, once with
PyTorch's operations and once with the Triton kernel, which is counted and not run. The rest of the step is run on the CPU, with
the fused optimiser that a GPU would have. Operations that only make another view of the same memory are left out.

- outside the net: all but what the net's own forward and backward pass dispatch.
- drawing: CPU time of what a step draws (and, without the kernel, of planning its groups). On a GPU it is done in a
  thread, one step ahead; here it is timed alone.
- the rest: CPU time of a step without views whose net is one linear layer, and of two images of each kind, less what that net
  takes by itself: operations on so few numbers take about as long as their dispatch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from clock import StepClock, stand_in
from common import (
    BACKWARD,
    EMA,
    FOREVER,
    FORWARD,
    LOGGING,
    OPTIMISER,
    REST,
    VIEWS,
    Timeline,
    add_common_options,
    as_train_does,
    at_least_one,
    write_figures,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from muscle_plugin.data import kernel
from muscle_plugin.data.batches import Batches
from muscle_plugin.data.randaugment import Plan, grouped
from muscle_plugin.errors import ConfigError
from muscle_plugin.extend import net
from muscle_plugin.runs.build import build
from muscle_plugin.settings.resolve import load_settings
from muscle_plugin.text import first_line
from muscle_plugin.training.hooks import compute_update_on
from muscle_plugin.usb.calls import usb_calls_on

NET, COPIES, DRAWN = "net", "copies", "drawn on the CPU"
META, CUDA = torch.device("meta"), torch.device("cuda")
GOAL_OPERATIONS, GOAL_MS = 150, 2.0
STEP = 1  # one that neither begins nor logs


def is_view(operation: Any) -> bool:
    """Whether it only gives another view of the same memory."""
    infos = [r.alias_info for r in operation._schema.returns]
    return any(i is not None and not i.is_write for i in infos)


class Operations(TorchDispatchMode):
    """Calls ``seen(operation, tensors)`` for each dispatched operation that is no view."""

    def __init__(self, seen: Callable[[Any, list[Tensor]], None]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not is_view(func):
            self._seen(func, [t for t in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)])
        return out


# -------------------------------------------------------------------------------------------------------------- views


def views_on_meta(algorithm: Any, with_kernel: bool) -> Batches:
    """The algorithm's maker of batches, for the meta device."""
    args = algorithm.args
    made = Batches(
        algorithm.source, algorithm.split, *algorithm.batch_sizes, algorithm.step_parameters(), algorithm.usb_name,
        args.weak_augment, args.hard_augment, algorithm.batches.channels, args.seed, META, strong_ops=args.hard_ops,
    )  # fmt: skip
    made.add_views({n: v for n, v in algorithm.batches.views.items() if n not in made.views})
    made.channels_last = algorithm.batches.channels_last
    made._kernel = kernel if with_kernel else None
    return made


@contextmanager
def launches_counted(counts: Counter[str]) -> Iterator[None]:
    """Within it the kernel is counted, and not run."""

    class Counted:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *_, **__: counts.update([VIEWS])

    original, kernel._views = kernel._views, Counted()
    try:
        yield
    finally:
        kernel._views = original


def count_views(batches: Batches) -> Counter[str]:
    """Operations of a batch, by where they are."""
    counts: Counter[str] = Counter()

    def seen(func: Any, tensors: list[Tensor]) -> None:
        kinds = {t.device.type for t in tensors}
        counts[COPIES if kinds == {"cpu", "meta"} else VIEWS if "meta" in kinds else DRAWN] += 1

    with launches_counted(counts), Operations(seen):
        batches.batch(STEP)
    return counts


def drawing_ms(batches: Batches, seconds: float) -> list[float]:
    """CPU time of what a step draws and plans, milliseconds, step by step."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found) < 5:
        start = time.thread_time()
        plans, _ = batches._draw(len(found))
        if batches._kernel is None:
            for plan in plans.values():
                if isinstance(plan, Plan) and len(plan.operations):
                    grouped(plan, *batches._shape[1:])
        found.append(1000 * (time.thread_time() - start))
    return found[1:]


# --------------------------------------------------------------------------------------------------- the rest of a step


class Parts(Timeline):
    """Counts what each part of a step dispatches, instead of timing it."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.counts: Counter[str] = Counter()
        self.start()

    def enter(self, part: str) -> str:
        before, self._part = self._part, part
        return before

    def end_step(self) -> None:
        self.steps.append(dict(self.counts))
        self.counts.clear()

    def count(self, func: Any, _: list[Tensor]) -> None:
        self.counts[self._part] += 1

    def watch_net(self, net: nn.Module) -> None:
        """Let the net's forward pass, and the backward pass of what it computed, be a part of its own."""
        outer: list[str] = []
        known: set[Any] = set()

        def before(*_: Any) -> None:
            outer.append(self.enter(NET))

        def after(_: nn.Module, __: Any, output: Any) -> None:
            nodes = [t.grad_fn for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn]
            while nodes:
                node = nodes.pop()
                if node not in known:
                    known.add(node)
                    node.register_prehook(lambda _: self.enter(NET) and None)
                    node.register_hook(lambda *_: self.enter(BACKWARD) and None)
                    nodes += [n for n, _ in node.next_functions if n is not None]
            self.enter(outer.pop())

        net.register_forward_pre_hook(before)
        net.register_forward_hook(after)


def prepared(algorithm: str, options: argparse.Namespace, folder: str, **settings: Any) -> Any:
    """A hosted algorithm on made-up CIFAR-10, which computes its updates as on a GPU."""
    resolved = load_settings(
        None, algorithm=algorithm, dataset="cifar10", num_labels=250, uratio=1, num_train_iter=FOREVER,
        num_eval_iter=FOREVER, num_log_iter=50, hard_augment="randaugment", precision=options.precision,
        save_dir=folder, device="cpu", **settings,
    )  # fmt: skip
    made = build(resolved, source=stand_in(resolved.settings, per_group=500))
    compute_update_on(made.optimizer, CUDA)
    return made


def count_step(algorithm: Any) -> dict[str, int]:
    """Operations of a step by part, but for its views."""
    parts = Parts()
    parts.watch(algorithm)
    for module in (algorithm.model, algorithm.ema_model):
        parts.watch_net(module)
    clock = StepClock(algorithm, torch.device("cpu"))
    with Operations(parts.count):
        clock.run(0.0, skip=STEP)
    return parts.steps[-1]


@net("one_layer")
def one_layer(num_classes: int, channels: int) -> nn.Module:
    """The mean pixel, and a linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def rest_ms(algorithm: str, options: argparse.Namespace, folder: str) -> list[float]:
    """CPU time of a step whose net and batch are as small as can be, and whose views are there, without what that net takes by
    itself, milliseconds."""
    made = prepared(algorithm, options, folder, net="one_layer", batch_size=2)
    batch = made.batches.batch
    kept: dict[frozenset[str], Any] = {}

    def same_views(step: int) -> Any:
        names = frozenset(made.batches.views)
        if names not in kept:
            kept[names] = batch(step)
        return kept[names]

    made.batches.batch = same_views
    clock = StepClock(made, torch.device("cpu"), now=time.thread_time)
    images, seconds = torch.cat([v for v in same_views(0).values() if v.dim() == 4]), options.seconds / options.rounds
    return [
        1000 * (clock.run(seconds, skip=STEP + 1) - seconds_of_net(made, images, seconds))
        for _ in range(options.rounds)
    ]


def seconds_of_net(algorithm: Any, images: Tensor, seconds: float) -> float:
    """CPU time of the net's forward and backward pass."""
    end, steps, start = time.perf_counter() + seconds, 0, time.thread_time()
    while steps == 0 or time.perf_counter() < end:
        with algorithm.amp_cm():
            logits = algorithm.model(images)["logits"]
        logits.backward(logits.detach())
        algorithm.model.zero_grad(set_to_none=True)
        steps += 1
    return (time.thread_time() - start) / steps


# -------------------------------------------------------------------------------------------------------------- figures


def measure(algorithm: str, options: argparse.Namespace) -> dict[str, Any]:
    """Operations by part and milliseconds, without the kernel and with it."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), usb_calls_on("cpu"):
        warnings.simplefilter("ignore")
        step = count_step(
            prepared(algorithm, options, folder, net=options.net, batch_size=4)
        )  # of any number of images
        made = prepared(algorithm, options, folder, net="one_layer", batch_size=options.batch)
        made.prepare_steps()
        found: dict[str, Any] = {"algorithm": algorithm, "rest_ms": rest_ms(algorithm, options, folder)}
        for name, with_kernel in (("PyTorch", False), ("kernel", True)):
            batches = views_on_meta(made, with_kernel)
            views = count_views(batches)
            counts = {**step, **views, VIEWS: views[VIEWS]}
            outside = sum(n for part, n in counts.items() if part not in (NET, DRAWN))
            found[name] = {"operations": counts, "outside": outside, "drawing_ms": drawing_ms(batches, options.seconds)}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--algorithms", nargs="+", default=["muscle_fixmatch", "fixmatch", "muscle"])
    add("--net", default="cnn13", help="[%(default)s]")
    add(
        "--batch",
        type=at_least_one,
        default=64,
        help="labelled images of a step, and as many unlabelled ones [%(default)s]",
    )
    add("--precision", default="fp32", choices=["fp32", "bf16"], help="[%(default)s]")
    add("--seconds", type=float, default=2.0, help="of each timing [%(default)s]")
    add("--rounds", type=at_least_one, default=3, help="of it [%(default)s]")
    add_common_options(add)
    options = parser.parse_args(arguments)
    as_train_does(options)
    columns = (VIEWS, COPIES, FORWARD, BACKWARD, OPTIMISER, EMA, LOGGING, REST)
    table = Table(
        title=f"operations of a step, {options.net}, {options.batch} + {options.batch} images, {options.precision}",
        title_justify="left",
    )
    for column in ("algorithm", "views by", *columns, "outside the net", "the net", "drawing, ms", "rest, ms"):
        table.add_column(
            column, justify="left" if column in ("algorithm", "views by") else "right", no_wrap=column == "algorithm"
        )
    every = [measure(algorithm, options) for algorithm in options.algorithms]
    for found in every:
        rest = statistics.median(found["rest_ms"])
        for way in ("PyTorch", "kernel"):
            counts = found[way]["operations"]
            table.add_row(
                found["algorithm"], way, *(str(counts.get(part, 0)) for part in columns), str(found[way]["outside"]),
                str(counts[NET]), f"{statistics.median(found[way]['drawing_ms']):.2f}", f"{rest:.2f}",
            )  # fmt: skip
    Console(width=170, highlight=False).print(table)
    for found in every:
        ratio = found["PyTorch"]["outside"] / found["kernel"]["outside"]
        now = found["kernel"]
        ms = statistics.median(now["drawing_ms"]) + statistics.median(found["rest_ms"])
        print(
            f"{found['algorithm']}: {found['PyTorch']['outside']} operations outside the net, with the kernel"
            f" {now['outside']} (1/{ratio:.1f}; goal {GOAL_OPERATIONS}), {ms:.2f} ms of CPU time (goal {GOAL_MS:g})"
        )
    write_figures(options, launches=every)


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, ValueError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        sys.exit(2)
