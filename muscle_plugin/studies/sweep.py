"""``muscle-plugin sweep``: train many runs by name; finished runs are skipped, interrupted ones resume."""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from rich.console import Console

from muscle_plugin.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, ConfigError
from muscle_plugin.settings.command_line import parse_command_line
from muscle_plugin.studies.definitions import study_names
from muscle_plugin.studies.dry_run import dry_run
from muscle_plugin.studies.jobs import Job, jobs_of, predecessor, refuse, refuse_other_settings, run_order
from muscle_plugin.studies.pool import Pool, open_pool
from muscle_plugin.text import duration, first_line, plural


@dataclass(frozen=True)
class Ending:
    """How a run of a sweep ended."""

    job: Job
    state: str  #: ``finished``, ``failed`` or ``stopped``
    words: str


def run_all(jobs: Sequence[Job], pool: Pool, command: list[str], say: Callable[[str], None]) -> list[Ending]:
    """Train every run that is not finished; one that starts from another's weights waits for it. SIGTERM and Ctrl-C save
    what runs, and begin nothing more. The pool is closed; ``command`` is saved with each run."""
    by_dir = {job.run_dir: job for job in jobs}
    order = run_order(jobs)
    left = {run_dir: job for run_dir, job in by_dir.items() if job.state != "finished"}
    total, began = len(left), time.perf_counter()
    running: dict[Future[tuple[str, str]], Job] = {}
    endings: list[Ending] = []

    def end(ending: Ending) -> None:
        endings.append(ending)
        order.done(ending.job.run_dir)
        passed = duration(time.perf_counter() - began)
        say(f"[{len(endings)}/{total}] {ending.job}: {ending.words}   ({passed})")

    # Ctrl-C too: what a script starts in the background ignores it, but its runs do not, and others would be begun
    handlers = {n: signal.signal(n, signal.default_int_handler) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        while order.is_active():
            for run_dir in order.get_ready():
                if (job := left.get(run_dir)) is None:
                    order.done(run_dir)
                    continue
                if (before := predecessor(job, by_dir)) and before.state != "finished":
                    end(Ending(job, "failed", f"not begun, since {before.run_dir.name} did not finish"))
                else:
                    running[pool.submit(job.config, job.overrides, command)] = job
                del left[run_dir]
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                end(_ending(running.pop(future), future))
    except KeyboardInterrupt:
        pool.stop()
        say("stopping; runs in progress are saved")
        for future, job in running.items():
            end(_ending(job, future))
        endings += [Ending(job, "stopped", "not begun") for job in left.values()]
    finally:
        pool.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return endings


def _ending(job: Job, future: Future[tuple[str, str]]) -> Ending:
    try:
        return Ending(job, *future.result())
    except (Exception, SystemExit) as e:  # of a plugin, or of Ray
        if type(e).__name__ in ("CancelledError", "TaskCancelledError"):
            return Ending(job, "stopped", "not begun")
        return Ending(job, "failed", f"failed: {type(e).__name__}: {first_line(e)}")


def main(argv: Sequence[str], prog: str = "muscle-plugin sweep") -> int:
    """Return the exit status: 0 all finished, 1 some failed, 2 bad input, 130 interrupted."""
    options, jobs = _parsed(argv, prog)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 160
    say: Callable[[str], None] = console.print
    for notice in dict.fromkeys(n for job in jobs for n in job.resolved.notices):
        say(f"note: {notice}")
    states = [job.state for job in jobs]
    refuse_other_settings(jobs, "Give another --save_dir, or the settings it began with")
    devices = {job.resolved.settings.device for job in jobs}
    threads = max(job.resolved.settings.num_threads or 1 for job in jobs)
    if options.dry_run:
        pool = open_pool(devices, options.jobs, options.gpus_per_run, None, threads)
        return 0 if dry_run(jobs, pool.at_once, console) else EXIT_BAD_INPUT
    finished, folder = states.count("finished"), jobs[0].resolved.settings.save_dir
    say(f"{plural(len(jobs), 'run')}, {finished} of them finished before, in {folder}")
    endings: list[Ending] = []
    if finished < len(jobs):
        pool = open_pool(devices, options.jobs, options.gpus_per_run, options.ray, threads)
        say(f"{pool.at_once} at a time; Ctrl-C saves and stops, the same command resumes")
        try:
            endings = run_all(jobs, pool, [prog, *argv], say)
        except KeyboardInterrupt:  # a second one
            say("stopped at once")
            return EXIT_INTERRUPTED
    failed = [e for e in endings if e.state == "failed"]
    for e in failed:
        say(f"failed: {e.job}: {e.words.removeprefix('failed: ')}; log: {e.job.run_dir / 'log.txt'}")
    finished = sum(job.state == "finished" for job in jobs)
    stopped = any(e.state == "stopped" for e in endings)
    following = "The same command resumes" if stopped else f"Next: muscle-plugin report {folder}"
    say(f"{finished} of {plural(len(jobs), 'run')} finished. {following}")
    return EXIT_INTERRUPTED if stopped else EXIT_FAILED if failed else 0


def _parsed(argv: Sequence[str], prog: str) -> tuple[argparse.Namespace, list[Job]]:
    """The options of a command line, and the runs that it names; a ConfigError has every fault found."""
    parser = argparse.ArgumentParser(
        prog=prog, allow_abbrev=False,
        usage=f"{prog} NAME... [--seeds N] [--dry-run] [--jobs N] [--ray [ADDRESS]] [--setting value ...]",
        description="Train many runs by name. Finished runs are skipped, interrupted ones resume, and a run that fails does not"
        " stop the others.",
        epilog=f"Studies: {', '.join(study_names())}. A setting given here applies to all runs. Each run trains with one CPU"
        " thread unless --num_threads says otherwise; the sweep assigns GPUs: --device cuda, without a number.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120),
    )  # fmt: skip
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help="studies, configurations (also by *: '*_digits_10') or YAML files")
    add("--seeds", type=int, default=5, metavar="N", help="runs of each configuration, with seeds from 0 [%(default)s]")
    add("--dry-run", action="store_true", help="time some steps of each kind of run and print the hours; train nothing")
    add(
        "--jobs", type=int, metavar="N",
        help="runs at a time; if more than GPUs, several share one; default: one per GPU, without GPU one per CPU core",
    )  # fmt: skip
    add("--ray", nargs="?", const="local", metavar="ADDRESS", help="use Ray: started here, or the cluster at ADDRESS")
    add(
        "--gpus_per_run", type=float, metavar="X",
        help="share of a GPU for each run, at most 1: 0.5 lets two share one; default: what --jobs asks for, else 1",
    )  # fmt: skip
    options, layer, faults = parse_command_line(parser, argv)
    counts = {"seeds": options.seeds, "jobs": options.jobs}
    faults += [f"--{k}: must be at least 1, got {v}" for k, v in counts.items() if v is not None and v < 1]
    if options.gpus_per_run is not None and not 0 < options.gpus_per_run <= 1:
        faults.append(f"--gpus_per_run: a share of one GPU, above 0 and at most 1, got {options.gpus_per_run:g}")
    if options.jobs and options.ray not in (None, "local"):
        faults.append(f"--jobs: the cluster at {options.ray} runs as many as it has room for (--gpus_per_run)")
    if options.c or options.print_config:
        faults.append("--c, --print-config: of train; a sweep takes configurations by name or path, without a flag")
    try:
        jobs = jobs_of(options.names, max(options.seeds, 1), layer)
        place = "--device" if {"device", "gpu"} & layer.values.keys() else "{}: device"
        faults += [
            f"{place.format(job.name)}: a sweep gives each run its GPU itself, got {job.resolved.settings.device}; give"
            " --device cuda, and in the environment CUDA_VISIBLE_DEVICES with the GPUs to use"
            for job in jobs
            if ":" in job.resolved.settings.device
        ]
    except ConfigError as e:
        faults += e.faults
    refuse(faults, 12)
    return options, jobs
