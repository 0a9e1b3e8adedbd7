"""``muscle-plugin data show``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from muscle_plugin.cli.configuration import configuration, parser_of
from muscle_plugin.errors import InputError

PICTURES = (".png", ".jpg", ".pdf", ".svg")


def main(argv: Sequence[str], prog: str) -> int:
    """Show what a configuration would train on; returns the exit status."""
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
        raise InputError(f"expected: {usage}")
    found = configuration(parser, argv[1:])
    if found is None:
        return 0
    options, resolved = found
    if options.out and options.out.suffix.lower() not in PICTURES:
        raise InputError(f"--out: {options.out}: expected the name of a picture ({', '.join(PICTURES)})")
    # torch
    from muscle_plugin.data.load import split_seed
    from muscle_plugin.data.splits import write_split
    from muscle_plugin.runs.build import build
    from muscle_plugin.studies.show import counts_table, views_of_first_batch

    if resolved.settings.tune == "head":  # the views themselves, not their features
        settings = resolved.settings.model_copy(update={"tune": "full", "use_pretrain": False})
        resolved = replace(resolved, settings=settings)
    algorithm = build(resolved)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 160
    console.print(counts_table(algorithm))
    for note in algorithm.notes:
        console.print(f"note: {note}")
    if options.out:
        from muscle_plugin.studies.plots import contact_sheet  # matplotlib

        contact_sheet(views_of_first_batch(algorithm), options.out)
        console.print(f"views of the first step: {options.out}")
    if options.save_split:
        s = algorithm.settings
        write_split(options.save_split, algorithm.split, algorithm.source, dataset=s.dataset, seed=split_seed(s))
        console.print(f"labelled images: {options.save_split}; --split_file takes it")
    return 0
