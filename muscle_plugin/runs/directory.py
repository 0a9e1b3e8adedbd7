"""The run directory: what it holds, whether a run may start or resume there, and the lock on it. Imports no torch."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import traceback
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO
from weakref import WeakSet

from muscle_plugin.errors import ConfigError, DamagedError, Interrupted, RunError
from muscle_plugin.files import finish_move, read_json, read_whole, remove_parts, write_json, write_text
from muscle_plugin.run_files import (
    BEST,
    CONFIG_FILE,
    FAILURE_FILE,
    LATEST,
    SPLIT_FILE,
    checkpoint_of,
    earlier_checkpoints,
    saved_checkpoints,
)
from muscle_plugin.settings.resolve import Resolved, began_otherwise, differing_settings

#: Locks of this process. A forked child (a worker of a plugin) must not keep them when this process is killed.
_locks: WeakSet[TextIO] = WeakSet()
os.register_at_fork(after_in_child=lambda: [lock.close() for lock in _locks])


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the run for this process, whatever links name it; the lock ends with the process, even a killed one."""
    try:
        place = run_dir.resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        # a link there is not followed: its target is not ours
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        lock = os.fdopen(os.open(place.parent / f".{place.name}.lock", flags, 0o666), "r+")
    except (OSError, RuntimeError) as e:  # RuntimeError: a link to itself
        raise RunError(f"{run_dir}: cannot be created: {getattr(e, 'strerror', e)}") from None
    _locks.add(lock)
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            other = "is being written by another process; wait for it, or choose another --save_name"
            raise RunError(f"{run_dir} {other}") from None
        yield


def checkpoints_or_refusal(run_dir: Path, resolved: Resolved) -> list[Path]:
    """The checkpoints to resume from, newest first; empty for a new run. A RunError if it may neither start nor resume.

    ``load_path`` names where a run begins: once it has checkpoints of its own it resumes from those, so that the same command
    may be given again after each interruption. Only ``--resume`` with one of the run's own files goes back to that.
    """
    settings, own = resolved.settings, saved_checkpoints(run_dir)
    if settings.resume != "no":
        named = checkpoint_of(Path(settings.load_path)) if settings.load_path else run_dir / LATEST
        inside = os.path.realpath(named.parent) == os.path.realpath(run_dir)
        if not named.is_file() and not (inside and named.name == LATEST):
            raise RunError(f"load_path: {named}: no such file")
        back = settings.load_path and inside and settings.resume == "yes"
        if checkpoints := [named] if named.is_file() and (back or not own) else own:
            _refuse_other_settings(run_dir / CONFIG_FILE, resolved)
            return checkpoints
    kept = is_worth_keeping(run_dir, resolved)
    if kept and settings.overwrite:
        if not (run_dir / CONFIG_FILE).is_file():
            raise RunError(
                f"{run_dir} is not a run directory (it has no {CONFIG_FILE}), so --overwrite leaves it alone"
            )
        if run_dir.is_symlink():
            raise RunError(f"{run_dir} is a link, so --overwrite leaves it alone; name {run_dir.resolve()} itself")
    elif kept:
        what, finished = _description(run_dir)
        if settings.resume != "no":
            ways = f"{what}, but no checkpoint to resume from; --overwrite in place of --resume deletes it"
        else:
            ways = f"{what}; {'--resume continues it, ' if own and not finished else ''}--overwrite deletes it"
        raise RunError(f"{run_dir} already holds {ways}, another --save_name keeps both")
    elif settings.resume == "yes":
        raise RunError(f"{run_dir / LATEST}: no checkpoint to resume from; leave out --resume to start this run")
    return []


def is_worth_keeping(run_dir: Path, resolved: Resolved) -> bool:
    """Whether a run that starts there would replace what somebody may want: a result, a checkpoint, metrics.

    Where ``resume`` allows both, metrics of the same run before its first checkpoint do not count: they come again, and a job
    that was killed must be able to start. Nor do files of others, which only ``overwrite`` would delete.
    """
    names = {p.name for p in run_dir.iterdir() if not p.name.startswith(".")} if run_dir.is_dir() else set()
    fresh = resolved.settings.resume == "no"
    logs = {"log.txt", "environment.json", "metrics.jsonl", "result.json", "tensorboard"}
    others = names - logs - {CONFIG_FILE, SPLIT_FILE, FAILURE_FILE}
    if any(fresh or name.endswith((".pth", ".damaged")) for name in others):
        return True
    logged = "metrics.jsonl" in names and (run_dir / "metrics.jsonl").stat().st_size
    try:
        # a result of some steps is from after a checkpoint, which may have been deleted
        steps = read_json(run_dir / "result.json")["steps"] if "result.json" in names else logged
        return bool(steps or (logged and (fresh or differing_settings(run_dir / CONFIG_FILE, resolved))))
    except (OSError, ValueError, KeyError):
        return True  # unreadable: better kept


def _description(run_dir: Path) -> tuple[str, bool]:
    """What a folder holds, and whether that is a finished run."""
    try:
        result = read_json(run_dir / "result.json")
        kind = "a finished" if result["complete"] else "an unfinished"
        return f"{kind} run (step {result['steps']} of {result['num_train_iter']})", bool(result["complete"])
    except (OSError, ValueError, KeyError):
        return "files", False


def _refuse_other_settings(saved_file: Path, resolved: Resolved) -> None:
    if not saved_file.is_file():
        return
    try:
        differing = differing_settings(saved_file, resolved)
    except ConfigError as e:
        raise RunError(f"{saved_file}: the settings of the run to resume cannot be read: {e}") from None
    if differing:
        raise RunError(f"{saved_file.parent}: {began_otherwise(differing)}. Choose another --save_name or --save_dir")


@contextlib.contextmanager
def prepared(run_dir: Path, resolved: Resolved) -> Iterator[list[Path]]:
    """Lock a run directory and make it ready; yields the checkpoints to resume from, if any. Unless :func:`begin` is called
    within the block, what was there before is there afterwards."""
    settings = resolved.settings
    with run_lock(run_dir):
        _put_back(run_dir)  # after a kill
        finish_move(run_dir / LATEST, earlier_checkpoints(run_dir, settings.keep_checkpoints - 1))
        checkpoints = checkpoints_or_refusal(run_dir, resolved)
        if settings.overwrite and not checkpoints and is_worth_keeping(run_dir, resolved):
            run_dir.rename(_overwritten(run_dir))
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            _refuse_links(run_dir)
            remove_parts(run_dir)
            if not checkpoints:
                _write_settings(run_dir, resolved)
            yield checkpoints
        finally:
            _put_back(run_dir)


def begin(run_dir: Path, resolved: Resolved, resumed: bool) -> None:
    """Call once nothing can refuse the run any more: one that is ``resumed`` gets its settings, and one that is overwritten is
    deleted."""
    if resumed:  # a new one has them
        _write_settings(run_dir, resolved)
    if (overwritten := _overwritten(run_dir)).is_dir():
        deleted = overwritten.with_suffix(".deleted")  # so that a kill puts nothing back that is no longer whole
        shutil.rmtree(deleted, ignore_errors=True)
        shutil.rmtree(overwritten.rename(deleted))


def _write_settings(run_dir: Path, resolved: Resolved) -> None:
    (run_dir / FAILURE_FILE).unlink(missing_ok=True)
    write_text(run_dir / CONFIG_FILE, resolved.to_yaml(leave_out=("resume", "overwrite", "load_path")))


def _overwritten(run_dir: Path) -> Path:
    """Where a run is while another one gets ready to replace it."""
    return run_dir.with_name(f".{run_dir.name}.overwritten")


def _put_back(run_dir: Path) -> None:
    if _overwritten(run_dir).is_dir():
        shutil.rmtree(run_dir, ignore_errors=True)
        _overwritten(run_dir).rename(run_dir)


def _refuse_links(run_dir: Path) -> None:
    """Refuse to append to files elsewhere: whoever made the folder may have chosen them."""
    for name in ("log.txt", "metrics.jsonl", "tensorboard"):
        path = run_dir / name
        right = path.is_dir() if name == "tensorboard" else path.is_file()
        if path.is_symlink() or (path.exists() and not right):
            found = "a link" if path.is_symlink() else "neither file nor folder of a run"
            raise RunError(f"{path}: is {found}, and is not written to; delete it")


def newest_whole(checkpoints: Sequence[Path], named: bool = False) -> tuple[Path, bytes, dict[Path, str]]:
    """The path and the content of the newest undamaged checkpoint, and the faults of the newer ones. ``named``: by the user."""
    damaged: dict[Path, str] = {}
    for path in checkpoints:
        try:
            return path, read_whole(path), damaged
        except DamagedError as e:
            damaged[path] = str(e)
    if named:
        raise RunError(f"load_path: {'; '.join(damaged.values())}")
    best = checkpoints[0].parent / BEST
    lost = f" ({best}, from which --init_from can start another run, would be deleted)" if best.is_file() else ""
    raise RunError(
        f"{'; '.join(damaged.values())}: no checkpoint to resume from is left; --overwrite starts the run anew{lost}"
    )


@contextlib.contextmanager
def failure_file(run_dir: Path, config: str | None) -> Iterator[dict[str, object]]:
    """Write ``failure.json`` if the block fails, with what else is in the mapping that it is given."""
    more: dict[str, object] = {}
    try:
        yield more
    except Interrupted:
        raise
    except Exception as e:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        text = "".join(traceback.format_exception(e))
        failure = {"error": f"{type(e).__name__}: {e}", "at": now, "config": config, "traceback": text}
        with contextlib.suppress(OSError):  # the fault may be the disk
            write_json(run_dir / FAILURE_FILE, {**failure, **more, **getattr(e, "details", {})})
        raise
