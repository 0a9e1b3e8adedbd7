"""Settings as flags of a command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, get_origin

from muscle_plugin.text import did_you_mean, shown
from muscle_plugin.registry.catalogue import (
    base_algorithms,
)
from muscle_plugin.settings.resolve import load_plugins
from muscle_plugin.settings.schema import WITHOUT_EFFECT, MuscleSettings, RunSettings, _known_keys
from muscle_plugin.settings.sources import Layer, config_names, find_config, read_yaml

_SHORT_FLAGS = {
    "save_name": "-sn", "num_labels": "-nl", "batch_size": "-bsz", "algorithm": "-alg", "dataset": "-ds",
    "num_classes": "-nc", "overwrite": "-o",
}  # fmt: skip


_FLAGS_WITHOUT_VALUE: dict[str, Any] = {"resume": "yes", "plugins": True}


def load_named_plugins(argv: Sequence[str], files_of: Callable[[argparse.Namespace, list[str]], Sequence[str]]) -> None:
    """Import the plugins that a command line names, before it is parsed: their settings are flags of it.

    Args:
        files_of: the configurations that it names, given ``c`` and the words that are no such flag.

    Raises:
        ConfigError: one cannot be had, or a configuration cannot be read.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--c", "--config", dest="c", nargs="?")
    parser.add_argument("--plugins", nargs="?", const=True)
    options, rest = parser.parse_known_args(list(argv))
    if options.plugins is None:
        return
    if options.plugins is not True:
        load_plugins([], options.plugins)
        return
    for word in files_of(options, rest):
        load_plugins(read_yaml(find_config(word)), True)


def named_in(words: Sequence[str]) -> list[str]:
    """Those of the words of a command line that are a configuration's name or file."""
    known = config_names()
    return [w for w in words if w.endswith((".yaml", ".yml")) or w in known]


def add_plugins_of_net(parser: argparse.ArgumentParser) -> None:
    """``--plugins`` of a command that uses a trained net; what it names goes to :func:`load_plugins`."""
    parser.add_argument(
        "--plugins", metavar="FILE", help="of a net of your own: the Python file, or module, that adds it"
    )


# --------------------------------------------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every setting as a flag, USB's names and short names, values checked later by :func:`resolve`."""
    parser.add_argument(
        "--c",
        "--config",
        dest="c",
        metavar="FILE",
        help="YAML file of settings, or the name of one of benchmark_configs; the word alone, without --c, will do",
    )
    parser.add_argument("--print-config", action="store_true", help="show the resolved settings and stop")
    added: set[str] = set()

    def add(group: Any, name: str, description: str | None, default: Any, kind: Any) -> None:
        if name in added:
            return
        added.add(name)
        flags = ([_SHORT_FLAGS[name]] if name in _SHORT_FLAGS else []) + [f"--{name}"]
        text = (description or "").replace("%", "%%")
        if get_origin(kind) is Literal:
            text += f" ({', '.join(get_args(kind))})"
        extra: dict[str, Any] = {}
        if kind is bool or name in _FLAGS_WITHOUT_VALUE:
            extra = {"nargs": "?", "const": _FLAGS_WITHOUT_VALUE.get(name, True)}
        if default not in (None, "", ()):
            text += f" [{default}]"
        group.add_argument(*flags, dest=name, default=argparse.SUPPRESS, metavar="X", help=text, **extra)

    group = parser.add_argument_group("settings of every run")
    for name, info in RunSettings.model_fields.items():
        add(group, name, info.description, info.default, bool if "bool" in str(info.annotation) else info.annotation)
    group = parser.add_argument_group("settings of muscle and muscle_<base>")
    for name, info in MuscleSettings.model_fields.items():
        add(group, name, info.description, info.default, info.annotation)
    by_name: dict[str, list[str]] = {}
    defaults: dict[str, Any] = {}
    for algorithm in base_algorithms().values():
        for a in algorithm.arguments:
            by_name.setdefault(a.name, []).append(algorithm.name)
            defaults[a.name] = a
    group = parser.add_argument_group("settings of USB's algorithms (defaults differ; --print-config shows them)")
    for name, owners in sorted(by_name.items()):
        argument = defaults[name]
        help_text = f"{argument.help} ({', '.join(owners)})" if argument.help else ", ".join(owners)
        add(group, name, help_text, argument.default if len(owners) == 1 else None, argument.type)


def parse_command_line(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, Layer, list[str]]:
    """Parsed arguments, the layer of settings among them, and a fault per unknown flag."""
    known = _known_keys()
    namespace, rest = parser.parse_known_args([_underscored(word, known) for word in argv])
    layer = Layer("command line", {k: v for k, v in vars(namespace).items() if k in known})
    faults = []
    for word in rest:
        if word.startswith("-") and not _is_number(word):
            name, _, value = word.lstrip("-").partition("=")
            if name.replace("-", "_") in WITHOUT_EFFECT:
                layer.values[name.replace("-", "_")] = value
            else:
                faults.append(f"{shown(word.partition('=')[0])} is not a setting{did_you_mean(name, known)}")
        elif faults or set(layer.values) & set(WITHOUT_EFFECT):
            continue  # the value of such a flag, most likely
        elif not (namespace.c or _is_number(word)):
            namespace.c = word
        elif not _is_number(word):
            faults.append(f"give one configuration: {shown(namespace.c)} or {shown(word)}")
        else:
            faults.append(f"unexpected argument {shown(repr(word))}; settings are given as --name value")
    return namespace, layer, faults


def _underscored(word: str, known: set[str]) -> str:
    """``--skip-bad-images`` as ``--skip_bad_images``."""
    name, equals, value = word.partition("=")
    spelled = name[2:].replace("-", "_")
    return f"--{spelled}{equals}{value}" if name.startswith("--") and spelled in known else word


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
