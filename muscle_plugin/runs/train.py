"""One training run, from resolved settings to a run directory.

``<save_dir>/<save_name>/`` holds ``config.yaml`` (the resolved settings; ``--c`` reads it back), ``split.json`` (which
images are labelled; ``--split_file`` reads it back), ``environment.json`` (versions, git revision, device, command),
``log.txt``, ``metrics.jsonl``, ``result.json``, TensorBoard events, ``latest_model.pth``, the checkpoint before it as
``previous_model.pth``, and ``model_best.pth``. After a failure, ``failure.json`` describes it until the run is started or
resumed again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from muscle_plugin import distributed
from muscle_plugin.data.load import split_seed
from muscle_plugin.data.splits import read_split, write_split
from muscle_plugin.data.views import check_shared_equally
from muscle_plugin.device import choose_device, keep_freed_memory
from muscle_plugin.errors import DamagedError, DataError, RunError
from muscle_plugin.files import read_whole
from muscle_plugin.run_files import BEST, LATEST, SPLIT_FILE
from muscle_plugin.runs.build import build, pack_images, room_for_images_and_nets
from muscle_plugin.runs.directory import failure_file, newest_whole, prepared, run_directory, set_aside
from muscle_plugin.runs.environment import record_environment
from muscle_plugin.runs.logs import log_file, output_to
from muscle_plugin.runs.progress import Progress
from muscle_plugin.runs.recorder import Recorder
from muscle_plugin.runs.resume import saying_how_to_resume
from muscle_plugin.settings.resolve import Resolved
from muscle_plugin.training import Host


def train(resolved: Resolved, command: Sequence[str] = (), quiet: bool = False) -> dict[str, Any]:
    """Train as configured, to the end, and return the content of ``result.json``.

    Args:
        resolved: from :func:`muscle_plugin.settings.resolve.load_settings`.
        command: the command line to save with the run.
        quiet: print nothing.

    Raises:
        UserError: the directory, the data, the device, the net or the checkpoint forbid it (RunError, DataError,
            DeviceError, InputError). In one of several processes, without a message if the first one says why.
        NotFinite: loss, gradient or weights became NaN or infinite; the last checkpoint is from before.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint has been written.
        OSError: a file of the run cannot be read.
    """
    settings, run_dir = resolved.settings, run_directory(resolved)
    device = choose_device(settings.device)  # before the run directory is touched
    with contextlib.ExitStack() as stack:
        stack.enter_context(distributed.joined(device, settings.dist_timeout))
        first = distributed.rank() == 0
        distributed.from_first(lambda: _check_processes_and_packages(resolved))
        checkpoints = distributed.from_first(lambda: stack.enter_context(prepared(run_dir, resolved)))
        progress = Progress(settings, quiet or not first)
        failure = stack.enter_context(failure_file(run_dir, resolved.name)) if first else {}
        logger = stack.enter_context(log_file(run_dir)) if first else None
        stack.enter_context(_threads(settings.num_threads))
        keep_freed_memory()
        algorithm = _built(run_dir, resolved, checkpoints, logger)
        stack.enter_context(saying_how_to_resume(run_dir, resolved, command))
        try:
            if first:
                algorithm.notes += record_environment(
                    run_dir / "environment.json", algorithm, resolved, command, bool(checkpoints)
                )
                recorder = stack.enter_context(_recorder(run_dir, algorithm, progress))
                algorithm.recorder = recorder
            with output_to(logger):
                algorithm.warmup()  # nothing of it would be kept
                with _stopping_on_signals(algorithm):
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
    check_shared_equally(labelled, settings.total_batch - labelled, distributed.world_size())


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _recorder(run_dir: Path, algorithm: Host, progress: Progress) -> Iterator[Recorder]:
    """Record the run from its present step, and show it."""
    with Recorder(run_dir, algorithm.it, algorithm.args.use_tensorboard, progress) as recorder, progress:
        recorder.note_missing(int(algorithm.monitor.last_line.get("step", 0)))
        algorithm.notes += [*recorder.notes, *_about_best(run_dir, algorithm)]
        progress.start(algorithm)
        recorder.write_result(algorithm)
        yield recorder


def _stopping_on_signals(algorithm: Host) -> contextlib.AbstractContextManager[None]:
    """Save and stop on a signal, which only the main thread may handle."""
    if threading.current_thread() is not threading.main_thread():
        return contextlib.nullcontext()
    return algorithm.stop_on_signals()


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
    """Write which images are labelled; a run that resumes must find the same ones.

    Raises:
        DataError: the images or their labels have changed since the run began.
    """
    args, source, split = algorithm.args, algorithm.source, algorithm.split
    if resumed and path.is_file():
        before = read_split(path, source, args.include_lb_to_ulb)
        if not torch.equal(before.labelled, split.labelled):
            raise DataError(f"{path}: this run began with other labelled images than its settings give now")
        return
    write_split(path, split, source, dataset=args.dataset, seed=split_seed(algorithm.settings))


def _resume(
    algorithm: Host, run_dir: Path, checkpoints: Sequence[Path], named: bool, logger: logging.Logger | None
) -> None:
    """Go to the step of the newest whole checkpoint.

    Args:
        named: by the user.
    """
    # the first process reads for all: the other machines need not see the file
    used, content, damaged = distributed.from_first(lambda: newest_whole(checkpoints))

    def restore() -> None:
        with room_for_images_and_nets():
            algorithm.load_model(used, content)

    distributed.in_every_process(restore)
    if distributed.rank() == 0 and used != run_dir / LATEST and not named:
        algorithm.notes.append(set_aside(damaged, run_dir, used, algorithm.it))
        if logger is not None:
            logger.warning(algorithm.notes[-1])


def _about_best(run_dir: Path, algorithm: Host) -> list[str]:
    """A note if a resumed run has no whole checkpoint of its best evaluation."""
    if not algorithm.evaluations:
        return []
    try:
        read_whole(run_dir / BEST)
    except (DamagedError, OSError) as e:
        fault = str(e) if isinstance(e, DamagedError) else f"{e.filename}: {e.strerror}"
        return [
            f"{fault}; the best evaluation so far was of step {algorithm.best_it + 1}; only a better one replaces it"
        ]
    return []
