"""``muscle-plugin train``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from muscle_plugin.cli.common import configuration, parser_of
from muscle_plugin.errors import EXIT_FAILED, EXIT_INTERRUPTED, FIRST, fail


def train_command(argv: Sequence[str], prog: str) -> int:
    """Resolve the settings and train.

    Returns the exit status: 0 done, 1 the loss is not finite or another process failed, 2 bad input, 130 interrupted.
    """
    description = "Train a USB algorithm, or MUSCLE composed with one."
    try:
        found = configuration(parser_of(prog, description, "muscle_fixmatch_digits_10 --seed 1"), argv)
        if isinstance(found, int):
            return found
        _, resolved = found
        from muscle_plugin.errors import RunError
        from muscle_plugin.runs.directory import checkpoints_or_refusal, run_lock

        run_dir = Path(resolved.settings.save_dir) / resolved.settings.save_name
        if "RANK" not in os.environ:
            try:  # before torch is loaded; `train` looks again, since by then another process may have begun the run
                with run_lock(run_dir) if run_dir.exists() else nullcontext():
                    checkpoints_or_refusal(run_dir, resolved)
            except (RunError, OSError) as e:
                return fail(str(e).splitlines())
        from muscle_plugin.errors import ExchangeError, Interrupted, NotFinite
        from muscle_plugin.runs.train import train
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    try:
        train(resolved, command=[*prog.split(), *argv])
    except RunError as e:
        return fail(str(e).splitlines(), everywhere=True)  # raised with words in one process, or before they had met
    except NotFinite as e:
        if FIRST:
            print(f"error: {e}", file=sys.stderr)
        return EXIT_FAILED
    except ExchangeError as e:
        print(
            f"error: process {os.environ.get('RANK')}: {e}; if there is a checkpoint, --resume goes on from it",
            file=sys.stderr,
        )
        return EXIT_FAILED
    except Interrupted as e:
        if FIRST:
            print(f"\n{e}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:  # while starting, or a second Ctrl-C
        print("\nstopped at once; if there is a checkpoint, --resume goes on from it", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0
