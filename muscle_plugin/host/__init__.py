"""Runs any USB algorithm class unchanged, on a CPU or one GPU, with exact resume."""

from muscle_plugin.host.host import Host

__all__ = ["Host"]
