"""One training run, from resolved settings to a run directory.

``<save_dir>/<save_name>/`` holds ``config.yaml`` (the resolved settings; ``--c`` reads it back), ``split.json`` (which
images are labelled; ``--split_file`` reads it back), ``environment.json`` (versions, git revision, device, command),
``log.txt``, ``metrics.jsonl``, ``result.json``, TensorBoard events, ``latest_model.pth``, the checkpoint before it as
``previous_model.pth``, and ``model_best.pth``; of a run that failed, ``failure.json`` says how, until it is begun or
continued again.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import logging
import logging.handlers
import os
import pickle
import platform
import re
import shlex
import shutil
import subprocess
import sys
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
import torch
from muscle_plugin import distributed
from muscle_plugin.closest import did_you_mean
from muscle_plugin.settings.resolve import Resolved
from muscle_plugin.settings.schema import OF_ONES_OWN
from muscle_plugin.errors import DataError
from muscle_plugin.registry.names import DATASETS, NETS, TIMM
from muscle_plugin.data.splits import read_split, write_split
from muscle_plugin.data.views import check_shared_equally
from muscle_plugin.registry.extension import PLUGIN_NETS
from muscle_plugin.files import (finish_move, load_tensors, read_json, read_whole, remove_parts, write_json, write_text)
from muscle_plugin.errors import DamagedError, WriteError
from muscle_plugin.errors import CompileError
from muscle_plugin.device import (choose_device)
from muscle_plugin.errors import DeviceError
from muscle_plugin.errors import NotFinite
from muscle_plugin.training.host import (read_source, split_seed)
from muscle_plugin.errors import Interrupted
from muscle_plugin.memory import keep_freed_memory, memory_for
from muscle_plugin.registry.plugins import fingerprints
from muscle_plugin.runs.progress import Progress
from muscle_plugin.runs.recorder import Recorder
from muscle_plugin.run_files import (
    BEST,
    CONFIG_FILE,
    FAILURE_FILE,
    LATEST,
    SPLIT_FILE,
    earlier_checkpoints,
    saved_checkpoints,
)
from muscle_plugin.runs.directory import (run_lock, checkpoints_or_refusal, is_worth_keeping)
from muscle_plugin.errors import RunError
from muscle_plugin.text import first_line, out_of_memory, shown
from muscle_plugin.version import __version__
from muscle_plugin.nets.build import builder_of
from muscle_plugin.runs.environment import _changes, _save_environment, environment

T = TypeVar("T")


#: What keeps images and nets out of a GPU's memory, or makes them smaller.
LESS = "--data_on host, a smaller --net or --img_size"


#: log.txt is begun anew at this size; the two before are kept.
LOG_BYTES = 10_000_000


#: Warnings of different words that log.txt takes from one call into USB's code.
LOGGED_WARNINGS = 200


def train(resolved: Resolved, command: Sequence[str] = (), quiet: bool = False) -> dict[str, Any]:
    """Train as configured, to the end, and return the content of ``result.json``.

    Args:
        resolved: from :func:`muscle_plugin.settings.resolve.load_settings`.
        command: the command line to save with the run.
        quiet: print nothing.

    Raises:
        RunError: the directory, the data, the device or the checkpoint forbid it.
        NotFinite: training came to a loss that is not finite; the last checkpoint is from before.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint has been written.
    """
    settings = resolved.settings
    run_dir = Path(settings.save_dir) / settings.save_name
    with contextlib.ExitStack() as stack:
        try:
            device = choose_device(settings.device)  # before the run's directory is touched
            stack.enter_context(distributed.joined(device, settings.dist_timeout))
        except (DeviceError, RuntimeError, ValueError) as e:
            raise RunError(str(e).splitlines()[0]) from e
        return _train(run_dir, resolved, command, quiet or distributed.rank() > 0)


def _together(work: Callable[[], T], only_first: bool = False) -> T:
    """What ``work`` returns here; if it fails in one process, it fails in all, and the first says why.

    Args:
        only_first: it is done in the first process, and all get what it returns there.

    Raises:
        RunError: of this process or of another; without words where another says it.
    """
    found: Any = None
    fault = None
    if not only_first or distributed.rank() == 0:
        try:
            found = work()
        except RunError as e:
            fault = e
    faults = distributed.gather_objects(str(fault) if fault else None)
    which = next((i for i, text in enumerate(faults) if text), None)
    if which is None:
        return distributed.from_first(lambda: found) if only_first else found  # type: ignore[no-any-return]
    if distributed.rank():
        raise RunError("")
    raise fault or RunError(f"process {which}: {faults[which]}")


def _train(run_dir: Path, resolved: Resolved, command: Sequence[str], quiet: bool) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:

        def prepare() -> list[Path]:
            settings = resolved.settings
            _refuse_absent_loggers(settings)
            unlabelled = settings.total_batch - settings.batch_size
            _said(lambda: check_shared_equally(settings.batch_size, unlabelled, distributed.world_size()))
            stack.enter_context(run_lock(run_dir))
            checkpoints = _prepare_directory(run_dir, resolved)
            _refuse_links(run_dir)
            _said(lambda: remove_parts(run_dir))
            _said(lambda: (run_dir / FAILURE_FILE).unlink(missing_ok=True))
            text = resolved.to_yaml(leave_out=("resume", "overwrite", "load_path"))
            _said(lambda: write_text(run_dir / CONFIG_FILE, text))
            return checkpoints

        checkpoints = _together(prepare, only_first=True)
        return _train_or_say_why(run_dir, resolved, checkpoints, command, quiet)


def _train_or_say_why(
    run_dir: Path, resolved: Resolved, checkpoints: Sequence[Path], command: Sequence[str], quiet: bool
) -> dict[str, Any]:
    built: list[Any] = []
    try:
        try:
            return _train_in(run_dir, resolved, checkpoints, command, quiet, built)
        except WriteError as e:
            own = bool(saved_checkpoints(run_dir))
            saved = "the checkpoints before it are whole" if own else "there is no checkpoint yet"
            raise RunError(f"{_refused(e)}; {saved}. To go on: {_resume_command(command, own)}") from e
        except OSError as e:
            if not e.filename:
                raise
            raise RunError(f"{e.filename}: {e.strerror}") from e
    except Interrupted:
        raise
    except Exception as e:
        if distributed.rank():
            raise
        with contextlib.suppress(OSError):  # what is wrong may be the disk
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            text = "".join(traceback.format_exception(e))
            failure = {"error": f"{type(e).__name__}: {e}", "at": now, "config": resolved.name, "traceback": text}
            reached = {"after_step": built[0].it} if built else {}
            write_json(run_dir / FAILURE_FILE, {**failure, **reached, **getattr(e, "details", {})})
        raise


def _train_in(
    run_dir: Path,
    resolved: Resolved,
    checkpoints: Sequence[Path],
    command: Sequence[str],
    quiet: bool,
    built: list[Any],
) -> dict[str, Any]:
    """``built`` gets the algorithm as soon as the run has one."""
    settings = resolved.settings
    import muscle_plugin.register  # noqa: F401

    progress = Progress(settings, quiet)
    first = distributed.rank() == 0
    with contextlib.ExitStack() as stack:
        if settings.num_threads:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(settings.num_threads)
        logger = stack.enter_context(_log_file(run_dir)) if first else None
        if distributed.world_size() > 1:  # one process of a machine makes the array files that its others map
            _together(lambda: None if distributed.local_rank() else _warm_caches(resolved, logger))
        keep_freed_memory()
        algorithm = _together(lambda: _built(run_dir, resolved, bool(checkpoints), logger))
        built.append(algorithm)
        if checkpoints:
            # the first process reads: the others go on from the same file, which their machines need not see
            used, content, damaged = _together(lambda: _newest_whole(checkpoints), only_first=True)
            _together(lambda: _said(lambda: algorithm.load_model(used, content)))
            if first and used != run_dir / LATEST and not settings.load_path:
                algorithm.notes.append(_gone_back(run_dir, used, algorithm.it, damaged))
                if logger is not None:
                    logger.warning(algorithm.notes[-1])
            del content
        elif settings.resume == "auto" and (run_dir / "metrics.jsonl").exists():
            algorithm.notes.append(f"{run_dir}: was begun, but has no checkpoint yet; it starts at step 0")
        if first:
            about = {
                "config": resolved.name,
                **environment(algorithm, command),
                "plugins": fingerprints(settings.plugins),
                "compile": settings.compile,
                "deterministic": settings.deterministic,
            }
            if checkpoints:
                algorithm.notes += _changes(run_dir / "environment.json", about)
            _save_environment(run_dir / "environment.json", about, bool(checkpoints))
            recorder = stack.enter_context(Recorder(run_dir, algorithm.it, settings.use_tensorboard, progress))
            recorder.note_missing(int(algorithm.monitor.last_line.get("step", 0)))
            algorithm.notes += [*recorder.notes, *_about_best(run_dir, algorithm)]
            stack.enter_context(progress)
            progress.start(algorithm)
            algorithm.recorder = recorder
            recorder.write_result(algorithm)
        with _signals(algorithm):
            try:
                with _stdout_to(logger):
                    algorithm.warmup()
                    algorithm.train()
            except Interrupted as e:
                if not saved_checkpoints(run_dir):
                    raise
                raise Interrupted(f"{e}\nto go on: {_resume_command(command, True)}") from None
            except CompileError as e:  # found at the first step
                raise RunError(str(e)) from e
            except DeviceError as e:
                left = "there is no checkpoint yet"
                if saved_checkpoints(run_dir):
                    left = f"the last checkpoint is whole: {_resume_command(command, True)} goes on from it, also with"
                    left += " another --device, --data_on or --eval_batch_size"
                raise RunError(f"{e}; {left}") from e
        result: dict[str, Any] = distributed.from_first(lambda: recorder.write_result(algorithm))
    progress.finish(result, run_dir)
    return result


def _newest_whole(checkpoints: Sequence[Path]) -> tuple[Path, bytes, dict[Path, str]]:
    """The first of ``checkpoints`` that is not damaged, its content, and what is wrong with those before it."""
    damaged: dict[Path, str] = {}
    for path in checkpoints:
        try:
            return path, read_whole(path), damaged
        except DamagedError as e:
            damaged[path] = str(e)
        except OSError as e:
            raise RunError(f"{path}: cannot be read: {e.strerror}") from None
        except ValueError as e:
            raise RunError(str(e)) from None
    best = next(iter(damaged)).parent / BEST
    kept = f" ({best}, which --init_from can begin another run with, would be deleted)" if best.is_file() else ""
    raise RunError(
        f"{'; '.join(damaged.values())}: no checkpoint to go on from is left; --overwrite starts the run anew{kept}"
    )


def _about_best(run_dir: Path, algorithm: Any) -> list[str]:
    """A note if a run that goes on has no whole checkpoint of its best evaluation."""
    if not algorithm.evaluations:
        return []
    try:
        read_whole(run_dir / BEST)
    except DamagedError as e:
        fault = str(e)
    except OSError as e:
        fault = f"{run_dir / BEST}: {e.strerror}"
    else:
        return []
    return [
        f"{fault}; the best evaluation so far was of step {algorithm.best_it + 1}, and only a better one replaces it"
    ]


def _gone_back(run_dir: Path, used: Path, step: int, damaged: dict[Path, str]) -> str:
    """A line that says why a run does not go on from its newest checkpoint. Damaged ones are renamed, so that they do not
    take the places of whole ones when the next is written."""
    for path in damaged:
        path.replace(path.with_suffix(".damaged"))
    why = "; ".join(damaged.values()) or f"{run_dir / LATEST}: absent"
    return f"{why}; going on from step {step}, of {used.name}"


def _refused(e: OSError) -> str:
    return f"{e.filename}: cannot be written: {e.strerror}"


def _said(work: Callable[[], T]) -> T:
    """What ``work`` returns; what is wrong with its input, or with the disk, as a :class:`RunError`."""
    try:
        with memory_for("the images and nets", LESS):
            return work()
    except WriteError as e:
        raise RunError(_refused(e)) from e
    except (DataError, DeviceError, ValueError) as e:
        raise RunError(str(e)) from e
    except OSError as e:  # a name that no file can have, a folder that may not be read
        raise RunError(f"{e.filename}: {e.strerror}" if e.filename else str(e)) from e


def _built(run_dir: Path, resolved: Resolved, resumed: bool, logger: Any) -> Any:
    settings = resolved.settings

    def make() -> Any:
        algorithm = build(resolved, logger)
        if distributed.rank() == 0:
            _save_split(run_dir / SPLIT_FILE, algorithm, resumed)
        return algorithm

    try:
        return _said(make)
    except ModuleNotFoundError as e:
        raise RunError(f"{settings.algorithm} needs {e.name}, which is not installed: pip install {e.name}") from e
    except NotImplementedError as e:
        what = f"{settings.algorithm} cannot be built over net {settings.net} on {settings.dataset}"
        raise RunError(f"{what}: USB's class does not support it; the README's table of algorithms says more") from e


def _warm_caches(resolved: Resolved, logger: Any) -> None:
    args = Namespace(**resolved.as_dict())
    with _stdout_to(logger):
        _said(lambda: read_source(args))


def _refuse_absent_loggers(settings: Any) -> None:
    absent = [p for p in ("wandb", "aim") if getattr(settings, f"use_{p}") and find_spec(p) is None]
    if absent:
        raise RunError("\n".join(f"--use_{p}: {p} is not installed: pip install {p}" for p in absent))


@contextlib.contextmanager
def _signals(algorithm: Any) -> Iterator[None]:
    import threading

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with algorithm.stop_on_signals():
        yield


def _resume_command(command: Sequence[str], has_checkpoint: bool = False) -> str:
    """The command line that continues a run: the same, with ``--resume`` in place of how it was begun.

    Args:
        has_checkpoint: of its own, which it goes on from, and no longer from the one that ``--load_path`` named.
    """
    dropped = ["--overwrite", "-o", "--resume", *(["--load_path", "--load-path"] if has_checkpoint else [])]
    words: list[str] = []
    if distributed.world_size() > 1:
        here, machines = os.environ.get("LOCAL_WORLD_SIZE", "1"), os.environ.get("GROUP_WORLD_SIZE", "1")
        words = ["torchrun", "--standalone", f"--nproc_per_node={here}"] if machines == "1" else ["torchrun", "..."]
        if command and command[0] != "train.py":
            words += ["-m", "muscle_plugin.cli"]
            command = command[1:]
    elif command and command[0] == "train.py":
        words = ["python"]
    of_dropped_flag = False
    for word in command:
        flag = word.partition("=")[0]
        if flag in dropped:
            of_dropped_flag = "=" not in word
        elif of_dropped_flag and not word.startswith("-"):
            of_dropped_flag = False
        else:
            of_dropped_flag = False
            words.append(word)
    return shlex.join([*words, "--resume"])


def build(resolved: Resolved, logger: Any = None, source: Any = None) -> Any:
    """The algorithm object of resolved settings, ready to train; nothing is written to disk.

    Args:
        source: a :class:`muscle_plugin.data.sources.Source` to take in place of the data set's files.

    Raises:
        DataError, DeviceError, ValueError: the data, the device or the net cannot be had.
    """
    from muscle_plugin.algorithms.compose import algorithm_class

    settings = resolved.settings
    args = Namespace(**resolved.as_dict())
    args.imb_algorithm, args.source = None, source
    with memory_for("the images and nets", LESS):
        with _stdout_to(logger):
            algorithm = algorithm_class(settings.algorithm)(args, builder_of(settings), None, logger)
        _try_net(algorithm, settings)
    return algorithm


def _try_net(algorithm: Any, settings: Any) -> None:
    """Forward two blank images, so that a net and an image size that do not fit are found before training."""
    net = algorithm.model
    blank = torch.zeros(2, algorithm.batches.channels, settings.img_size, settings.img_size, device=algorithm.device)
    was_training = net.training
    net.eval()
    try:
        with torch.no_grad():
            net(blank)
    except (RuntimeError, ValueError) as e:
        if out_of_memory(e):
            raise
        raise ValueError(
            f"net: {settings.net} cannot take images of {settings.img_size} x {settings.img_size}: {first_line(e)}"
        ) from e
    net.train(was_training)


# ------------------------------------------------------------------------------------------------------- run directory


def _save_split(path: Path, algorithm: Any, resumed: bool) -> None:
    """Write which images are labelled; a run that goes on must find the same ones.

    Raises:
        DataError: the images or their labels have changed since the run began.
    """
    args, source, split = algorithm.args, algorithm.source, algorithm.split
    if resumed and path.is_file():
        before = read_split(path, source, args.include_lb_to_ulb)
        if not torch.equal(before.labelled, split.labelled):
            raise DataError(f"{path}: this run began with other labelled images than its settings give now")
        return
    write_split(path, split, source, dataset=args.dataset, seed=split_seed(args))


def _prepare_directory(run_dir: Path, resolved: Resolved) -> list[Path]:
    """Create the run directory, or find the checkpoints to resume from, the newest first. Deletes only with ``overwrite``."""
    settings = resolved.settings
    _said(lambda: finish_move(run_dir / LATEST, earlier_checkpoints(run_dir, settings.keep_checkpoints - 1)))
    checkpoints = checkpoints_or_refusal(run_dir, resolved)
    if settings.overwrite and not checkpoints and is_worth_keeping(run_dir):
        _said(lambda: shutil.rmtree(run_dir))
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise RunError(f"{run_dir}: cannot be created: {e.strerror}") from None
    return checkpoints


def _refuse_links(run_dir: Path) -> None:
    """Refuse to go on writing in files that lie elsewhere: whoever made the folder may have chosen them."""
    for name in ("log.txt", "metrics.jsonl", "tensorboard"):
        path = run_dir / name
        right = path.is_dir if name == "tensorboard" else path.is_file
        if path.is_symlink() or (path.exists() and not right()):
            kind = "a link" if path.is_symlink() else "no folder" if name == "tensorboard" else "no file"
            raise RunError(f"{path}: is {kind}, and is not written to; delete it")


@contextlib.contextmanager
def _log_file(run_dir: Path) -> Iterator[logging.Logger]:
    """A logger that writes to ``log.txt`` only; older lines go to ``log.txt.1``, then ``.2``, then nowhere."""
    logger = logging.Logger(str(run_dir))  # not in logging's tree: no handler of another library prints it
    handler = logging.handlers.RotatingFileHandler(
        run_dir / "log.txt", maxBytes=LOG_BYTES, backupCount=2, encoding="utf-8"
    )
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk is reported of other files
    handler.setFormatter(logging.Formatter("[%(asctime)s %(levelname)s] %(message)s"))
    logger.addHandler(handler)
    try:
        yield logger
    finally:
        with contextlib.suppress(OSError):
            handler.close()


@contextlib.contextmanager
def _stdout_to(logger: Any) -> Iterator[None]:
    """USB prints from inside its classes; its words go to the log, as do warnings, each once."""
    seen: set[str] = set()

    def warned(message: Any, *_: Any, **__: Any) -> None:
        text = str(message)
        if logger is not None and text not in seen and len(seen) < LOGGED_WARNINGS:
            seen.add(text)
            logger.warning(text)

    class Lines(io.TextIOBase):
        def write(self, text: str) -> int:
            if logger is not None and text.strip():
                logger.info(text.rstrip())
            return len(text)

    with contextlib.redirect_stdout(Lines()), warnings.catch_warnings():
        warnings.showwarning = warned
        yield


if __name__ == "__main__":
    sys.exit("run `python train.py` or `muscle-plugin train`")
