"""Algorithms, data sets and nets of one's own, without a change to this package.

A plugin is a Python file, or a module that can be imported, named by ``--plugins``. What it registers is then known by
name as this package's own is: in settings, on the command line, to ``muscle_<name>``. It registers

* an algorithm with USB's own decorator, ``@ALGORITHMS.register("mine")`` on a class written for USB;
* a data set with :func:`dataset`, on a function that returns :class:`Images`;
* a net with :func:`net`, on a function that returns an ``nn.Module``.

``docs/tutorials/`` has one page for each. Importing this module loads neither torch nor USB.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from muscle_plugin.errors import PluginError
from muscle_plugin.registry.extension import Images, dataset, net
from muscle_plugin.registry.plugins import load_all, located
from muscle_plugin.settings.schema import MuscleSettings

__all__ = ["Images", "PluginError", "USBNet", "dataset", "load", "net"]  # noqa: F822


def load(plugins: str | Path | Iterable[str | Path]) -> None:
    """Import plugins, files (relative to the working folder) or modules, and make known what they register.

    It runs their code. One that was loaded before is not loaded again.

    Raises:
        PluginError: there is no such plugin, importing it fails, or what it registers cannot be used.
    """
    given = str(plugins) if isinstance(plugins, (str, Path)) else [str(p) for p in plugins]
    load_all(located(given, Path.cwd()), MuscleSettings.model_fields)


def __getattr__(name: str) -> Any:
    if name == "USBNet":  # it loads torch
        from muscle_plugin.nets.base import USBNet

        return USBNet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
