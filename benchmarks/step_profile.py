"""What a training step spends its time on, by torch.profiler: operations on the CPU, kernels on the GPU, who waits for whom.

    python benchmarks/step_profile.py [--algorithm muscle_fixmatch] [--net small_cnn] [--steps 10] [--rows 12] [--device cpu]
                                      [--precision fp32] [--batch 64] [--data_dir data] [--threads 1] [--json FILE]

Steady steps of this package's host on CIFAR-10 (``--data_dir made``: random images), 64 labelled and 64 unlabelled images
each, views made in the step; none logs, evaluates or saves. After ``--warm`` steps as many are timed as are profiled then.

- step, CPU: a step's time and the CPU time of the process in it, all threads, without the profiler. Steps follow each other
  as in training: the device is waited for after the last one.
- GPU busy: the time in which at least one kernel or copy runs, with the profiler, and its share of the step without it. A
  small share with as much CPU time as the step takes means that the GPU waits for the program: fewer, larger kernels help.
- Times of operations are their own, without those that they call. The profiler makes the CPU's longer, not the GPU's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import FOREVER, add_step_options, as_train_does, hosted, kernels_of, need_cifar, wait_for, write_figures
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, schedule

WARM_UP = 2  # steps that the profiler watches but does not record
BETWEEN = "Python between operations"  # the own time of what the profiler calls a step
ON_CPU = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
KERNEL, COPIES = "kernel", ("gpu_memcpy", "gpu_memset")


class _Enough(Exception):
    """All steps are done."""


def record(algorithm: Any, device: torch.device, warm: int, steps: int, trace: Path) -> dict[str, float]:
    """Train for some steps, writing a trace of the last ones; returns a step's ``seconds`` and ``cpu_seconds``."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    plan = schedule(wait=0, warmup=WARM_UP, active=steps, repeat=1)
    profiler = profile(activities=activities, schedule=plan, on_trace_ready=lambda p: p.export_chrome_trace(str(trace)))
    inner, done, found = algorithm.call_hook, 0, {}

    def hook(name: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal done
        out = inner(name, *args, **kwargs)
        if name != "after_train_step":
            return out
        done += 1
        if done == warm:
            wait_for(device)
            found["seconds"], found["cpu_seconds"] = -time.perf_counter(), -time.process_time()
        elif done == warm + steps:
            found["cpu_seconds"] += time.process_time()  # waiting for a GPU is a loop, which is not to count
            wait_for(device)
            found["seconds"] += time.perf_counter()
            profiler.start()
        elif done > warm + steps:
            wait = done == warm + steps + WARM_UP + steps
            if wait:
                wait_for(device)
            profiler.step()
            if wait:
                profiler.stop()
                raise _Enough
        return out

    algorithm.call_hook = hook
    algorithm.loader_dict["eval"] = ()
    try:
        algorithm.train()
    except _Enough:
        return {name: value / steps for name, value in found.items()}
    raise AssertionError("it ended before all steps were done")


def own_times(events: Iterable[dict[str, Any]]) -> dict[str, list[float]]:
    """Name -> [calls, seconds without those of what it calls], of events of CPU threads in Chrome's format."""
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    threads: dict[Any, list[tuple[float, float, str]]] = defaultdict(list)
    for e in events:
        name = BETWEEN if e["name"].startswith("ProfilerStep") else e["name"]
        threads[e["pid"], e["tid"]].append((e["ts"], -e["dur"], name))
    for calls in threads.values():
        callers: list[tuple[float, str]] = []  # when each ends, and its name
        for start, minus, name in sorted(calls):
            while callers and callers[-1][0] <= start:
                callers.pop()
            if callers:
                found[callers[-1][1]][1] += minus / 1e6
            found[name][0] += 1
            found[name][1] -= minus / 1e6
            callers.append((start - minus, name))
    return dict(found)


def busy(events: Iterable[dict[str, Any]]) -> float:
    """Seconds in which at least one of the events is under way."""
    total, until = 0.0, float("-inf")
    for start, end in sorted((e["ts"], e["ts"] + e["dur"]) for e in events):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total / 1e6


def summary(events: list[dict[str, Any]], steps: int, rows: int) -> dict[str, Any]:
    """Figures of one step out of a trace of several.

    Returns:
        ``gpu_seconds`` in which the GPU does something, ``kernels`` and ``copies``: their numbers, and the longest
        ``cpu_operations`` and ``gpu_kernels``: (name, number, seconds).
    """
    events = [e for e in events if e.get("ph") == "X" and "dur" in e]
    on_gpu = [e for e in events if e.get("cat") in (KERNEL, *COPIES)]
    tables: dict[str, dict[str, list[float]]] = {"cpu_operations": own_times(e for e in events if e["cat"] in ON_CPU)}
    kernels: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for e in on_gpu:
        kernels[e["name"]][0] += 1
        kernels[e["name"]][1] += e["dur"] / 1e6
    tables["gpu_kernels"] = kernels
    longest = {
        key: [(name, n / steps, s / steps) for name, (n, s) in sorted(of.items(), key=lambda kv: -kv[1][1])[:rows]]
        for key, of in tables.items()
    }
    number = sum(e["cat"] == KERNEL for e in on_gpu)
    return {
        "gpu_seconds": busy(on_gpu) / steps, "kernels": number / steps, "copies": (len(on_gpu) - number) / steps,
        **longest,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--algorithm", default="muscle_fixmatch", help="[%(default)s]")
    add("--net", default="small_cnn", help="[%(default)s]")
    add("--steps", type=int, default=10, help="steps that are timed, and as many that are profiled [%(default)s]")
    add("--warm", type=int, default=20, help="steps before [%(default)s]")
    add("--rows", type=int, default=12, help="operations, and kernels, that are shown [%(default)s]")
    add_step_options(add, timed=False)
    options = parser.parse_args(arguments)
    need_cifar(options)
    as_train_does(options)
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), kernels_of(options):
        warnings.simplefilter("ignore")
        never = dict.fromkeys(("num_log_iter", "num_save_iter"), FOREVER)
        algorithm = hosted(options.algorithm, options.net, options, folder, **never)
        trace = Path(folder) / "trace.json"
        found: dict[str, Any] = record(algorithm, device, options.warm, options.steps, trace)
        found |= summary(json.loads(trace.read_text())["traceEvents"], options.steps, options.rows)
    found["gpu_share"] = found["gpu_seconds"] / found["seconds"] if device.type == "cuda" else None
    b = options.batch
    what = (
        f"{options.algorithm}, {options.net}, {options.images}, {b} + {b} a step, {options.device}, {options.precision}"
    )
    table = Table()
    table.add_column("longest", no_wrap=True, max_width=90)
    for column in ("in a step", "ms"):
        table.add_column(column, justify="right")
    for title, key in (("operations on the CPU, own time", "cpu_operations"), ("kernels on the GPU", "gpu_kernels")):
        table.add_section()
        table.add_row(title, "", "")
        for name, number, seconds in found[key]:
            table.add_row(f"  {name}", f"{number:.1f}", f"{1000 * seconds:.3f}")
    print(f"a step of {what}, mean of {options.steps}, with the profiler")
    Console(width=120, highlight=False, markup=False).print(table)
    print(f"step {1000 * found['seconds']:.2f} ms, CPU {1000 * found['cpu_seconds']:.2f} ms")
    if found["gpu_share"] is not None:
        print(
            f"GPU busy {1000 * found['gpu_seconds']:.2f} ms, {100 * found['gpu_share']:.0f} % of the step;"
            f" {found['kernels']:.0f} kernel launches, {found['copies']:.0f} copies and fills"
        )
    write_figures(options, profile=found)


if __name__ == "__main__":
    main()
