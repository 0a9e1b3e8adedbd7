"""``sweep --dry-run``: how long runs would take, from a few training steps of each kind timed on this machine."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from muscle_plugin.errors import UserError
from muscle_plugin.settings.resolve import Resolved, load_settings
from muscle_plugin.settings.schema import MACHINE, MOST_WHOLE, STEP, RunSettings, affecting
from muscle_plugin.studies.jobs import Job
from muscle_plugin.text import duration, one_line, plural

if TYPE_CHECKING:
    from muscle_plugin.training.host import Host

WARM_UP_STEPS, TIMED_STEPS = 2, 9
#: Seconds after which no further step is timed, once there are two.
MOST_SECONDS = 6.0


@dataclass(frozen=True)
class Timing:
    """Measured steps of one kind of run."""

    images: int  #: for training, those with labels among them
    labelled: int
    steps: int  #: of the run that was timed
    stages: tuple[tuple[int, float], ...]  #: first step and seconds per step; only label propagation has two

    def steps_of(self, resolved: Resolved) -> int:
        """The training steps of a run of this kind."""
        s = resolved.settings
        unlabelled = self.images - (0 if s.include_lb_to_ulb else s.num_labels or self.labelled)
        return resolved.steps(unlabelled or self.images)

    def seconds(self, steps: int, done: int) -> float:
        """Seconds from step ``done`` to the end of a run of ``steps``; stages take their share of any run."""
        starts = [round(start * steps / self.steps) for start, _ in self.stages]
        spans = pairwise([*starts, steps])
        return sum(max(0, b - max(a, done)) * s for (a, b), (_, s) in zip(spans, self.stages, strict=True))


def _step_key(resolved: Resolved) -> str:
    """The same for runs whose steps take the same time, on the same images."""
    # what decides how many images there are decides the steps of an epoch
    same = affecting(STEP, MACHINE) | {"dataset", "data_dir", "labels_csv", "split_file"}
    kept = {k: v for k, v in resolved.as_dict().items() if k in same or k not in RunSettings.model_fields}
    return json.dumps(kept, sort_keys=True)


def dry_run(jobs: Sequence[Job], at_once: int, console: Console) -> bool:
    """Print runs, steps and hours of each configuration, and the total; returns whether any step could be timed."""
    table = Table(title=f"{plural(len(jobs), 'run')}, {at_once} at a time", title_justify="left")
    table.add_column("configuration", overflow="fold", min_width=16)
    for head in ("runs", "finished", "steps a run", "s a step", "a run takes", "left"):
        table.add_column(head, justify="right", overflow="fold")
    timings: dict[str, Timing | str] = {}
    left: list[float] = []
    unknown: dict[str, list[str]] = {}
    with console.status("timing training steps") as status:
        for name in dict.fromkeys(job.name for job in jobs):
            group = [job for job in jobs if job.name == name]
            key = _step_key(group[0].resolved)
            if key not in timings:
                status.update(f"timing training steps of {name}")
                timings[key] = _timed(group[0])
            timing = timings[key]
            cells = [name, str(len(group)), str(sum(job.state == "finished" for job in group))]
            if isinstance(timing, str):
                unknown.setdefault(timing, []).append(name)
                table.add_row(*cells, "?", "?", "?", "?")
                continue
            steps = timing.steps_of(group[0].resolved)
            whole = timing.seconds(steps, 0)
            to_do = [timing.seconds(steps, job.result.get("steps") or 0) for job in group]
            table.add_row(*cells, f"{steps:,}", f"{whole / steps:.4f}", duration(whole), duration(sum(to_do)))
            left += to_do
    console.print(table)
    for reason, not_timed in unknown.items():
        console.print(f"{', '.join(not_timed)}: not timed: {reason}")
    if not left:
        return False
    total = max(sum(left) / at_once, *left)
    console.print(
        f"Left: {duration(sum(left))} of training, {duration(total)} with {at_once} at a time. Start-up, evaluation and the"
        " graph of label propagation come on top, and runs that share a GPU slow each other down."
    )
    return True


def _timed(job: Job) -> Timing | str:
    """The timing of a run, or why there is none. The run is built on its data; nothing of it is kept."""
    import torch

    from muscle_plugin.runs.build import build

    never = {"num_eval_iter": MOST_WHOLE, "num_save_iter": MOST_WHOLE}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        changes: dict[str, object] = {"save_dir": folder, **never}
        if job.resolved.settings.tune == "full":  # what is frozen must be there; initial weights need not
            changes |= {"init_from": None, "use_pretrain": False}
        try:
            resolved = load_settings(job.config, **{**job.overrides, **changes})
            if resolved.settings.num_threads:
                torch.set_num_threads(resolved.settings.num_threads)
            algorithm = build(resolved)
            restarts: tuple[int, ...] = getattr(algorithm, "schedule_restarts", tuple)()
            starts = sorted({0, *(s for s in restarts if 0 < s < algorithm.num_train_iter)})
            stages = tuple((start, _seconds_per_step(algorithm, start)) for start in starts)
        except (UserError, ValueError, NotImplementedError) as e:
            return one_line(str(e).partition("\n")[0])
        return Timing(len(algorithm.source.train), len(algorithm.split.labelled), int(algorithm.num_train_iter), stages)


class _Enough(Exception):
    """Enough steps have been timed."""


def _seconds_per_step(algorithm: Host, start: int) -> float:
    """The median time of some training steps of the stage that begins at step ``start``, each waited for."""
    import torch

    from muscle_plugin.usb.names import Hook

    times = [time.perf_counter()]

    class Clock(Hook):
        def after_train_step(self, algorithm: Host) -> None:
            if algorithm.device.type == "cuda":
                torch.cuda.synchronize(algorithm.device)
            times.append(time.perf_counter())
            steps = len(times) - 1
            if steps == WARM_UP_STEPS + TIMED_STEPS or (steps > 1 and times[-1] - times[0] > MOST_SECONDS):
                raise _Enough

    algorithm.register_hook(Clock(), priority="LOWEST")
    algorithm.loader_dict["eval"] = ()  # the last step evaluates
    # the first step of a later stage would propagate labels over all images
    algorithm.it = min(start + 1, algorithm.num_train_iter - 1) if start else 0
    with contextlib.suppress(_Enough):
        algorithm.train()
    steps = [b - a for a, b in pairwise(times)]
    return median(steps[WARM_UP_STEPS:] or steps[-1:])
