"""The command line: ``muscle-plugin train ...``; ``python train.py ...`` is the same as ``muscle-plugin train``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from muscle_plugin.text import first_line, one_line, out_of_memory
from muscle_plugin.version import __version__

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
#: Of several processes (torchrun) the first one speaks.
_FIRST = os.environ.get("RANK", "0") == "0"


def fail(lines: Sequence[str], everywhere: bool = False) -> int:
    """Print each fault as a line on standard error; returns the exit status of bad input.

    Args:
        everywhere: not in the first of several processes alone: the fault is this one's own.
    """
    for line in lines if _FIRST or everywhere else ():
        print(f"error: {one_line(line)}", file=sys.stderr)
    return EXIT_BAD_INPUT


def _configuration(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, Any] | int:
    """The options and resolved settings of a command line, or the exit status if it ends here."""
    from muscle_plugin import config

    if not argv:
        return fail([f"give a configuration ({parser.prog} {config.EXAMPLE}) or settings; --help lists them"])
    try:
        config.load_named_plugins(argv, lambda options, rest: [options.c] if options.c else config.named_in(rest))
        config.add_arguments(parser)
        options, layer, faults = config.parse_command_line(parser, argv)
        try:
            resolved = config.load_settings(options.c, **layer.values)
        except config.ConfigError as e:
            raise config.ConfigError([*faults, *e.faults]) from None
        if faults:
            raise config.ConfigError(faults)
    except config.ConfigError as e:
        return fail(e.faults)
    except config.CatalogueError as e:
        return fail([str(e)])
    notices = list(resolved.notices)
    if not (options.c or {"algorithm", "dataset"} <= resolved.sources.keys()):
        by_default = [k for k in ("algorithm", "dataset", "net") if k not in resolved.sources]
        s = resolved.settings
        notices.append(
            f"no configuration is named: {s.algorithm} on {s.dataset} with net {s.net} (by default: {', '.join(by_default)})"
        )
    for notice in notices if _FIRST else ():
        print(f"note: {one_line(notice)}", file=sys.stderr)
    if options.print_config:
        print(resolved.to_yaml(), end="")
        return 0
    return options, resolved


def _parser(prog: str, description: str, example: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [NAME or FILE of a configuration] [--setting value ...]",
        allow_abbrev=False,
        description=description,
        epilog=f"Command line over YAML over defaults. Example: {example}",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120),
    )


def train_command(argv: Sequence[str], prog: str) -> int:
    """Resolve the settings and train.

    Returns the exit status: 0 done, 1 the loss is not finite or another process failed, 2 bad input, 130 interrupted.
    """
    description = "Train a USB algorithm, or MUSCLE composed with one."
    try:
        found = _configuration(_parser(prog, description, "muscle_fixmatch_digits_10 --seed 1"), argv)
        if isinstance(found, int):
            return found
        _, resolved = found
        from muscle_plugin.run_dir import RunError, alone, checkpoints_or_refusal

        run_dir = Path(resolved.settings.save_dir) / resolved.settings.save_name
        if "RANK" not in os.environ:
            try:  # before torch is loaded; `train` looks again, since by then another process may have begun the run
                with alone(run_dir) if run_dir.exists() else nullcontext():
                    checkpoints_or_refusal(run_dir, resolved)
            except (RunError, OSError) as e:
                return fail(str(e).splitlines())
        from muscle_plugin.distributed import ExchangeError
        from muscle_plugin.run import Interrupted, NotFinite, train
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    try:
        train(resolved, command=[*prog.split(), *argv])
    except RunError as e:
        return fail(str(e).splitlines(), everywhere=True)  # raised with words in one process, or before they had met
    except NotFinite as e:
        if _FIRST:
            print(f"error: {e}", file=sys.stderr)
        return EXIT_FAILED
    except ExchangeError as e:
        print(
            f"error: process {os.environ.get('RANK')}: {e}; if there is a checkpoint, --resume goes on from it",
            file=sys.stderr,
        )
        return EXIT_FAILED
    except Interrupted as e:
        if _FIRST:
            print(f"\n{e}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:  # while starting, or a second Ctrl-C
        print("\nstopped at once; if there is a checkpoint, --resume goes on from it", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def data_command(argv: Sequence[str], prog: str) -> int:
    """``data show``: what a configuration would train on. Returns the exit status: 0 done, 2 bad input."""
    parser = _parser(
        f"{prog} show",
        "Show what a run would train on: images per class, and the views of its first step.",
        "--dataset cifar20 --num_labels 800 --out views.png",
    )
    parser.add_argument("--out", type=Path, metavar="PNG", help="write a contact sheet of all views")
    parser.add_argument("--save_split", type=Path, metavar="JSON", help="write which images are labelled")
    if not argv or argv[0] != "show":
        usage = f"{prog} show --dataset cifar10 --num_labels 250 --out views.png"
        if argv and argv[0] in ("-h", "--help"):
            print(f"usage: {usage}")
            return 0
        return fail([f"expected: {usage}"])
    found = _configuration(parser, argv[1:])
    if isinstance(found, int):
        return found
    options, resolved = found
    from muscle_plugin.data.errors import DataError
    from muscle_plugin.data.show import show
    from muscle_plugin.host.device import DeviceError

    try:
        show(resolved, options.out, options.save_split)
    except (DataError, DeviceError, ValueError) as e:
        return fail(str(e).splitlines())
    except OSError as e:
        return fail([f"{e.filename}: cannot be written: {e.strerror}"])
    return 0


def predict_command(argv: Sequence[str], prog: str) -> int:
    """Label images with a trained net. Returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog=prog, description="Label a folder of images with a trained net.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run's latest_model.pth, or its directory")
    parser.add_argument("--images", type=Path, required=True, help="a folder of images, at any depth, or one image")
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write: file, class, probability")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [%(default)s]")
    parser.add_argument("--batch", type=int, default=256, help="images at a time [%(default)s]")
    parser.add_argument("--skip-bad-images", action="store_true", help="leave out files that cannot be read")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    from muscle_plugin import config
    from muscle_plugin.files import refuse_existing

    config.add_plugins_of_net(parser)
    options = vars(parser.parse_args(list(argv)))
    try:  # before torch, which a name mistyped need not wait for; what the run's own files name is not loaded
        config.load_plugins([], options.pop("plugins"))
        if fault := config.device_fault(options["device"]):
            raise ValueError(f"--device: {fault}, got {options['device']!r}")
        if not options["overwrite"]:
            refuse_existing(options["out"], "--overwrite replaces it")
    except ValueError as e:
        return fail(str(e).splitlines())
    from muscle_plugin.data.errors import DataError
    from muscle_plugin.host.device import DeviceError
    from muscle_plugin.predict import write_predictions

    try:
        print(write_predictions(**options))
    except (DataError, DeviceError, ValueError) as e:
        return fail([str(e).splitlines()[0]])
    except OSError as e:
        return fail([f"{e.filename}: {e.strerror}"])
    return 0


def export_command(argv: Sequence[str], prog: str) -> int:
    """Write a trained net for use elsewhere. Returns the exit status: 0 done, 1 the export does not predict what the
    checkpoint does, 2 bad input."""
    parser = argparse.ArgumentParser(prog=prog, description="Write a trained net for timm, safetensors and ONNX.")
    parser.add_argument("--checkpoint", required=True, help="a run's directory, or a checkpoint in it")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--format", choices=("safetensors", "onnx", "both"), default="both", help="[%(default)s]")
    parser.add_argument("--images", help="images to compare on [the run's own test images]")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of a logit, relative [%(default)s]")
    from muscle_plugin import config
    from muscle_plugin.files import refuse_existing

    config.add_plugins_of_net(parser)
    options = vars(parser.parse_args(list(argv)))
    try:  # before torch; what the run's own files name is not loaded
        config.load_plugins([], options.pop("plugins"))
        refuse_existing(options["out"], "give a folder that does not")
    except ValueError as e:
        return fail(str(e).splitlines())
    from muscle_plugin.data.errors import DataError
    from muscle_plugin.export import ExportError, export_model

    try:
        for line in export_model(**options):
            print(line)
    except ExportError as e:
        print(f"error: {one_line(str(e))}", file=sys.stderr)
        return EXIT_FAILED
    except (DataError, ValueError) as e:
        return fail([str(e).splitlines()[0]])
    except OSError as e:
        return fail([f"{e.filename}: {e.strerror}"])
    return 0


def _main_of(module: str) -> Callable[[Sequence[str], str], int]:
    """A command whose module is imported when it is called."""
    return lambda argv, prog: int(import_module(module).main(argv, prog))


COMMANDS = {
    "train": (train_command, "train one configuration"),
    "sweep": (
        _main_of("muscle_plugin.bench.sweep"),
        "train many by name: table1 ... figure3, digits, or any configurations",
    ),
    "cost": (
        _main_of("muscle_plugin.bench.cost"),
        "what studies take: runs, steps, images, hours on a machine whose speed was measured",
    ),
    "report": (_main_of("muscle_plugin.bench.report"), "runs as one HTML page and Markdown, beside the paper's tables"),
    "usb-export": (
        _main_of("muscle_plugin.bench.usb_export"),
        "runs of USB's protocols as USB's results, configurations and logs",
    ),
    "predict": (predict_command, "label a folder of images with a trained net"),
    "export": (export_command, "write a trained net for timm (safetensors) and for ONNX"),
    "data": (data_command, "data show: images per class, and a picture of the views"),
    "demo": (
        _main_of("muscle_plugin.demo"),
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


if __name__ == "__main__":
    sys.exit(main())
