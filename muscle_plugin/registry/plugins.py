"""Finds and imports the plugins that a user names; see :mod:`muscle_plugin.extend`.

Importing runs code, so only the command line, or the caller of a function, can name what is imported: a file of settings
may say which plugins it wants, but cannot have them run (SECURITY.md). Torch and USB are loaded with the first plugin.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from muscle_plugin.errors import PluginError
from muscle_plugin.registry.catalogue import MUSCLE, NOT_HOSTED, PLUGIN_ALGORITHMS, Algorithm, Argument, base_algorithms
from muscle_plugin.registry.names import DATASETS, PLUGIN_DATASETS, PLUGIN_NETS, STEP_PARAMETERS
from muscle_plugin.text import fault_in, shown

_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
#: What a name may be: it becomes a flag's value and part of folder names.
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
#: Types of an algorithm's arguments, by name: USB's for a truth value is a function.
_TYPES: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool, "str2bool": bool}
#: Plugins that were loaded, as :func:`located` returns them.
_loaded: set[str] = set()
#: Called after a plugin was loaded, by what has to make its algorithms known elsewhere.
after_loading: list[Callable[[], None]] = []


def located(value: object, folder: str | Path) -> tuple[str, ...]:
    """The plugins of a setting, a list or a text with commas: files, relative to ``folder``, as absolute paths; modules as
    they are. A PluginError if one names neither."""
    if value is None:
        return ()
    words = value.split(",") if isinstance(value, str) else value
    if not isinstance(words, (list, tuple)) or not all(isinstance(w, str) for w in words):
        raise PluginError(f"names of files or modules are expected, got {shown(value)}")
    found: list[str] = []
    for word in filter(None, map(str.strip, words)):
        if _is_file(word) and word.isprintable():
            found.append(os.path.abspath(os.path.join(folder, os.path.expanduser(word))))
        elif _MODULE.fullmatch(word):
            found.append(word)
        else:
            raise PluginError(f"{shown(word)} is neither a Python file (its name ends in .py) nor a module's name")
    return tuple(dict.fromkeys(found))


def _is_file(word: str) -> bool:
    return word.endswith(".py")


def place_of(thing: object) -> str:
    """The file that defines a function or class, or the name of its module."""
    module = getattr(thing, "__module__", None) or "?"
    return str(getattr(sys.modules.get(module), "__file__", None) or module)


def fingerprints(plugins: Iterable[str]) -> dict[str, str | None]:
    """SHA-256 of each plugin's file (of a package: of its ``__init__.py``); None where it has none that can be read."""
    files = {w: w if _is_file(w) else getattr(sys.modules.get(w), "__file__", None) for w in plugins}
    readable = {w: Path(f) for w, f in files.items() if f and os.access(f, os.R_OK)}
    return {w: hashlib.sha256(readable[w].read_bytes()).hexdigest() if w in readable else None for w in files}


def load_all(plugins: Iterable[str], reserved: Collection[str]) -> None:
    """Import plugins that :func:`located` returned, in this order, and make known what they register; ``reserved`` are the
    settings that no algorithm may declare."""
    for word in plugins:
        if word not in _loaded:
            _load(word, reserved)
            _loaded.add(word)


def _load(word: str, reserved: Collection[str]) -> None:
    try:
        found = os.path.isfile(word) if _is_file(word) else word in sys.modules or importlib.util.find_spec(word)
    except (ModuleNotFoundError, ValueError):  # of a package that would hold it
        found = False
    except Exception as e:
        raise PluginError(fault_in(e, None, word)) from e
    if not found:
        raise PluginError(f"{word}: no such file or module; a file's name ends in .py")
    known: dict[str, Any] = {}
    of_usb: dict[str, Any] = {}
    if importlib.util.find_spec("semilearn"):  # a plugin's net alone can be used without it
        known = {**base_algorithms(), **dict.fromkeys(NOT_HOSTED)}
        # loads torch, and USB: some versions cannot be imported by anything but this module
        from muscle_plugin.usb.names import AlgorithmBase, registered

        of_usb = registered()
    tables: tuple[dict[str, Any], ...] = (of_usb, PLUGIN_ALGORITHMS, PLUGIN_DATASETS, PLUGIN_NETS, DATASETS)
    before = [dict(t) for t in tables]
    try:
        try:
            if _is_file(word):
                _import_file(word)
            else:
                importlib.import_module(word)
        except PluginError:
            raise
        except (Exception, SystemExit) as e:
            raise PluginError(fault_in(e, word if _is_file(word) else None, word)) from e
        for name, cls in of_usb.items():
            changed = cls is not before[0].get(name)
            if changed and name in known:
                owner = PLUGIN_ALGORITHMS[name].class_name if name in PLUGIN_ALGORITHMS else "USB or this package"
                raise PluginError(f"{place_of(cls)}: algorithm {name!r}: {owner} has one of this name; take another")
            # a module may have been imported earlier
            if name not in known and (changed or f"{getattr(cls, '__module__', '')}.".startswith(f"{word}.")):
                PLUGIN_ALGORITHMS[name] = _entry(name, cls, AlgorithmBase, reserved)
    except BaseException:
        for table, content in zip(tables, before, strict=True):
            table.clear()
            table.update(content)
        raise
    for tell in after_loading:
        tell()


def _import_file(path: str) -> None:
    """Import a file under a name that no other module has."""
    name = f"_muscle_plugin_of_{hashlib.sha256(path.encode(errors='surrogateescape')).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def _entry(name: object, cls: object, base: Any, reserved: Collection[str]) -> Algorithm:
    """The registry entry of a plugin's class, or a PluginError if it cannot be hosted; ``base`` is USB's."""
    what = f"{place_of(cls)}: algorithm {name!r}"
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise PluginError(f"{what}: a name has letters, digits and _, and begins with a letter")
    if name == MUSCLE or name.startswith(MUSCLE + "_"):
        raise PluginError(f"{what}: muscle_<name> is made of every algorithm by itself; take a name without it")
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise PluginError(f"{what}: a class that inherits from semilearn's AlgorithmBase is expected, got {shown(cls)}")
    if hasattr(cls, "usb_name"):  # of Host alone
        raise PluginError(f"{what}: {cls.__name__} inherits from Host, which is added automatically; leave it out")
    train_step: Any = getattr(cls, "train_step", None)
    if train_step is base.train_step:
        raise PluginError(f"{what}: {cls.__name__} has no train_step")
    views = list(inspect.signature(train_step).parameters.values())[1:]
    for view in views:
        by_name = view.kind in (view.POSITIONAL_OR_KEYWORD, view.KEYWORD_ONLY)
        if view.name not in STEP_PARAMETERS or not by_name:
            raise PluginError(
                f"{what}: train_step asks for {view}; it must name the views that it takes one by one, of those that this"
                f" package makes: {', '.join(STEP_PARAMETERS)}"
            )
    class_name = f"{cls.__name__} of {place_of(cls)}"
    return Algorithm(name, class_name, tuple(v.name for v in views), _arguments(what, cls, reserved))


def _arguments(what: str, cls: Any, reserved: Collection[str]) -> tuple[Argument, ...]:
    what = f"{what}: get_argument"
    try:
        declared = list(cls.get_argument())
    except Exception as e:
        raise PluginError(fault_in(e, place_of(cls), what)) from e
    found = []
    for a in declared:
        try:
            name, kind, default = str(a.name).lstrip("-"), _TYPES.get(a.type.__name__), a.default
        except AttributeError:
            raise PluginError(f"{what} returns a list of SSL_Argument, got {shown(repr(a))} in it") from None
        if not NAME.fullmatch(name) or name in reserved:
            raise PluginError(f"{what}: --{shown(name)} must have letters, digits and _, and be no setting of MUSCLE")
        if type(default) is int and kind is float:
            default = float(default)
        if kind is None or type(default) is not kind:
            raise PluginError(
                f"{what}: --{name}: expected int, float, str or str2bool and a default of this type, got {a.type} and"
                f" {default!r}"
            )
        found.append(Argument(name, kind, default, str(getattr(a, "help", "") or "")))
    return tuple(found)
