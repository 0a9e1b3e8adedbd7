"""How to resume a run that has stopped: the command, and the words with which its errors say so."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from muscle_plugin.distributed import world_size
from muscle_plugin.errors import DeviceError, Interrupted, RunError, WriteError
from muscle_plugin.run_files import LATEST, saved_checkpoints
from muscle_plugin.settings.resolve import Resolved


def resume_command(command: Sequence[str], resolved: Resolved, from_own: bool) -> str:
    """The command line that resumes a run: the same, with ``--resume`` in place of how it was begun.

    Args:
        from_own: from a checkpoint that the run itself has written, no longer from the one that ``load_path`` names.
    """
    words = list(command)
    if world_size() > 1:
        here, machines = os.environ.get("LOCAL_WORLD_SIZE", "1"), os.environ.get("GROUP_WORLD_SIZE", "1")
        if words and words[0] != "train.py":
            words[:1] = ["-m", "muscle_plugin.cli"]
        words[:0] = ["torchrun", "--standalone", f"--nproc_per_node={here}"] if machines == "1" else ["torchrun", "..."]
    elif words and words[0] == "train.py":
        words.insert(0, "python")
    of_load_path = ("--load_path", "--load-path") if from_own else ()
    words = _without(words, ("--overwrite", "-o", "--resume", *of_load_path))
    if from_own and resolved.settings.load_path and resolved.sources.get("load_path") != "command line":
        words += ["--load_path", "None"]  # a configuration names it
    return shlex.join([*words, "--resume"])


def _without(command: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Leave flags and their values out of a command."""
    words: list[str] = []
    value_follows = False
    for word in command:
        name, equals, _ = word.partition("=")
        if name in flags:
            value_follows = not equals
        elif value_follows and not word.startswith("-"):
            value_follows = False
        else:
            value_follows = False
            words.append(word)
    return words


@contextlib.contextmanager
def saying_how_to_resume(run_dir: Path, resolved: Resolved, command: Sequence[str]) -> Iterator[None]:
    """Add the command that resumes the run to the errors after which it can be resumed."""
    before = _newest(run_dir)
    try:
        yield
    except (Interrupted, WriteError, DeviceError) as e:
        from_own = bool(saved_checkpoints(run_dir)) and (not resolved.settings.load_path or _newest(run_dir) != before)
        again = resume_command(command, resolved, from_own)
        if isinstance(e, Interrupted):
            raise Interrupted(f"{e}\nto resume: {again}") if from_own else e from None
        if isinstance(e, WriteError):
            saved = "the checkpoints before it are whole" if from_own else "there is no checkpoint yet"
            raise RunError(f"{e}; {saved}. To resume: {again}") from e
        less = "also with another --device, --data_on or --eval_batch_size"
        saved = (
            f"the last checkpoint is whole: {again} resumes from it, {less}"
            if from_own
            else "there is no checkpoint yet"
        )
        raise DeviceError(f"{e}; {saved}") from e


def _newest(run_dir: Path) -> tuple[int, int] | None:
    """What tells the newest checkpoint from one before it."""
    with contextlib.suppress(OSError):
        found = (run_dir / LATEST).stat()
        return found.st_ino, found.st_mtime_ns
    return None
