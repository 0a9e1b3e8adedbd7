"""``muscle-plugin data show``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from muscle_plugin.cli.common import configuration, parser_of
from muscle_plugin.errors import fail


def data_command(argv: Sequence[str], prog: str) -> int:
    """``data show``: what a configuration would train on. Returns the exit status: 0 done, 2 bad input."""
    parser = parser_of(
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
    found = configuration(parser, argv[1:])
    if isinstance(found, int):
        return found
    options, resolved = found
    from muscle_plugin.errors import DataError, DeviceError
    from muscle_plugin.studies.show import show

    try:
        show(resolved, options.out, options.save_split)
    except (DataError, DeviceError, ValueError) as e:
        return fail(str(e).splitlines())
    except OSError as e:
        return fail([f"{e.filename}: cannot be written: {e.strerror}"])
    return 0
