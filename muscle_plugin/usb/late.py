"""Packages that USB imports and that training on images never calls: imported when they are used, if ever.

USB (0.3.2 and git main) imports its loggers, audio and language parts as soon as it is imported, which takes a quarter of its
start-up time, and fails where one of them is not installed or cannot be loaded (a torchaudio made for another torch, an aim for
another protobuf). Only import statements in USB's modules get a stand-in, and nothing enters ``sys.modules``: other libraries
look there, or call ``find_spec``, to learn what is installed.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from muscle_plugin.usb.patches import replaced

#: What USB imports at once and training on images does not need.
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


class _Name:
    """What ``from module import name`` gives; imported once it is called, inherited from or looked into."""

    def __init__(self, module: str, name: str) -> None:
        self.__dict__.update(_module=module, _name=name)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # what the machinery of imports and types looks for
            raise AttributeError(attribute)
        return getattr(_used(self._module, self._name), attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _used(self._module, self._name)(*args, **kwargs)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        """The real class, or one that cannot be instantiated where there is none."""
        try:
            return (_used(self._module, self._name),)
        except ImportError as e:
            reason = str(e)

        def refuse(*_: Any, **__: Any) -> None:
            raise ImportError(reason)

        return (type(self._name, (), {"__init__": refuse, "__module__": self._module}),)


class _Module:
    """What ``import module`` gives: while USB is being imported its attributes are :class:`_Name`, later the real ones."""

    def __init__(self, name: str) -> None:
        self.__dict__.update(_module=name, _importing=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(self._module, name) if self._importing else _used(self._module, name)


@contextmanager
def imported_when_used(importer: str, packages: tuple[str, ...] = NOT_NEEDED) -> Iterator[None]:
    """Within it, modules of the package ``importer`` get stand-ins for what they import of ``packages``, unless it is imported
    already."""
    real, made = builtins.__import__, list[_Module]()

    def import_(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Any = (),
        level: int = 0,
    ) -> Any:
        package, asking = name.partition(".")[0], str((globals or {}).get("__name__")).partition(".")[0]
        if level or asking != importer or package not in packages or sys.modules.get(name):
            return real(name, globals, locals, fromlist, level)
        made.append(_Module(name if fromlist else package))
        return made[-1]

    try:
        with replaced((builtins, "__import__", import_)):
            yield
    finally:
        for module in made:
            module.__dict__["_importing"] = False
