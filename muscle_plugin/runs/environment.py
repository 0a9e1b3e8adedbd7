"""What a run was computed with: versions, git revision, device, command."""

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


def environment(algorithm: Any, command: Sequence[str]) -> dict[str, Any]:
    """Versions, git revision, device and command of a run."""
    names = ("torch", "torchvision", "semilearn", "timm", "numpy", "scikit-learn")
    versions = {n: _version(n) for n in names}
    gpu = torch.cuda.get_device_name(algorithm.device) if algorithm.device.type == "cuda" else None
    return {
        "muscle_plugin": __version__,
        "git_revision": git_revision(),
        "python": platform.python_version(),
        **versions,
        "device": str(algorithm.device),
        "gpu": gpu,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "precision": algorithm.precision,
        "processes": algorithm.args.world_size,
        "parameters": sum(p.numel() for p in algorithm.model.parameters()),
        "command": [_from_here(word) for word in command],
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _from_here(word: str) -> str:
    """A word of a command, its path relative to the working directory if it lies there: records are read on other machines."""
    here = re.escape(os.path.join(os.getcwd(), ""))
    return re.sub(rf"^(--[\w-]+=)?{here}(?=.)", r"\1", word)


#: Of a run's environment: what the rounding of its numbers depends on, and so its weights.
_ROUNDING = ("torch", "gpu", "threads", "compile", "deterministic", "processes")


def _changes(path: Path, now: dict[str, Any]) -> list[str]:
    """Notes on what is other in the environment ``now`` than when the run began, or when it was last continued: files of
    plugins, and what changes rounding."""
    before: dict[str, Any] = {}
    plugins: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        saved = read_json(path)
        for part in (saved, *(saved.get("continuations") or [])):
            plugins |= part.get("plugins") or {}
            before |= part
    notes = [f"plugin {p} has changed since the run began" for p, x in now["plugins"].items() if plugins.get(p, x) != x]
    other = [f"{k} {now[k]} (was {shown(before[k])})" for k in _ROUNDING if before.get(k, now[k]) != now[k]]
    if other:
        notes.append(f"resumed with {', '.join(other)}: no longer bit-identical to an uninterrupted run")
    return notes


def _save_environment(path: Path, now: dict[str, Any], resumed: bool) -> None:
    """Write a run's environment; that of a continuation is added to the first one's list."""
    first = now
    if resumed:
        with contextlib.suppress(OSError, ValueError, TypeError):
            before = read_json(path)
            first = {**before, "continuations": [*(before.get("continuations") or []), now]}
    write_json(path, first)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """The revision of this package's checkout, ``-dirty`` if changed; None when installed from a wheel."""
    here = Path(__file__).resolve().parents[1]
    if not (here.parent / ".git").exists():
        return None
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip()
