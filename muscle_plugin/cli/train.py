"""``muscle-plugin train``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext

from muscle_plugin.cli.configuration import configuration, parser_of
from muscle_plugin.errors import Interrupted
from muscle_plugin.runs.directory import checkpoints_or_refusal, run_lock


def main(argv: Sequence[str], prog: str) -> int:
    """Resolve the settings and train; returns the exit status."""
    description = "Train a USB algorithm, or MUSCLE composed with one."
    found = configuration(parser_of(prog, description, "muscle_fixmatch_digits_10 --seed 1"), argv)
    if found is None:
        return 0
    _, resolved = found
    run_dir = resolved.run_dir
    if "RANK" not in os.environ:  # before torch is loaded; `train` looks again: another process may have begun the run
        with run_lock(run_dir) if run_dir.exists() else nullcontext():
            checkpoints_or_refusal(run_dir, resolved)
    from muscle_plugin.runs.train import train

    try:
        train(resolved, command=[*prog.split(), *argv])
    except KeyboardInterrupt:  # while starting, or a second Ctrl-C
        again = "the same command starts again, with --resume from the last checkpoint if there is one"
        raise Interrupted(f"stopped at once; {again}") from None
    return 0
