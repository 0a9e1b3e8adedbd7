"""``benchmarks/device.py``: what it reports, and that its time is kept. Its commands have tests of their own."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from argparse import Namespace

import pytest
from conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "device.py"


@pytest.fixture(scope="module")
def device():
    spec = importlib.util.spec_from_file_location("device", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_rehearsal_reports_its_command_and_the_machine(tmp_path):
    out = tmp_path / "out"
    command = [ROOT / "benchmarks" / "device.sh", out, "--device", "cpu", "--only", "tests", "--minutes", "3"]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    assert [(c["command"].rpartition(" ")[2], c["status"]) for c in report["commands"]] == [("tests/test_cuda.py", 0)]
    assert report["device"] == "cpu"
    assert set(report["versions"]) == {"python", "torch", "torchvision", "timm", "semilearn", "scikit-learn"}
    assert (out / "report.txt").read_text() == done.stdout
    again = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert again.returncode == 2
    assert "has a report already: give another folder" in again.stderr


@pytest.mark.parametrize("code", ["print('begun', flush=True)", "raise SystemExit(3)"])
def test_exit_status(device, tmp_path, code):
    report = device.Report(tmp_path, {"device": "none"}, dict(os.environ))
    assert report.run(shlex.join(["-c", code]), 60) == ("begun" in code)
    assert report.commands[0]["status"] == (0 if "begun" in code else 3)


def test_a_command_and_what_it_starts_end_with_their_time(device, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "GRACE", 1)
    child = "import time; time.sleep(3); open('late', 'w')"
    deaf = (
        "import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"subprocess.run([sys.executable, '-c', {child!r}])"
    )
    monkeypatch.setattr(device, "ROOT", tmp_path)
    report = device.Report(tmp_path, {}, dict(os.environ))
    start = time.monotonic()
    assert not report.run(shlex.join(["-c", deaf]), 1)
    assert not report.run("-c pass", -1)
    assert time.monotonic() - start < 2.9
    time.sleep(3)
    assert not (tmp_path / "late").exists()
    statuses = [c["status"] for c in json.loads((tmp_path / "report.json").read_text())["commands"]]
    assert statuses == ["out of time", "no time left"]


@pytest.mark.parametrize(
    ("minutes", "only", "seconds"),
    [
        (25, "tests,views,propagation,step,training", [240, 60, 60, 60, 150, 150, 390, 390]),
        (25, "tests,views,propagation,step", [240, 60, 60, 60, 540, 540]),  # the last part has all that is left
        (11 / 2, "tests,views,step", [132, 33, 82.5, 82.5]),
        (10, "training", [300, 300]),
    ],
)
def test_shares_of_time(device, tmp_path, monkeypatch, minutes, only, seconds):
    given, now = [], [1000.0]

    def take(limit):  # all the time that it may
        given.append(limit)
        now[0] += limit

    report = device.Report(tmp_path, {}, {})
    monkeypatch.setattr(report, "run", lambda command, limit: take(limit))
    monkeypatch.setattr(device, "train", lambda report, options, algorithm, folder, limit: take(limit))
    monkeypatch.setattr(device.time, "monotonic", lambda: now[0])
    (tmp_path / "cifar-10-batches-py").mkdir()
    options = Namespace(device="cuda", data_dir=tmp_path, only=only.split(","))
    device.ask(report, options, 1000 + 60 * minutes)
    assert given == pytest.approx(seconds)
