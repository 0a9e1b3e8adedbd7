"""``sweep --dry-run``: how long runs would take, from the speed measured on this device."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from muscle_plugin.errors import ConfigError
from muscle_plugin.run_files import SPLIT_FILE
from muscle_plugin.settings.resolve import load_settings
from muscle_plugin.studies.clock import StepClock
from muscle_plugin.studies.speeds import alike
from muscle_plugin.studies.sweep import Job, duration, plural

#: A trial trains for at least so many seconds and one step, after one that is not counted.
TRIAL_SECONDS = 2.0


def show_estimate(jobs: Sequence[Job], at_once: int, console: Console) -> bool:
    """Print the runs of a sweep, the seconds per step of each configuration, and the time in all.

    Returns:
        Whether any time could be measured.
    """
    speeds = Speeds(jobs)
    table = Table(title=f"{plural(len(jobs), 'run')}, {at_once} at a time", title_justify="left")
    table.add_column("configuration", overflow="fold", min_width=16)
    for head in ("runs", "done", "steps", "s a step", "a run takes"):
        table.add_column(head, justify="right", overflow="fold")
    left, longest, unknown = 0.0, 0.0, 0
    sources: dict[str, None] = {}
    names = list(dict.fromkeys(j.name for j in jobs))
    with console.status("measuring the time of a step") as status:
        for name in names:
            status.update(f"measuring the time of a step: {name}")
            group = [j for j in jobs if j.name == name]
            speed = speeds.of(group[0])
            sources[speed.how] = None
            done = sum(j.state == "finished" for j in group)
            steps = steps_of(group[0].resolved.settings, speed.images, speed.labels)
            cells = [name, str(len(group)), str(done), "?" if steps is None else f"{steps:,}"]
            if steps is None or speed.seconds is None:
                unknown += 1
                table.add_row(*cells, "?", "?")
                continue
            whole = steps * speed.seconds
            to_do = [whole * (1 - _done(j, steps)) for j in group]
            left, longest = left + sum(to_do), max(longest, *to_do)
            table.add_row(*cells, f"{speed.seconds:.4f}", duration(whole))
    console.print(table)
    console.print(f"Time of a step from: {'; '.join(sources)}", markup=False)
    if unknown == len(names):
        console.print("Left: unknown")
        return False
    total = max(left / at_once, longest)
    note = f", without the {plural(unknown, 'configuration')} of unknown speed" if unknown else ""
    console.print(
        f"Left: {duration(left)} of training, {duration(total)} with {at_once} at a time{note}; evaluation, start-up and label"
        " propagation's graph come on top.",
        markup=False,
    )
    return True


@dataclass(frozen=True)
class Speed:
    """Seconds per step, images to train on, how many of them are labelled, and where the figures are from; None where they
    cannot be had."""

    seconds: float | None
    images: int | None
    how: str
    labels: int | None = None


class Speeds:
    """Measured once for all runs of like steps: from runs of the sweep that are under way or done, else by a trial."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self._known: dict[str, Speed] = {}

    def of(self, job: Job) -> Speed:
        """The speed of a run."""
        key = alike(job.resolved)
        if key not in self._known:
            same = [j for j in self._jobs if alike(j.resolved) == key]
            self._known[key] = _from_runs(same) or _trial(job)
        return self._known[key]


def steps_of(s: Any, images: int | None, labels: int | None = None) -> int | None:
    """Steps of a run of these settings over so many training images; None: not known.

    Args:
        labels: of the images those that are labelled, where the settings do not say it.
    """
    if s.num_train_iter or images is None:
        return int(s.num_train_iter) if s.num_train_iter else None
    unlabelled = images - (0 if s.include_lb_to_ulb else s.num_labels or labels or 0)
    return max(1, round(s.epoch * unlabelled / (s.total_batch - s.batch_size)))


def _from_runs(jobs: Sequence[Job]) -> Speed | None:
    """The median over finished and cut-off runs; None if there is none of more than a moment."""
    found, images, labels = [], None, None
    for job in jobs:
        result = job.result
        if result.get("steps") and result.get("seconds", 0) > TRIAL_SECONDS:
            found.append(result["seconds"] / result["steps"])
            images, labels = _training_images(job.run_dir)
    return Speed(median(found), images, f"{plural(len(found), 'run')} here", labels) if found else None


def _training_images(run_dir: Path) -> tuple[int | None, int | None]:
    """All, and those that are labelled."""
    try:
        content = json.loads((run_dir / SPLIT_FILE).read_text())
        return int(content["training_images"]), len(content["labelled"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, None


def _trial(job: Job) -> Speed:
    """Build the run and train some steps of it, without evaluation; nothing of it is kept."""
    import torch

    from muscle_plugin.errors import DataError, DeviceError
    from muscle_plugin.runs.train import build

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        overrides = {**job.work.overrides, "save_dir": folder, "init_from": None, "use_pretrain": False}
        try:
            resolved = load_settings(job.work.config, **overrides)
            if resolved.settings.num_threads:
                torch.set_num_threads(resolved.settings.num_threads)
            algorithm = build(resolved)
            clock = StepClock(algorithm, algorithm.device)
            per_step = clock.run(TRIAL_SECONDS)
        except (ConfigError, DataError, DeviceError, ValueError, NotImplementedError) as e:
            return Speed(None, None, f"not measured: {str(e).splitlines()[0]}")
        where = torch.cuda.get_device_name(algorithm.device) if algorithm.device.type == "cuda" else "this CPU"
        images, labels = len(algorithm.source.train), len(algorithm.split.labelled)
        return Speed(per_step, images, f"{plural(clock.steps, 'step')} on {where}", labels)


def _done(job: Job, steps: int) -> float:
    """Share of a run that is behind it."""
    return min(1.0, float(job.result.get("steps", 0) / steps))
