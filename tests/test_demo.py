"""The demonstration, shortened: it trains, MUSCLE is ahead of supervised training, and what it promises is written."""

import json
import math
import re
import subprocess
import sys
from statistics import fmean

import pytest
from conftest import ROOT

from muscle_plugin.studies.runs import mean_and_std, read_run


def demo(out, *words):
    return subprocess.run(
        [sys.executable, "-m", "muscle_plugin.cli", "demo", "--out", str(out), *words],
        capture_output=True, text=True, cwd=ROOT, timeout=500, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    done = demo(out, "--steps", "200", "--seeds", "2", "--workers", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def accuracies(out, algorithm):
    return [json.loads((out / f"{algorithm}_digits_10_{s}" / "result.json").read_text())["last_top1"] for s in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["muscle", "muscle_fixmatch"])
@pytest.mark.slow
def test_muscle_is_ahead_of_supervised_training_with_ten_labels(finished, algorithm):
    """Over seeds, by the sign alone: some 15 to 20 points, where another CPU's rounding moves a run by a few."""
    out, _ = finished
    pairs = zip(accuracies(out, algorithm), accuracies(out, "supervised"), strict=True)
    assert fmean(ours - theirs for ours, theirs in pairs) > 0


@pytest.mark.slow
def test_mutual_information_rises(finished):
    out, _ = finished
    information = list(read_run(out / "muscle_digits_10_0").curve("train/mi").values())
    assert 0 < information[0] < information[-1] / 2 < math.log(10) / 2


@pytest.mark.slow
def test_table_and_pictures(finished):
    out, printed = finished
    assert "MUSCLE + FixMatch" in printed
    rows = (out / "table.md").read_text().splitlines()
    assert len(rows) == 8
    assert [r for r in rows if "no training" in r] == rows[-2:]
    for head, algorithm in (("supervised only", "supervised"), ("MUSCLE", "muscle")):
        (row,) = [r for r in rows if r.startswith(f"| {head} |")]
        mean, std = mean_and_std(100 * a for a in accuracies(out, algorithm))
        assert f"| {mean:.1f} ± {std:.1f} |" in row
    for name in ("curves.png", "views.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert (out / name).stat().st_size > 10_000


@pytest.mark.slow
def test_a_second_call_trains_nothing_again(finished):
    out, _ = finished
    before = (out / "muscle_digits_10_0" / "metrics.jsonl").read_bytes()
    done = demo(out, "--steps", "200", "--seeds", "2")
    assert done.returncode == 0
    assert (out / "muscle_digits_10_0" / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_other_settings_for_the_same_runs_are_refused_with_the_reason(finished):
    out, _ = finished
    done = demo(out, "--steps", "201", "--seeds", "1", "--workers", "1")
    assert done.returncode == 2
    assert all(re.search(r"num_train_iter was 200, now 201\. .*--out$", x) for x in done.stderr.splitlines()[:3])


@pytest.mark.slow
def test_bad_arguments():
    assert demo("x", "--seeds", "0").returncode == 2


@pytest.mark.slow
def test_mean_and_spread():
    assert mean_and_std([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert mean_and_std([4.0]) == (4.0, 0.0)
