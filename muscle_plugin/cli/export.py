"""``muscle-plugin export``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from muscle_plugin.files import refuse_existing
from muscle_plugin.settings.command_line import add_options_of_net
from muscle_plugin.settings.resolve import load_plugins


def main(argv: Sequence[str], prog: str) -> int:
    """Write a trained net for use elsewhere; returns the exit status."""
    parser = argparse.ArgumentParser(prog=prog, description="Write a trained net for timm, safetensors and ONNX.")
    parser.add_argument("--checkpoint", required=True, help="a run's directory, or a checkpoint in it")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--format", choices=("safetensors", "onnx", "both"), default="both", help="[%(default)s]")
    parser.add_argument("--images", help="images to compare on [the run's own test images]")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of a logit, relative [%(default)s]")
    add_options_of_net(parser)
    options = vars(parser.parse_args(list(argv)))
    # before torch; the plugins that the run's own files name are not loaded
    load_plugins([], options.pop("plugins"))
    refuse_existing(options["out"], "choose another output folder")
    from muscle_plugin.inference.export import export_model

    print("\n".join(export_model(**options)))
    return 0
