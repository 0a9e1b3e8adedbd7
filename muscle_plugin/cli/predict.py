"""``muscle-plugin predict``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from muscle_plugin.errors import InputError
from muscle_plugin.files import refuse_existing
from muscle_plugin.settings.command_line import add_options_of_net
from muscle_plugin.settings.resolve import load_plugins
from muscle_plugin.settings.schema import device_fault


def main(argv: Sequence[str], prog: str) -> int:
    """Label images with a trained net; returns the exit status."""
    parser = argparse.ArgumentParser(prog=prog, description="Label a folder of images with a trained net.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run's latest_model.pth, or its directory")
    parser.add_argument("--images", type=Path, required=True, help="a folder of images, at any depth, or one image")
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write: file, class, probability")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [%(default)s]")
    parser.add_argument("--batch", type=int, default=256, help="images at a time [%(default)s]")
    parser.add_argument(
        "--skip-bad-images", "--skip_bad_images", action="store_true", help="leave out files that cannot be read"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    add_options_of_net(parser)
    options = vars(parser.parse_args(list(argv)))
    # before torch, which a mistyped name need not wait for; the plugins that the run's own files name are not loaded
    load_plugins([], options.pop("plugins"))
    if fault := device_fault(options["device"]):
        raise InputError(f"--device: {fault}, got {options['device']!r}")
    if not options["overwrite"]:
        refuse_existing(options["out"], "--overwrite replaces it")
    from muscle_plugin.inference.predict import write_predictions

    print(write_predictions(**options))
    return 0
