"""The demonstration, shortened: it trains, MUSCLE beats its base, and what it promises is written."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from muscle_plugin.studies.runs import by_algorithm, mean_and_std, read_run


def demo(out, *words):
    return subprocess.run(
        [sys.executable, "-m", "muscle_plugin.cli", "demo", "--out", str(out), *words],
        capture_output=True, text=True, cwd=ROOT, timeout=500, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    done = demo(out, "--steps", "300", "--seeds", "1", "--workers", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def accuracy(out, algorithm):
    return json.loads((out / f"{algorithm}_digits_10_0" / "result.json").read_text())["last_top1"]


def test_muscle_beats_supervised_training_with_ten_labels(finished):
    out, _ = finished
    assert accuracy(out, "muscle") > accuracy(out, "supervised") + 0.1
    assert accuracy(out, "muscle_fixmatch") > accuracy(out, "supervised")


def test_mutual_information_rises(finished):
    out, _ = finished
    _, information = read_run(out / "muscle_digits_10_0").curve("train/mi")
    assert information[0] < 0.5 < 1.5 < information[-1] < 2.303


def test_table_and_pictures(finished):
    out, printed = finished
    assert "MUSCLE + FixMatch" in printed
    rows = (out / "table.md").read_text().splitlines()
    assert len(rows) == 6
    assert f"{100 * accuracy(out, 'muscle'):.1f} ± 0.0" in rows[4]
    for name in ("curves.png", "views.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert (out / name).stat().st_size > 10_000


def test_a_second_call_trains_nothing_again(finished):
    out, _ = finished
    before = (out / "muscle_digits_10_0" / "metrics.jsonl").read_bytes()
    done = demo(out, "--steps", "300", "--seeds", "1")
    assert done.returncode == 0
    assert (out / "muscle_digits_10_0" / "metrics.jsonl").read_bytes() == before


def test_other_settings_for_the_same_runs_are_a_failure_with_the_reason(finished):
    out, _ = finished
    done = demo(out, "--steps", "301", "--seeds", "1", "--workers", "1")
    assert done.returncode == 1
    assert "began with other settings: num_train_iter was 300, now 301" in done.stdout.replace("\n", " ")


def test_bad_arguments():
    assert demo("x", "--seeds", "0").returncode == 2


def test_grouping_and_spread(finished):
    out, _ = finished
    runs = [read_run(out / f"{a}_digits_10_0") for a in ("muscle", "supervised")]
    assert list(by_algorithm(runs)) == ["muscle", "supervised"]
    assert mean_and_std([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert mean_and_std([4.0]) == (4.0, 0.0)
