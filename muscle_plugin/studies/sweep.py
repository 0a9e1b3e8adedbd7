"""``muscle-plugin sweep``: many runs by name; what is finished is skipped, what was cut off goes on."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from muscle_plugin.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, CatalogueError, ConfigError, PoolError
from muscle_plugin.settings.command_line import add_arguments, load_named_plugins, named_in, parse_command_line
from muscle_plugin.settings.resolve import Resolved, began_otherwise, differing_settings, load_settings
from muscle_plugin.settings.sources import Layer, config_name
from muscle_plugin.studies.definitions import expand, study_names
from muscle_plugin.studies.pool import LocalPool, Pool, RayPool, Work, runs_per_gpu

EXIT_FAILED = 1

#: Settings that the sweep itself decides for each run.
OWN = ("seed", "save_name", "resume", "overwrite", "load_path")


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    name: str
    seed: int
    work: Work
    resolved: Resolved

    @property
    def run_dir(self) -> Path:
        """Where it is, or will be."""
        return Path(self.resolved.settings.save_dir) / self.resolved.settings.save_name

    @property
    def state(self) -> str:
        """``new``, ``finished``, ``cut off``, ``failed``, or ``of other settings``."""
        if (self.run_dir / "failure.json").is_file():
            return "failed"
        try:
            complete = self.result["complete"]
            if self._differing():
                return "of other settings"
        except (ConfigError, KeyError):
            return "new"
        return "finished" if complete else "cut off"

    @property
    def result(self) -> dict[str, Any]:
        """The content of its ``result.json``; empty if there is none that can be read."""
        try:
            return dict(json.loads((self.run_dir / "result.json").read_text()))
        except (OSError, ValueError, TypeError, RecursionError):
            return {}

    def _differing(self) -> dict[str, tuple[Any, Any]]:
        return differing_settings(self.run_dir / "config.yaml", self.resolved)

    def other_settings(self) -> str:
        """What the run that is there differs in, for people."""
        return began_otherwise(self._differing())

    def after(self, others: Iterable[Job]) -> Job | None:
        """The run from whose weights this one starts, if it is one of the sweep."""
        start = self.resolved.settings.init_from
        return next((j for j in others if start and j.run_dir in (Path(start), Path(start).parent)), None)


def jobs_of(words: Sequence[str], seeds: int, layer: Layer) -> list[Job]:
    """The runs of a sweep, seed by seed.

    Args:
        words: studies, configurations or files, see :func:`muscle_plugin.studies.definitions.expand`.
        seeds: runs of each, with seeds from 0.
        layer: settings for all of them.

    Raises:
        ConfigError: with every fault of any of them.
    """
    faults = [
        f"--{k}: a sweep decides it for each run itself" + ("; give --seeds N" if k == "seed" else "")
        for k in OWN
        if k in layer.values
    ]
    paths: list[Path] = []
    try:
        paths = expand(words)
    except ConfigError as e:
        faults += e.faults
    shared = {"num_threads": 1, **layer.values}
    places: dict[Path, dict[str, str]] = {}
    plugins: dict[Path, tuple[str, ...]] = {}
    for path in paths:
        try:
            settings = load_settings(path, **shared).settings
        except ConfigError as e:
            named = ("--", f"{path.name}:", f"{path.absolute()}:")
            faults += [f if f.startswith(named) else f"{path.stem}: {f}" for f in e.faults]
            continue
        plugins[path] = settings.plugins
        # the same places from wherever it is run
        try:
            places[path] = {
                k: str(Path(getattr(settings, k)).expanduser().absolute()) for k in ("save_dir", "data_dir")
            }
        except RuntimeError as e:  # ~name of a user who is not
            faults.append(f"--save_dir, --data_dir: {e}")
    jobs = []
    for seed in range(seeds):
        for path, place in places.items():
            name = (config_name(path) or path.stem).replace("/", "-")
            overrides = {**shared, **place, "seed": seed, "resume": "auto", "save_name": f"{name}_{seed}"}
            if "plugins" in shared:  # for processes that may be elsewhere
                overrides["plugins"] = plugins[path]
            jobs.append(Job(name, seed, Work(str(path.resolve()), overrides), load_settings(path, **overrides)))
    directories = Counter(job.run_dir for job in jobs)
    faults += [f"{d.name}: two configurations have this name" for d, n in directories.items() if n > 1]
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))
    return jobs


# ------------------------------------------------------------------------------------------------------------ execution


def sweep(jobs: Sequence[Job], pool: Pool, command: list[str], say: Any) -> dict[str, list[tuple[Job, str]]]:
    """Train every job that is not finished; one that needs another's weights waits for it.

    Args:
        jobs: the runs.
        pool: where they are executed.
        command: to save with each run.
        say: called with each line of news.

    Returns:
        Jobs by how they ended (``finished``, ``failed``, ``stopped``), each with a word on it.
    """
    ended: dict[str, list[tuple[Job, str]]] = {"finished": [], "failed": [], "stopped": []}
    left = [j for j in jobs if j.state != "finished"]
    total, done = len(left), 0
    running: dict[Future[dict[str, Any]], Job] = {}
    began = time.perf_counter()

    def end(how: str, job: Job, word: str) -> None:
        nonlocal done
        done += 1
        ended[how].append((job, word))
        say(f"[{done}/{total}] {job.name}, seed {job.seed}: {word}   ({duration(time.perf_counter() - began)})")

    try:
        while left or running:
            for job in list(left):
                before = job.after(jobs)
                if before is None or before.state == "finished":
                    running[pool.submit(job.work, command)] = job
                    left.remove(job)
                elif before not in left and before not in running.values():
                    left.remove(job)
                    end("failed", job, f"not begun, since {before.run_dir.name} did not finish")
            if not running:
                continue
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                how, word = _outcome(future)
                end(how, job, word)
    except KeyboardInterrupt:
        pool.stop()
        say("stopping; runs in progress are saved")
        for future, job in running.items():
            how, word = _outcome(future)
            end(how, job, word)
        ended["stopped"] += [(job, "not begun") for job in left]
    return ended


def execute_all(jobs: Sequence[Job], pool: Pool, command: list[str], say: Any) -> dict[str, list[tuple[Job, str]]]:
    """:func:`sweep`, with SIGTERM as Ctrl-C; the pool is closed in any case."""
    # Ctrl-C too: what a script starts in the background ignores it, but runs do not, and the sweep would begin others
    previous = {n: signal.signal(n, signal.default_int_handler) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        return sweep(jobs, pool, command, say)
    finally:
        pool.close()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _outcome(future: Future[dict[str, Any]]) -> tuple[str, str]:
    """How a run ended, and a word on it."""
    try:
        outcome = future.result()
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # also those of Ray, and cancellation
        cancelled = type(e).__name__ in ("CancelledError", "TaskCancelledError")
        return ("stopped", "not begun") if cancelled else ("failed", f"failed: {_first(e)}")
    if "error" in outcome:
        return "failed", f"failed: {outcome['error'].splitlines()[0]}"
    if "stopped" in outcome:
        return "stopped", outcome["stopped"]
    result = outcome["result"]
    if result["stage"] == "pretrain":
        return "finished", f"pre-trained without labels, {duration(result['seconds'])}"
    score = "no test images" if result["last_top1"] is None else f"{100 * result['last_top1']:.2f} %"
    return "finished", f"{score}, {duration(result['seconds'])} of training"


def _first(e: BaseException) -> str:
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"


def plural(n: int, what: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"


# --------------------------------------------------------------------------------------------------------- command line


def main(argv: Sequence[str], prog: str = "muscle-plugin sweep") -> int:
    """Returns the exit status: 0 all finished, 1 some failed, 2 bad input, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog=prog, allow_abbrev=False,
        usage=f"{prog} NAME... [--seeds N] [--dry-run] [--jobs N] [--ray [ADDRESS]] [--setting value ...]",
        description="Train many runs by name. What is finished is skipped, what was cut off goes on, and a run that fails does"
        " not stop the others.",
        epilog=f"Studies: {', '.join(study_names())}. A setting given here is for all runs. Each run trains with one CPU thread"
        " unless --num_threads says otherwise, and gets its GPU from the sweep: --device cuda, without a number.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120),
    )  # fmt: skip
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help="studies, configurations (also by *: '*_digits_10') or YAML files")
    add("--seeds", type=int, default=5, metavar="N", help="runs of each configuration, with seeds from 0 [%(default)s]")
    add(
        "--dry-run",
        action="store_true",
        help="list the runs with the time they would take, measured here; train nothing",
    )
    add(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at a time; if more than GPUs, several share one; default: one per GPU, without GPU one per CPU core",
    )
    add(
        "--ray", nargs="?", const="local", metavar="ADDRESS", help="run on Ray: started here, or the cluster at ADDRESS"
    )
    add(
        "--gpus_per_run",
        type=float,
        metavar="X",
        help="share of a GPU that a run is given, at most 1: 0.5 lets two share one; default: what --jobs asks for, else 1",
    )
    faults: list[str] = []
    jobs: list[Job] = []
    try:
        load_named_plugins(argv, lambda _, rest: named_in(rest))
        add_arguments(parser)
        options, layer, faults = parse_command_line(parser, argv)
        counts = {"seeds": options.seeds, "jobs": options.jobs}
        faults += [f"--{k}: must be at least 1, got {v}" for k, v in counts.items() if v is not None and v < 1]
        if options.gpus_per_run is not None and not 0 < options.gpus_per_run <= 1:
            faults.append(f"--gpus_per_run: a share of one GPU, above 0 and at most 1, got {options.gpus_per_run:g}")
        if options.jobs and options.ray not in (None, "local"):
            faults.append(f"--jobs: the cluster at {options.ray} runs as many as it has room for (--gpus_per_run)")
        if options.c or options.print_config:
            faults.append("--c, --print-config: of train; a sweep takes configurations by name or path, without a flag")
        jobs = jobs_of(options.names, max(options.seeds, 1), layer)
        faults += _device_faults(jobs, layer)
    except ConfigError as e:
        faults += e.faults
    except CatalogueError as e:
        faults.append(str(e))
    if faults:
        raise ConfigError(_shortened(faults))
    console = Console(highlight=False, markup=False, soft_wrap=True)

    def say(line: str) -> None:
        console.print(line, markup=False)

    for notice in dict.fromkeys(n for job in jobs for n in job.resolved.notices):
        say(f"note: {notice}")
    gpus, here = _gpus(jobs), options.ray in (None, "local")
    per_run, room = options.gpus_per_run, len(gpus) * runs_per_gpu(options.gpus_per_run or 1)
    at_once = options.jobs or room or _cores()
    if per_run is None and at_once > room > 0:
        per_run = math.floor(10_000 / -(-at_once // len(gpus))) / 10_000  # Ray counts in ten thousandths
    elif at_once > room > 0:
        say(
            f"note: --jobs {at_once}: {plural(room, 'run')} at a time, for which --gpus_per_run {per_run:g} leaves room"
        )
        at_once = room
    if at_once > len(gpus) > 0 and here:
        say("note: runs share a GPU and slow each other down, by how much is not estimated")
    states = [job.state for job in jobs]
    others = [job for job, state in zip(jobs, states, strict=True) if state == "of other settings"]
    if others:
        advice = "Give another --save_dir, or the settings it began with"
        raise ConfigError(_shortened([f"{job.run_dir}: {job.other_settings()}. {advice}" for job in others], 3))
    if options.dry_run:
        from muscle_plugin.studies.estimate import show_estimate

        return 0 if show_estimate(jobs, at_once, console) else EXIT_BAD_INPUT
    finished = states.count("finished")
    folder = jobs[0].resolved.settings.save_dir
    say(f"{plural(len(jobs), 'run')}, {finished} of them finished before, in {folder}")
    if finished == len(jobs):
        return _close(jobs, {"finished": [], "failed": [], "stopped": []}, say)
    cpus = max(j.resolved.settings.num_threads or 1 for j in jobs)
    devices = {j.resolved.settings.device for j in jobs}
    if not gpus and (here or devices == {"cpu"}):
        _refuse_absent_gpus(devices, per_run)
    pool: Pool
    if options.ray:
        share = 0.0 if devices == {"cpu"} else per_run or (1.0 if "cuda" in devices else None)
        pool = RayPool(options.ray, at_once, len(gpus), share, cpus)
    else:
        pool = LocalPool(at_once, gpus)
    say(f"{pool.at_once} at a time; Ctrl-C saves and stops, the same command goes on")
    try:
        ended = execute_all(jobs, pool, [prog, *argv], say)
    except KeyboardInterrupt:  # a second one
        say("stopped at once")
        return EXIT_INTERRUPTED
    return _close(jobs, ended, say)


def _close(jobs: Sequence[Job], ended: dict[str, list[tuple[Job, str]]], say: Any) -> int:
    """The last lines, and the exit status."""
    for job, word in ended["failed"]:
        say(f"failed: {job.name}, seed {job.seed}: {word.removeprefix('failed: ')}; log: {job.run_dir / 'log.txt'}")
    finished = sum(job.state == "finished" for job in jobs)
    say(
        f"{finished} of {plural(len(jobs), 'run')} finished. Next: muscle-plugin report {jobs[0].resolved.settings.save_dir}"
    )
    if ended["stopped"]:
        return EXIT_INTERRUPTED
    return EXIT_FAILED if ended["failed"] else 0


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device_faults(jobs: Sequence[Job], layer: Layer) -> list[str]:
    """What is wrong with the devices of runs, of which a sweep gives each one."""
    faults = []
    for job in jobs:
        name, _, number = job.resolved.settings.device.partition(":")
        if number:
            where = "--device" if {"device", "gpu"} & layer.values.keys() else f"{job.name}: device"
            faults.append(
                f"{where}: a sweep gives each run its GPU itself, got {name}:{number}; give --device cuda, and in the"
                " environment CUDA_VISIBLE_DEVICES with the GPUs to use"
            )
    return faults


def _refuse_absent_gpus(devices: set[str], per_run: float | None) -> None:
    """Raises PoolError if GPUs are asked for, of which there are none for these runs."""
    asked = "--gpus_per_run" if per_run else "device cuda"
    if per_run or "cuda" in devices:
        why = "--device cpu" if devices == {"cpu"} else "this machine has no usable GPU"
        raise PoolError(f"{asked}: asks for GPUs, but there are none for these runs ({why}); leave it out")


def _gpus(jobs: Sequence[Job]) -> tuple[str, ...]:
    """What CUDA calls the GPUs that runs may use."""
    if all(job.resolved.settings.device == "cpu" for job in jobs):
        return ()
    import torch

    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(count)]
    # of the parts of a GPU (MIG) a process sees, and counts, but one; each run gets one of them
    return tuple(names if count and names[0].startswith("MIG-") else names[:count])


def _shortened(faults: list[str], most: int = 12) -> list[str]:
    """The first faults, and how many more there are."""
    unique = list(dict.fromkeys(faults))
    return unique if len(unique) <= most else [*unique[:most], f"and {len(unique) - most} more like these"]
