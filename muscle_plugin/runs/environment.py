"""The environment of a run: versions, git revision, device, command."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from muscle_plugin import distributed
from muscle_plugin.files import read_json, write_json
from muscle_plugin.registry.plugins import fingerprints
from muscle_plugin.settings.resolve import Resolved
from muscle_plugin.text import shown
from muscle_plugin.training import Host
from muscle_plugin.version import __version__

PACKAGES = ("torch", "torchvision", "semilearn", "timm", "numpy", "scikit-learn")
#: Entries that rounding, and so the last bits of the weights, depends on.
_ROUNDING = ("torch", "gpu", "threads", "compile", "deterministic", "processes")


def record_environment(
    path: Path, algorithm: Host, resolved: Resolved, command: Sequence[str], resumed: bool
) -> list[str]:
    """Write the environment of a new run, or append that of a resumed one; returns notes on what has changed."""
    now = environment(algorithm, resolved, command)
    before: dict[str, Any] = {}
    if resumed:
        with contextlib.suppress(OSError, ValueError):
            before = read_json(path)
    earlier = before.get("continuations")
    earlier = [x for x in earlier if isinstance(x, dict)] if isinstance(earlier, list) else []
    write_json(path, {**before, "continuations": [*earlier, now]} if before else now)
    return changes([before, *earlier][-1], now)


def environment(algorithm: Host, resolved: Resolved, command: Sequence[str]) -> dict[str, Any]:
    """Collect what a run is computed with."""
    settings, device = resolved.settings, algorithm.device
    here = re.escape(os.path.join(os.getcwd(), ""))
    return {
        "config": resolved.name,
        "muscle_plugin": __version__,
        "git_revision": git_revision(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "precision": algorithm.precision,
        "processes": distributed.world_size(),
        "parameters": sum(p.numel() for p in algorithm.model.parameters()),
        # others read records too: paths are relative to the working directory, if they lie there
        "command": [re.sub(rf"^(--[\w-]+=)?{here}(?=.)", r"\1", word) for word in command],
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "plugins": fingerprints(settings.plugins),
        "compile": settings.compile,
        "deterministic": settings.deterministic,
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Compare the environments of two starts: files of plugins, and what changes rounding."""
    known = before.get("plugins")
    plugins = known if isinstance(known, dict) else {}
    notes = [
        f"plugin {p} has changed since the last start" for p, x in now["plugins"].items() if plugins.get(p, x) != x
    ]
    other = [f"{k} {now[k]} (was {shown(before[k])})" for k in _ROUNDING if before.get(k, now[k]) != now[k]]
    if other:
        notes.append(f"resumed with {', '.join(other)}: no longer bit-identical to an uninterrupted run")
    return notes


def git_revision() -> str | None:
    """The revision of this package's checkout, ``-dirty`` if changed; None when installed from a wheel."""
    checkout = Path(__file__).resolve().parents[2]
    command = ["git", f"--git-dir={checkout / '.git'}", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        out = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
