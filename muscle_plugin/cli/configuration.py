"""The configuration that a command line asks for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from muscle_plugin.cli import in_first_process
from muscle_plugin.errors import ConfigError
from muscle_plugin.settings.command_line import parse_command_line
from muscle_plugin.settings.resolve import Resolved, load_settings
from muscle_plugin.settings.sources import EXAMPLE
from muscle_plugin.studies.definitions import study_configs
from muscle_plugin.text import one_line


def configuration(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, Resolved] | None:
    """The options and resolved settings of a command line, or None if it only asks to print them."""
    if not argv:
        raise ConfigError([f"give a configuration ({parser.prog} {EXAMPLE}) or settings; --help lists them"])
    options, layer, faults = parse_command_line(parser, argv)
    try:
        if (configs := study_configs(options.c)) and not Path(options.c).is_file():
            advice = f"give one of them ({configs[0]}), or `muscle-plugin sweep {options.c}`"
            raise ConfigError([f"{options.c}: a study of {len(configs)} configurations; {advice}"])
        resolved = load_settings(options.c, **layer.values)
    except ConfigError as e:
        raise ConfigError([*faults, *e.faults]) from None
    if faults:
        raise ConfigError(faults)
    notices = list(resolved.notices)
    if not (options.c or {"algorithm", "dataset"} <= resolved.sources.keys()):
        by_default = [k for k in ("algorithm", "dataset", "net") if k not in resolved.sources]
        s = resolved.settings
        notices.append(
            f"no configuration is named: {s.algorithm} on {s.dataset} with net {s.net} (by default: {', '.join(by_default)})"
        )
    for notice in notices if in_first_process() else ():
        print(f"note: {one_line(notice)}", file=sys.stderr)
    if options.print_config:
        print(resolved.to_yaml(), end="")
        return None
    return options, resolved


def parser_of(prog: str, description: str, example: str) -> argparse.ArgumentParser:
    """The parser of a command that takes settings."""
    return argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [NAME or FILE of a configuration] [--setting value ...]",
        allow_abbrev=False,
        description=description,
        epilog=f"Command line over YAML over defaults. Example: {example}",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120),
    )
