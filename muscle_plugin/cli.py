"""The command line: ``muscle-plugin train ...``; ``python train.py ...`` is the same as ``muscle-plugin train``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from muscle_plugin.version import __version__

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def _fail(lines: Sequence[str]) -> int:
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    return EXIT_BAD_INPUT


def train_command(argv: Sequence[str], prog: str) -> int:
    """Resolve the settings and train. Returns the exit status: 0 done, 2 bad input, 130 interrupted."""
    from muscle_plugin import config

    parser = argparse.ArgumentParser(
        prog=prog,
        allow_abbrev=False,
        description="Train a USB algorithm, or MUSCLE composed with one.",
        epilog="Command line over YAML over defaults. Example: --c benchmark_configs/muscle_fixmatch_digits_10.yaml",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120),
    )
    if not argv:
        example = "--c benchmark_configs/muscle_fixmatch_digits_10.yaml"
        return _fail([f"give a configuration ({prog} {example}) or settings; --help lists them"])
    try:
        config.add_arguments(parser)
        options, layer, faults = config.parse_command_line(parser, argv)
        layers = config.read_yaml(Path(options.c)) if options.c else []
        try:
            resolved = config.resolve([*layers, layer])
        except config.ConfigError as e:
            raise config.ConfigError([*faults, *e.faults]) from None
        if faults:
            raise config.ConfigError(faults)
    except config.ConfigError as e:
        return _fail(e.faults)
    except config.CatalogueError as e:
        return _fail([str(e)])
    for notice in resolved.notices:
        print(f"note: {notice}", file=sys.stderr)
    if options.print_config:
        print(resolved.to_yaml(), end="")
        return 0

    try:
        from muscle_plugin.run import Interrupted, RunError, train
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    try:
        train(resolved, command=[prog, *argv])
    except RunError as e:
        return _fail(str(e).splitlines())
    except Interrupted as e:
        print(f"\n{e}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:  # while starting, or a second Ctrl-C
        print("\nstopped at once; if there is a checkpoint, --resume goes on from it", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def demo_command(argv: Sequence[str], prog: str) -> int:
    """Run the demonstration on scikit-learn's digits."""
    from muscle_plugin.demo import main as demo

    return demo(argv, prog)


COMMANDS = {
    "train": (train_command, "train one configuration"),
    "demo": (demo_command, "train MUSCLE and its baselines on 10 labelled digits, with table and pictures"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``muscle-plugin``."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]][0](words[1:], f"muscle-plugin {words[0]}")
    parser = argparse.ArgumentParser(prog="muscle-plugin", description="MUSCLE for USB (arXiv 2012.00150).")
    parser.add_argument("--version", action="version", version=f"muscle-plugin {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    parser.parse_args(words)
    parser.print_help()
    return 0 if not words else EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
