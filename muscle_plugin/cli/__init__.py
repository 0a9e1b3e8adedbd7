"""The command line: ``muscle-plugin train ...``; ``python train.py ...`` is the same as ``muscle-plugin train``."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from muscle_plugin.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, Interrupted, UserError
from muscle_plugin.text import first_line, one_line, out_of_memory
from muscle_plugin.version import __version__

#: Name -> the module of this package whose ``main(argv, prog)`` it is, imported when called, and what it does.
COMMANDS = {
    "train": ("cli.train", "train one configuration"),
    "sweep": ("studies.sweep", "train many by name: table1 ... figure3, digits, or any configurations"),
    "report": ("studies.report", "runs as one HTML page and Markdown, beside the paper's tables"),
    "usb-export": ("studies.usb_export", "runs of USB's protocols as USB's results, configurations and logs"),
    "predict": ("cli.predict", "label a folder of images with a trained net"),
    "export": ("cli.export", "write a trained net for timm (safetensors) and for ONNX"),
    "data": ("cli.data", "data show: images per class, and a picture of the views"),
    "demo": ("studies.demo", "train MUSCLE and its baselines on 10 labelled digits, with table and pictures"),
}


def as_program(command: Callable[[], int]) -> int:
    """Run a command as all that this process does; returns the exit status. A Ctrl-C after its end is ignored, for which Python
    would print a traceback while it shuts down.

    If the locale encodes file names otherwise (``LANG=C`` with ``PYTHONUTF8=0``, Latin-1), the process begins again in
    Python's UTF-8 mode: files that a configuration names would not be found.
    """
    if sys.getfilesystemencoding() != "utf-8":
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]], os.environ | {"PYTHONUTF8": "1"})
    try:
        return command()
    except KeyboardInterrupt:  # while it printed a fault
        return EXIT_INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def in_first_process() -> bool:
    """Whether this is the first of the processes that ``torchrun`` started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _print_fault(error: UserError) -> None:
    """Print a fault, a line each. What all processes meet, the first one prints."""
    if error.same_everywhere and not in_first_process():
        return
    if isinstance(error, Interrupted):
        print(f"\n{error}", file=sys.stderr)
        return
    for line in str(error).splitlines():
        print(f"error: {one_line(line)}", file=sys.stderr)


def run_command(name: str, argv: Sequence[str], prog: str) -> int:
    """Run a command, and print its faults, one line each; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):  # names of files need not be text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return int(import_module(f"muscle_plugin.{COMMANDS[name][0]}").main(argv, prog))
    except UserError as e:
        _print_fault(e)
        return e.status
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OSError as e:
        if e.filename is None:
            raise
        _print_fault(UserError(f"{e.filename}: {e.strerror}"))
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        less = "fewer images at a time or --device cpu may need less"
        _print_fault(UserError(f"out of memory ({first_line(e)}): {less}"))
    return EXIT_BAD_INPUT


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``muscle-plugin``."""
    if argv is None:
        return as_program(lambda: main(sys.argv[1:]))
    words = list(argv)
    if words and words[0] in COMMANDS:
        return run_command(words[0], words[1:], f"muscle-plugin {words[0]}")
    parser = argparse.ArgumentParser(prog="muscle-plugin", description="MUSCLE for USB (arXiv 2012.00150).")
    parser.add_argument("--version", action="version", version=f"muscle-plugin {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    parser.parse_args(words)
    parser.print_help()
    return 0 if not words else EXIT_BAD_INPUT
