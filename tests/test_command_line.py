"""Faults on the command line: one line each, the status of its kind, said by one of several processes."""

import errno
import sys
from types import SimpleNamespace

import pytest
from PIL import Image
from processes import in_processes, needs_fork

from muscle_plugin import cli, distributed
from muscle_plugin.errors import (
    ConfigError,
    DataError,
    ExchangeError,
    ExportError,
    InputError,
    Interrupted,
    NotFinite,
    RunError,
    UserError,
    WriteError,
)

FULL = (errno.ENOSPC, "No space left on device", "a.csv")


@pytest.fixture
def fails(monkeypatch):
    """A function that runs a command that ends with an exception, and returns the exit status."""

    def run(error):
        def main(argv, prog):
            raise error

        monkeypatch.setitem(sys.modules, "muscle_plugin.failing", SimpleNamespace(main=main))
        monkeypatch.setitem(cli.COMMANDS, "fails", ("failing", ""))
        return cli.main(["fails"])

    return run


@pytest.mark.parametrize(
    ("error", "status", "lines"),
    [
        (ConfigError(["lr: no", "seed: no"]), 2, ["error: lr: no", "error: seed: no"]),
        (DataError("no images"), 2, ["error: no images"]),
        (InputError("a\x1b[31m: b"), 2, [r"error: a\x1b[31m: b"]),
        (WriteError(*FULL), 2, ["error: a.csv: cannot be written: No space left on device"]),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, ["error: /x: Permission denied"]),
        (ExportError("another prediction"), 1, ["error: another prediction"]),
        (ExchangeError("process 1: gone"), 1, ["error: process 1: gone"]),
        (NotFinite("step 3: the loss", {}), 1, ["error: step 3: the loss"]),
        (Interrupted("stopped\nto resume: x"), 130, ["", "stopped", "to resume: x"]),
        (KeyboardInterrupt(), 130, []),
        (UserError(), 2, []),
    ],
)
def test_each_fault_is_a_line_with_its_status(fails, capsys, error, status, lines):
    assert fails(error) == status
    assert capsys.readouterr().err.splitlines() == lines


LONG = "a" * 300  # a file's name has at most 255 bytes


@pytest.mark.parametrize(
    "words",
    [
        "train supervised_digits_10 --save_dir runs --save_name {}",
        "train supervised_digits_10 --save_dir runs --save_name {umlauts}",
        "train supervised_digits_10 --save_dir {}",
        "train supervised_digits_10 --save_dir runs --resume auto --load_path {}/latest_model.pth",
        "train supervised_digits_10 --save_dir runs --init_from {}",
        "train supervised_digits_10 --save_dir runs --save_name x --split_file {}",
        "train muscle_fixmatch_folder --save_dir runs --data_dir {}",
        "train muscle_fixmatch_folder --save_dir runs --data_dir . --labels_csv {}",
        "train {}",
        "sweep supervised_digits_10 --seeds 1 --save_dir {}",
        "demo --out {}",
        "report . --out {}",
        "report {}.jsonl",
        "data show supervised_digits_10 --out {}.png",
        "data show supervised_digits_10 --save_split {}",
        "predict --checkpoint r --images r --out {}",
        "predict --checkpoint {} --images . --out out.csv",
        "predict --checkpoint r --images {} --out out.csv",
        "export --checkpoint r --out {}",
        "export --checkpoint {} --out out",
    ],
)
def test_a_name_too_long_for_a_file_is_one_line(words, short_run, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    if "r" in words.split() or words.startswith("report"):
        short_run(algorithm="supervised", save_name="r")
    Image.new("L", (8, 8)).save("r/a.png" if (tmp_path / "r").exists() else "a.png")
    capfd.readouterr()
    assert cli.main(words.format(LONG, umlauts="ä" * 130).split()) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "File name too long" in line
    assert "Errno" not in line
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried\nto allocate")])
def test_memory_that_runs_out_is_one_line(fails, capsys, error):
    assert fails(error) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory (")


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x"), OSError("x"), KeyError("x")])
def test_faults_of_the_program_keep_their_traceback(fails, error):
    with pytest.raises(type(error)):
        fails(error)


@pytest.mark.parametrize(
    ("error", "said"),
    [(ConfigError(["lr: no"]), False), (NotFinite("step 3", {}), False), (Interrupted("stopped"), False),
     (RunError("this process's own"), True), (WriteError(*FULL), True)],
)  # fmt: skip
def test_the_first_of_several_processes_says_what_all_meet(fails, capsys, monkeypatch, error, said):
    monkeypatch.setenv("RANK", "1")
    assert fails(error) == error.status
    assert bool(capsys.readouterr().err) == said


def _faults_here(rank, world):
    def fail_in(*ranks):
        if rank in ranks:
            raise DataError(f"no images in {rank}")
        return rank

    for call, ranks in [
        (c, r) for c in (distributed.in_every_process, distributed.from_first) for r in [(), (0,), (1,)]
    ]:
        try:
            found = call(lambda ranks=ranks: fail_in(*ranks))
        except UserError as e:
            found = f"{type(e).__name__}: {e}"
        if call is distributed.in_every_process:
            expected = {(): rank, (0,): "DataError: no images in 0", (1,): "RunError: process 1: no images in 1"}[ranks]
        else:
            expected = "DataError: no images in 0" if ranks == (0,) else 0
        if rank and isinstance(expected, str):
            expected = "UserError: "
        assert found == expected, (call, ranks, rank)


@needs_fork
def test_a_fault_of_one_process_is_said_once():
    in_processes(2, _faults_here)
