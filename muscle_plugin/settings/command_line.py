"""Settings as flags of a command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from muscle_plugin.registry.catalogue import base_algorithms
from muscle_plugin.settings.resolve import load_plugins
from muscle_plugin.settings.schema import WITHOUT_EFFECT, MuscleSettings, RunSettings, known_keys
from muscle_plugin.settings.sources import Layer, config_names, find_config, read_yaml
from muscle_plugin.text import did_you_mean, shown

#: USB's flags with one dash.
SHORT_FLAGS = {
    "save_name": "-sn", "num_labels": "-nl", "batch_size": "-bsz", "algorithm": "-alg", "dataset": "-ds",
    "num_classes": "-nc", "overwrite": "-o",
}  # fmt: skip
#: What a flag without a value means, where that is not ``true``.
_ALONE = {"resume": "yes", "plugins": True}


def _load_named_plugins(argv: Sequence[str]) -> None:
    """Import the plugins that a command line names, before it is parsed: their settings are flags of it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--c", "--config", dest="c", nargs="?")
    parser.add_argument("--plugins", nargs="?", const=True)
    options, rest = parser.parse_known_args(argv)
    if options.plugins is True:
        known = config_names()
        for word in [options.c] if options.c else rest:
            if options.c or word.endswith((".yaml", ".yml")) or word in known:
                load_plugins(read_yaml(find_config(word)), True)
    elif options.plugins is not None:
        load_plugins([], options.plugins)


def add_options_of_net(parser: argparse.ArgumentParser) -> None:
    """Options of a command that uses a trained net: ``--plugins``, which goes to :func:`load_plugins`, and the file of a frozen
    backbone's weights."""
    parser.add_argument(
        "--plugins", metavar="FILE", help="of a net of your own: the Python file, or module, that adds it"
    )
    parser.add_argument(
        "--pretrain_path", "--pretrain-path", metavar="FILE", type=Path,
        help="weights of the backbone, of a run with tune head, norm or lora [where the run had them]",
    )  # fmt: skip


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Add every setting as a flag, by USB's names and short names; :func:`resolve` checks the values later."""
    parser.add_argument(
        "--c", "--config", dest="c", metavar="FILE",
        help="YAML file of settings, or the name of one of benchmark_configs; the word alone, without --c, will do",
    )  # fmt: skip
    parser.add_argument("--print-config", action="store_true", help="show the resolved settings and stop")
    for models, model in (("every run", RunSettings), ("muscle and muscle_<base>", MuscleSettings)):
        group = parser.add_argument_group(f"settings of {models}")
        for name, info in model.model_fields.items():
            kind = bool if "bool" in str(info.annotation) else info.annotation
            _add(group, name, info.description or "", info.default, kind)
    group = parser.add_argument_group("settings of USB's algorithms (defaults differ; --print-config shows them)")
    algorithms = base_algorithms().values()
    for name in sorted(known_keys() - RunSettings.model_fields.keys() - MuscleSettings.model_fields.keys()):
        having = {a.name: x for a in algorithms for x in a.arguments if x.name == name}
        last, names = list(having.values())[-1], ", ".join(having)
        text = f"{last.help} ({names})" if last.help else names
        _add(group, name, text, last.default if len(having) == 1 else None, last.type)


def _add(group: argparse._ArgumentGroup, name: str, text: str, default: object, kind: object) -> None:
    flags = ([SHORT_FLAGS[name]] if name in SHORT_FLAGS else []) + [f"--{name}"]
    text = text.replace("%", "%%")
    if get_origin(kind) is Literal:
        text += f" ({', '.join(get_args(kind))})"
    if default not in (None, "", ()):
        text += f" [{default}]"
    alone: dict[str, Any] = {"nargs": "?", "const": _ALONE.get(name, True)} if kind is bool or name in _ALONE else {}
    group.add_argument(*flags, dest=name, default=argparse.SUPPRESS, metavar="X", help=text, **alone)


def parse_command_line(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, Layer, list[str]]:
    """Parse a command line, to which every setting is added, into its arguments, the layer of settings among them, and a fault
    per unknown flag; plugins that it names are imported."""
    _load_named_plugins(argv)
    _add_settings(parser)
    known = known_keys()
    taken = {*known, *WITHOUT_EFFECT}
    for name in WITHOUT_EFFECT:
        parser.add_argument(f"--{name}", nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    namespace, rest = parser.parse_known_args([_underscored(word, taken) for word in argv])
    layer = Layer("command line", {k: v for k, v in vars(namespace).items() if k in taken})
    faults = []
    for word in rest:
        if word.startswith("-") and not _is_number(word):
            name = word.lstrip("-").partition("=")[0]
            faults.append(
                f"{shown(word.partition('=')[0])} is not a setting{did_you_mean(name, {*known, *vars(namespace)})}"
            )
        elif faults:
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
