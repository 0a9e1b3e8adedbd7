"""Memory of a process, read from the system. Imports nothing that takes time, for benchmarks that time imports."""

from __future__ import annotations

from pathlib import Path


def forget_peak() -> None:
    """Let this process's peak count from here."""
    Path("/proc/self/clear_refs").write_text("5")


def memory(key: str) -> int:
    """VmRSS or VmHWM (its peak) of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status; this benchmark needs Linux")
