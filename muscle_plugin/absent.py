"""Packages that USB imports and that training of images never calls, stood in for where they are not installed.

USB imports its loggers, its audio and its language parts as soon as it is imported. Only import statements of USB itself
find a stand-in, and nothing enters ``sys.modules``: other libraries ask there, or by ``find_spec``, what is installed.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

#: Those whose absence stops ``import semilearn`` (0.3.2 and git main) and nothing that this package does.
NOT_NEEDED = ("aim", "progress", "skimage", "torchaudio", "transformers", "wandb")


class StandIn(ModuleType):
    """Any of its names is a class that can be imported or inherited from; making an object of it is an ImportError."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name)
        self.__dict__["__reason"] = reason

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        package, reason = self.__name__.partition(".")[0], self.__dict__["__reason"]

        def refuse(*_: Any, **__: Any) -> None:
            raise ImportError(f"{package}.{name} needs {package}, {reason}")

        return type(name, (), {"__init__": refuse, "__module__": self.__name__})


@contextmanager
def absent_packages_stood_in(importer: str, packages: tuple[str, ...] = NOT_NEEDED) -> Iterator[None]:
    """Within it, what the modules of ``importer`` import of ``packages`` that are not installed, or cannot be loaded (a
    torchaudio made for another torch, an aim for another protobuf), is a :class:`StandIn`."""
    real = builtins.__import__

    def import_(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> ModuleType:
        try:
            return real(name, globals, locals, fromlist, level)
        except Exception as e:  # whatever stops it; it is said when it is used
            package, asking = name.partition(".")[0], str((globals or {}).get("__name__")).partition(".")[0]
            if level or asking != importer or package not in packages:
                raise
            if not isinstance(e, ModuleNotFoundError):
                reason = f"which cannot be loaded: {e}"
            elif e.name == package:
                reason = f"which is not installed: pip install {package}"
            else:
                raise
            return StandIn(name if fromlist else package, reason)

    builtins.__import__ = import_
    try:
        yield
    finally:
        builtins.__import__ = real
