"""``muscle-plugin export``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from muscle_plugin.errors import EXIT_FAILED, fail
from muscle_plugin.text import one_line


def export_command(argv: Sequence[str], prog: str) -> int:
    """Write a trained net for use elsewhere. Returns the exit status: 0 done, 1 the export does not predict what the
    checkpoint does, 2 bad input."""
    parser = argparse.ArgumentParser(prog=prog, description="Write a trained net for timm, safetensors and ONNX.")
    parser.add_argument("--checkpoint", required=True, help="a run's directory, or a checkpoint in it")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--format", choices=("safetensors", "onnx", "both"), default="both", help="[%(default)s]")
    parser.add_argument("--images", help="images to compare on [the run's own test images]")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of a logit, relative [%(default)s]")
    from muscle_plugin.files import refuse_existing
    from muscle_plugin.settings.command_line import add_plugins_of_net
    from muscle_plugin.settings.resolve import load_plugins

    add_plugins_of_net(parser)
    options = vars(parser.parse_args(list(argv)))
    try:  # before torch; what the run's own files name is not loaded
        load_plugins([], options.pop("plugins"))
        refuse_existing(options["out"], "give a folder that does not")
    except ValueError as e:
        return fail(str(e).splitlines())
    from muscle_plugin.errors import DataError, ExportError
    from muscle_plugin.inference.export import export_model

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
