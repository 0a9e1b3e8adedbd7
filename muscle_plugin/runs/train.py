"""One training run, from resolved settings to a run directory, whose files docs/first-run.md describes."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from muscle_plugin import distributed
from muscle_plugin.data.load import split_seed
from muscle_plugin.data.splits import read_split, write_split
from muscle_plugin.data.views import check_shared_equally
from muscle_plugin.device import choose_device, keep_freed_memory
from muscle_plugin.errors import DataError, DeviceError, Interrupted, RunError, WriteError
from muscle_plugin.nets.tune import check_peft
from muscle_plugin.run_files import LATEST, SPLIT_FILE, saved_checkpoints
from muscle_plugin.runs.build import build, pack_images, room_for_images_and_nets
from muscle_plugin.runs.directory import begin, failure_file, newest_whole, prepared
from muscle_plugin.runs.environment import record_environment
from muscle_plugin.runs.logs import log_file, output_to
from muscle_plugin.runs.progress import Progress
from muscle_plugin.runs.recorder import Recorder
from muscle_plugin.settings.resolve import Resolved
from muscle_plugin.text import first_line
from muscle_plugin.training import Host


def train(resolved: Resolved, command: Sequence[str] = (), quiet: bool = False) -> dict[str, Any]:
    """Train as configured, to the end, and return the content of ``result.json``.

    Args:
        resolved: from :func:`muscle_plugin.settings.resolve.load_settings`.
        command: the command line to save with the run.
        quiet: print nothing.

    Raises:
        RunError, DataError, DeviceError, InputError: the directory or the checkpoint, the data, the device or the net forbid
            it. In one of several processes, without a message if the first one says why.
        NotFinite: loss, gradient or weights became NaN or infinite; the last checkpoint is from before.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint has been written.
        OSError: a file of the run cannot be read.
    """
    settings, run_dir = resolved.settings, resolved.run_dir
    device = choose_device(settings.device)  # before the run directory is touched
    with contextlib.ExitStack() as stack:
        stack.enter_context(distributed.joined(device, settings.dist_timeout))
        first = distributed.rank() == 0
        distributed.from_first(lambda: _check_processes_and_packages(resolved))
        checkpoints, own = distributed.from_first(
            lambda: (stack.enter_context(prepared(run_dir, resolved)), saved_checkpoints(run_dir))
        )
        notes = []
        if settings.load_path and own and checkpoints == own:
            notes = [f"load_path: {settings.load_path} is not used: the run resumes from its own checkpoint"]
            resolved = replace(resolved, settings=settings.model_copy(update={"load_path": None}))
        progress = Progress(quiet or not first)
        failure: dict[str, object] = {}
        if first and not checkpoints:
            failure = stack.enter_context(failure_file(run_dir, resolved.name))
        logger = stack.enter_context(log_file(run_dir)) if first else None
        if settings.num_threads:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(settings.num_threads)
        keep_freed_memory()
        algorithm = _built(run_dir, resolved, checkpoints, logger)
        algorithm.notes += notes
        distributed.from_first(lambda: begin(run_dir, resolved, bool(checkpoints)))
        if first and checkpoints:  # what could not be resumed has not failed
            failure = stack.enter_context(failure_file(run_dir, resolved.name))
        stack.enter_context(saying_how_to_resume(run_dir, resolved, command))
        try:
            if first:
                algorithm.notes += record_environment(
                    run_dir / "environment.json", algorithm, resolved, command, bool(checkpoints)
                )
                recorder = stack.enter_context(Recorder(run_dir, algorithm.it, settings.use_tensorboard, progress))
                algorithm.recorder = recorder
                algorithm.notes += recorder.notes
                stack.callback(progress.stop)
                progress.start(algorithm)
                recorder.write_result(algorithm)
            in_main = threading.current_thread() is threading.main_thread()  # which alone may handle signals
            with output_to(logger), _faults_of_loggers():
                algorithm.warmup()  # nothing of it would be kept
                with algorithm.stop_on_signals() if in_main else contextlib.nullcontext():
                    algorithm.train()
        finally:
            failure["after_step"] = algorithm.it
        result: dict[str, Any] = distributed.from_first(lambda: recorder.write_result(algorithm))
    progress.finish(result, run_dir)
    return result


def _check_processes_and_packages(resolved: Resolved) -> None:
    """Raise RunError or DataError if these processes cannot share a batch, or a logger is not installed."""
    settings = resolved.settings
    absent = [p for p in ("wandb", "aim") if getattr(settings, f"use_{p}") and find_spec(p) is None]
    if absent:
        raise RunError("\n".join(f"--use_{p}: {p} is not installed: pip install {p}" for p in absent))
    labelled: int = settings.batch_size
    if settings.tune == "lora":
        check_peft()
    check_shared_equally(labelled, settings.total_batch - labelled, distributed.world_size())


def _built(run_dir: Path, resolved: Resolved, checkpoints: Sequence[Path], logger: logging.Logger | None) -> Host:
    """Build the algorithm, at the step from which it trains."""
    if distributed.world_size() > 1:  # one process of a machine writes the array files that the others map
        distributed.in_every_process(lambda: None if distributed.local_rank() else pack_images(resolved, logger))
    algorithm = distributed.in_every_process(lambda: build(resolved, logger))
    distributed.from_first(lambda: _save_split(run_dir / SPLIT_FILE, algorithm, bool(checkpoints)))
    if checkpoints:
        _resume(algorithm, run_dir, checkpoints, bool(resolved.settings.load_path), logger)
    elif resolved.settings.resume == "auto" and (run_dir / "metrics.jsonl").exists():
        algorithm.notes.append(f"{run_dir}: was begun, but has no checkpoint yet; it starts at step 0")
    return algorithm


def _save_split(path: Path, algorithm: Host, resumed: bool) -> None:
    """Write which images are labelled; a DataError if a run that resumes finds other ones."""
    settings, source, split = algorithm.settings, algorithm.source, algorithm.split
    if resumed and path.is_file():
        before = read_split(path, source, settings.include_lb_to_ulb)
        if not torch.equal(before.labelled, split.labelled):
            raise DataError(f"{path}: this run began with other labelled images than its settings give now")
        return
    write_split(path, split, source, dataset=settings.dataset, seed=split_seed(settings))


def _resume(
    algorithm: Host, run_dir: Path, checkpoints: Sequence[Path], named: bool, logger: logging.Logger | None
) -> None:
    """Go to the step of the newest whole checkpoint; ``named``: by the user."""
    # the first process reads for all: the other machines need not see the file
    used, content, damaged = distributed.from_first(lambda: newest_whole(checkpoints, named))

    def restore() -> None:
        with room_for_images_and_nets():
            algorithm.load_model(used, content)

    distributed.in_every_process(restore)
    if distributed.rank() == 0 and used != run_dir / LATEST and not named:
        for path in damaged:  # they are not to displace whole ones
            path.replace(path.with_suffix(".damaged"))
        why = "; ".join(damaged.values()) or f"{run_dir / LATEST}: absent"
        algorithm.notes.append(f"{why}; resuming from step {algorithm.it}, of {used.name}")
        if logger is not None:
            logger.warning(algorithm.notes[-1])


@contextlib.contextmanager
def _faults_of_loggers() -> Iterator[None]:
    """What Weights & Biases and Aim refuse (no login, no network), as one line."""
    try:
        yield
    except Exception as e:
        modules = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(e.__traceback__)]
        for package in ("wandb", "aim"):
            if f"semilearn.core.hooks.{package}" in modules:
                raise RunError(f"--use_{package}: {first_line(e)}") from e
        raise


def resume_command(command: Sequence[str], resolved: Resolved, from_own: bool) -> str:
    """The command line that resumes a run: the same, with ``--resume`` in place of how it was begun. ``from_own``: from a
    checkpoint that the run itself has written, no longer from the one that ``load_path`` names."""
    words = list(command)
    if distributed.world_size() > 1:
        here, machines = os.environ.get("LOCAL_WORLD_SIZE", "1"), os.environ.get("GROUP_WORLD_SIZE", "1")
        if words and words[0] != "train.py":
            words[:1] = ["-m", "muscle_plugin.cli"]
        words[:0] = ["torchrun", "--standalone", f"--nproc_per_node={here}"] if machines == "1" else ["torchrun", "..."]
    elif words and words[0] == "train.py":
        words.insert(0, "python")
    begun = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    begun.add_argument("--overwrite", "-o", nargs="?")
    begun.add_argument("--resume", nargs="?")
    if from_own:
        begun.add_argument("--load_path", "--load-path")
    _, words = begun.parse_known_args(words)
    if from_own and resolved.settings.load_path and resolved.sources.get("load_path") != "command line":
        words += ["--load_path", "None"]  # a configuration names it
    return shlex.join([*words, "--resume"])


@contextlib.contextmanager
def saying_how_to_resume(run_dir: Path, resolved: Resolved, command: Sequence[str]) -> Iterator[None]:
    """Add the command that resumes the run to the errors after which it can be resumed."""
    before = _written(run_dir)
    try:
        yield
    except (Interrupted, WriteError, DeviceError) as e:
        from_own = _written(run_dir) != (before if resolved.settings.load_path else [])
        again = resume_command(command, resolved, from_own)
        if isinstance(e, Interrupted):
            raise Interrupted(f"{e}\nto resume: {again}") if from_own else e from None
        none = "there is no checkpoint yet"
        if isinstance(e, WriteError):
            saved = "the checkpoints before it are whole" if from_own else none
            raise RunError(f"{e}; {saved}. To resume: {again}") from e
        less = "also with another --device, --data_on or --eval_batch_size"
        saved = f"the last checkpoint is whole: {again} resumes from it, {less}" if from_own else none
        raise DeviceError(f"{e}; {saved}") from e


def _written(run_dir: Path) -> list[tuple[int, int]]:
    """What tells the checkpoints of a run from those before them."""
    return [(s.st_ino, s.st_mtime_ns) for s in map(Path.stat, saved_checkpoints(run_dir))]
