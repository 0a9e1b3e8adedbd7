"""A run that is killed at random moments ends as one that never was: benchmarks/chaos.py, its short form."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from processes import needs_fork

pytestmark = needs_fork


@pytest.mark.slow
def test_three_kills_change_nothing():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    short = [
        "--c",
        "muscle_meanteacher_labelprop_digits_10",
        "--lp_start",
        "0.5",
        "--num_train_iter",
        "24",
        "--epoch",
        "4",
    ]
    command = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), "--kills", "3", "--seed", "5", "--", *short]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1] == "identical"
    assert "   3  kills" in ended.stdout


def test_differences_are_seen(tmp_path, short_run, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from chaos import compare, differences

    zero = torch.zeros(3)
    assert differences({"a": [zero, 1], "seconds": 1}, {"a": [zero.clone(), 1], "seconds": 2}, "x") == []
    assert differences({"a": [zero]}, {"a": [-zero]}, "x") == ["x/a/0"]
    assert differences({"a": float("nan")}, {"a": float("nan")}, "x") == []
    assert differences({"a": 1}, {"b": 1}, "x") == ["x/a: 1 against absent", "x/b: absent against 1"]
    for name in ("whole", "cut"):
        short_run(algorithm="supervised", save_name=name, use_tensorboard=True)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert compare(whole, cut) == []
    rows = (cut / "metrics.jsonl").read_text().splitlines()
    (cut / "metrics.jsonl").write_text("\n".join([*rows, rows[-1]]) + "\n")
    assert any("metrics.jsonl: steps" in d for d in compare(whole, cut))
    (cut / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    result = json.loads((cut / "result.json").read_text())
    (cut / "result.json").write_text(json.dumps(result | {"best_step": 1}))
    assert [d for d in compare(whole, cut) if "best_step" in d]
