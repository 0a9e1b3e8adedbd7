"""Packages that USB imports and that training of images never calls: imported when they are used, if they ever are.

USB imports its loggers, its audio and its language parts as soon as it is imported, which costs a quarter of its start, and
fails where one of them is not installed or cannot be loaded (a torchaudio made for another torch, an aim for another
protobuf). Only import statements of USB itself find a stand-in, and nothing enters ``sys.modules``: other libraries ask
there, or by ``find_spec``, what is installed.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

#: What USB (0.3.2 and git main) imports at once and nothing that this package does needs.
NOT_NEEDED = ("aim", "progress", "skimage", "torchaudio", "transformers", "wandb")


def _used(module: str, name: str) -> Any:
    """``name`` of the real module.

    Raises:
        ImportError: the module is not installed, or cannot be loaded.
    """
    package = module.partition(".")[0]
    try:
        real = import_module(module)
    except Exception as e:  # whatever stops it
        if isinstance(e, ModuleNotFoundError) and e.name == package:
            reason = f"which is not installed: pip install {package}"
        else:
            reason = f"which cannot be loaded: {e}"
        raise ImportError(f"{package}.{name} needs {package}, {reason}") from e
    return getattr(real, name)


class LateName:
    """What ``from module import name`` gives; the real one is asked for once it is called, inherited from or looked into."""

    def __init__(self, module: str, name: str) -> None:
        self.__dict__.update(_module=module, _name=name)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # what the machinery of imports and types looks for
            raise AttributeError(attribute)
        return getattr(_used(self._module, self._name), attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _used(self._module, self._name)(*args, **kwargs)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        """The real class; where there is none, a class of which no object can be made."""
        try:
            return (_used(self._module, self._name),)
        except ImportError as e:
            reason = str(e)

        def refuse(*_: Any, **__: Any) -> None:
            raise ImportError(reason)

        return (type(self._name, (), {"__init__": refuse, "__module__": self._module}),)


class LateModule(ModuleType):
    """A module that is imported when it is used: its names while importing are :class:`LateName`, later the real ones."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__dict__["_late"] = True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return LateName(self.__name__, name) if self.__dict__["_late"] else _used(self.__name__, name)


@contextmanager
def imported_when_used(importer: str, packages: tuple[str, ...] = NOT_NEEDED) -> Iterator[None]:
    """Within it, what the modules of ``importer`` import of ``packages``, unless it is imported already, is a
    :class:`LateModule` or its names."""
    real, made = builtins.__import__, list[LateModule]()

    def import_(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> ModuleType:
        package, asking = name.partition(".")[0], str((globals or {}).get("__name__")).partition(".")[0]
        if level or asking != importer or package not in packages or sys.modules.get(name):
            return real(name, globals, locals, fromlist, level)
        made.append(LateModule(name if fromlist else package))
        return made[-1]

    builtins.__import__ = import_
    try:
        yield
    finally:
        builtins.__import__ = real
        for module in made:
            module.__dict__["_late"] = False
