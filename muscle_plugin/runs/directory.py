"""What lies in a run's directory, and whether a run may begin or go on there. Nothing here imports torch."""

from __future__ import annotations

from muscle_plugin.errors import RunError

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from muscle_plugin.errors import ConfigError
from muscle_plugin.settings.resolve import Resolved, began_otherwise, differing_settings
from muscle_plugin.files import read_json
from muscle_plugin.run_files import CONFIG_FILE, FAILURE_FILE, LATEST, SPLIT_FILE, saved_checkpoints



#: Locks that this process holds. A child that is forked (a loader's worker) must not keep them when this process is killed.
_held: set[Any] = set()


def _let_go() -> None:
    for lock in _held:
        lock.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the run for this process: another one that wants it is refused. The lock ends with the process, however."""
    try:
        import fcntl
    except ImportError:  # not on this system
        yield
        return
    try:
        place = run_dir.resolve()  # by whatever links it was named
        place.parent.mkdir(parents=True, exist_ok=True)
        # a link that lies there is not followed: what it leads to is not ours
        lock = os.fdopen(
            os.open(place.parent / f".{place.name}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+"
        )
    except OSError as e:
        raise RunError(f"{run_dir}: cannot be created: {e.strerror}") from None
    except RuntimeError as e:  # a link that leads to itself
        raise RunError(f"{run_dir}: cannot be created: {e}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                f"{run_dir} is being written by another process; wait for it, or give another --save_name"
            ) from None
        _held.add(lock)
        try:
            yield
        finally:
            _held.discard(lock)


def checkpoints_or_refusal(run_dir: Path, resolved: Resolved) -> list[Path]:
    """The checkpoints from which these settings have a run go on, the newest first; none: it begins. Nothing is changed.

    Raises:
        RunError: it may do neither.
    """
    settings = resolved.settings
    latest = Path(settings.load_path) if settings.load_path else run_dir / LATEST
    checkpoints = [p for p in [latest] if p.is_file()] if settings.load_path else saved_checkpoints(run_dir)
    if settings.resume != "no" and checkpoints:
        _refuse_other_settings(run_dir / CONFIG_FILE, resolved)
        return checkpoints
    kept = is_worth_keeping(run_dir)
    if settings.resume == "yes":
        start = (
            f"--overwrite in place of --resume deletes {run_dir} and starts"
            if kept and not settings.load_path
            else "leave out --resume to start"
        )
        raise RunError(f"{latest}: no checkpoint to resume from; {start} this run")
    if kept and not settings.overwrite and settings.resume != "auto":
        raise RunError(
            f"{run_dir} already holds {_describe(run_dir, checkpoints)}--overwrite deletes it, another --save_name keeps both"
        )
    if kept and settings.overwrite and not (run_dir / CONFIG_FILE).is_file():
        raise RunError(f"{run_dir} is not a run directory (it has no {CONFIG_FILE}), so --overwrite leaves it alone")
    if kept and settings.overwrite and run_dir.is_symlink():
        raise RunError(f"{run_dir} is a link, so --overwrite leaves it alone; name {run_dir.resolve()} itself")
    return []


def is_worth_keeping(run_dir: Path) -> bool:
    """Whether something is there, other than a run of ours that ended before its first checkpoint."""
    if not run_dir.is_dir() or not any(run_dir.iterdir()):
        return False
    without_checkpoint = {CONFIG_FILE, SPLIT_FILE, FAILURE_FILE, "log.txt", "environment.json", "metrics.jsonl"}
    names = {p.name for p in run_dir.iterdir()} - {"result.json", "tensorboard"}
    return not (names <= without_checkpoint and CONFIG_FILE in names and not _steps_of(run_dir))


def _steps_of(run_dir: Path) -> int:
    """Steps that a run's result counts; a run whose checkpoints were deleted still has them."""
    try:
        return int(read_json(run_dir / "result.json")["steps"])
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, KeyError, TypeError):
        return 1  # not to be read: better kept


def _describe(run_dir: Path, checkpoints: Sequence[Path]) -> str:
    """What is in a folder, and how it goes on if it can: the beginning of a list of ways out."""
    goes_on = "; --resume goes on with it, " if checkpoints else "; "
    try:
        result = read_json(run_dir / "result.json")
        steps = f"(step {result['steps']} of {result['num_train_iter']})"
        return f"a finished run {steps}; " if result["complete"] else f"a cut-off run {steps}{goes_on}"
    except (OSError, ValueError, KeyError):
        return f"files{goes_on}"


def _refuse_other_settings(saved_file: Path, resolved: Resolved) -> None:
    """A run goes on with the settings it began with, but for those that change no result."""
    if not saved_file.is_file():
        return
    try:
        differing = differing_settings(saved_file, resolved)
    except ConfigError as e:
        raise RunError(f"{saved_file}: the settings of the run to resume cannot be read: {e}") from None
    if differing:
        raise RunError(f"{saved_file.parent}: {began_otherwise(differing)}. Give it another --save_name or --save_dir")
