"""Coverage-guided fuzzing of the readers of configurations and of tables of labels, by atheris (libFuzzer).

Each input must be read, or refused by the reader's own error with a message of plain lines; anything else is a finding. A
finding does not end the search: each is shown once, by its exception and place, with an input that leads to it.

    pip install atheris        # not a dependency of this project
    python benchmarks/fuzz_readers.py config|csv [--seconds 600] [--corpus FOLDER]

The search starts from ``tests/corpus/<reader>/``, which ``tests/test_fuzz.py`` replays without atheris. ``--corpus`` is the
folder in which the search keeps what it found on its way (a temporary one by default).
"""

from __future__ import annotations

import argparse
import atexit
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

SEEDS = Path(__file__).resolve().parent.parent / "tests" / "corpus"
SLOW = 2.0  # seconds, for which an input is reported too


def _expect(condition: object, words: object) -> None:
    if not condition:
        raise AssertionError(words)


def read_config(folder: Path) -> Callable[[bytes], None]:
    """Reads a text as a YAML file of settings, and checks these."""
    from muscle_plugin.errors import ConfigError
    from muscle_plugin.settings.resolve import load_settings

    file = folder / "c.yaml"

    def one(data: bytes) -> None:
        file.write_bytes(data)
        try:
            load_settings(file).to_yaml()
        except ConfigError as e:
            _expect(e.faults and all(fault and fault.isprintable() for fault in e.faults), e.faults)

    return one


def read_csv(folder: Path) -> Callable[[bytes], None]:
    """Reads a text as a table of labels over a folder of three images."""
    from muscle_plugin.data.datasets.label_table import read_label_table
    from muscle_plugin.errors import DataError

    root, table = folder / "images", folder / "t.csv"
    (root / "sub").mkdir(parents=True)
    for name in ("a.png", "b.png", "sub/c d.jpg"):
        (root / name).touch()

    def one(data: bytes) -> None:
        table.write_bytes(data)
        try:
            items = read_label_table(root, table, False, [])
            _expect(all(item.path.resolve().is_relative_to(root.resolve()) for item in items), items)
        except DataError as e:
            _expect(str(e), "no words")

    return one


READERS = {"config": read_config, "csv": read_csv}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", type=Path)
    options = parser.parse_args()
    try:
        import atheris
    except ImportError:
        sys.exit("error: atheris is not installed: pip install atheris (it has wheels for Linux)")
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    corpus = options.corpus or folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    with atheris.instrument_imports(include=["muscle_plugin", "ruamel", "csv"]):
        one = READERS[options.reader](folder)
    seen: set[str] = set()

    def test(data: bytes) -> None:
        start = time.monotonic()
        fault = place = ""
        try:
            one(data)
        except Exception as e:
            last = traceback.extract_tb(e.__traceback__)[-1]
            fault, place = f"{type(e).__name__}: {e}", f"{type(e).__name__} {last.filename}:{last.lineno}"
        if time.monotonic() - start > SLOW:
            fault, place = f"{time.monotonic() - start:.1f} s; {fault}", f"slow {len(data).bit_length()}"
        if fault and place not in seen:
            seen.add(place)
            print(f"FINDING {place}: {fault[:300]}\n  input: {data[:400]!r}", flush=True)

    flags = [f"-max_total_time={options.seconds}", "-max_len=4096", "-timeout=60", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], str(corpus), str(SEEDS / options.reader), *flags], test)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
