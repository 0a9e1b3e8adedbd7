"""The command line: ``muscle-plugin train ...``; ``python train.py ...`` is the same as ``muscle-plugin train``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from muscle_plugin.cli.data import data_command
from muscle_plugin.cli.export import export_command
from muscle_plugin.cli.predict import predict_command
from muscle_plugin.cli.train import train_command
from muscle_plugin.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, UserError, fail
from muscle_plugin.text import first_line, out_of_memory
from muscle_plugin.version import __version__


def _main_of(module: str) -> Callable[[Sequence[str], str], int]:
    """A command whose module is imported when it is called."""
    return lambda argv, prog: int(import_module(module).main(argv, prog))


COMMANDS = {
    "train": (train_command, "train one configuration"),
    "sweep": (
        _main_of("muscle_plugin.studies.sweep"),
        "train many by name: table1 ... figure3, digits, or any configurations",
    ),
    "report": (
        _main_of("muscle_plugin.studies.report"),
        "runs as one HTML page and Markdown, beside the paper's tables",
    ),
    "usb-export": (
        _main_of("muscle_plugin.studies.usb_export"),
        "runs of USB's protocols as USB's results, configurations and logs",
    ),
    "predict": (predict_command, "label a folder of images with a trained net"),
    "export": (export_command, "write a trained net for timm (safetensors) and for ONNX"),
    "data": (data_command, "data show: images per class, and a picture of the views"),
    "demo": (
        _main_of("muscle_plugin.studies.demo"),
        "train MUSCLE and its baselines on 10 labelled digits, with table and pictures",
    ),
}


def in_utf8() -> None:
    """Start this command anew in Python's UTF-8 mode if the locale would have names of files in anything else (``LANG=C``
    with ``PYTHONUTF8=0``, Latin-1): those that a configuration names would not be found, those found not be written down."""
    if sys.getfilesystemencoding() != "utf-8":
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]], os.environ | {"PYTHONUTF8": "1"})


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``muscle-plugin``."""
    if argv is None:
        in_utf8()
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # names of files need not be text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if words and words[0] in COMMANDS:
        try:
            return COMMANDS[words[0]][0](words[1:], f"muscle-plugin {words[0]}")
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        except UserError as e:
            fail(str(e).splitlines())
            return e.status
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
            return fail([f"out of memory ({first_line(e)}): fewer images at a time or --device cpu may need less"])
    parser = argparse.ArgumentParser(prog="muscle-plugin", description="MUSCLE for USB (arXiv 2012.00150).")
    parser.add_argument("--version", action="version", version=f"muscle-plugin {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    parser.parse_args(words)
    parser.print_help()
    return 0 if not words else EXIT_BAD_INPUT
