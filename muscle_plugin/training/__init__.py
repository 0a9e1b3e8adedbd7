"""Runs any USB algorithm class unchanged, on a CPU or one GPU, with exact resume."""

from muscle_plugin.training.host import Host

__all__ = ["Host"]
