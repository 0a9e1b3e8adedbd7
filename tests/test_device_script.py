"""``benchmarks/device.sh``: what its two parts report, and that their time is kept. What they run has tests of its own."""

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "device.sh"
ABOUT = {"device": "NVIDIA H100", "date": "2026-11-28T10:00:00+00:00", "revision": "abc1234", "cuda": "13.0", "driver": "580.1",
         "command": "benchmarks/device.sh out --part check",
         "versions": {"torch": "2.11.0", "triton": "3.6.0", "timm": None}}  # fmt: skip


@pytest.fixture
def device(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    handler = signal.getsignal(signal.SIGTERM)
    yield importlib.import_module("device")
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def device_summary(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("device_summary")


@pytest.fixture
def report(device, tmp_path):
    return device.Report(tmp_path, device.CHECK, ABOUT, dict(os.environ))


class Clock:
    """A time that passes when it is told to."""

    def __init__(self, device, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(device.time, "monotonic", lambda: self.now)


def refusal(*arguments):
    """What the script prints where it cannot begin."""
    command = [SCRIPT, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable}, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    return done.stderr


# -------------------------------------------------------------------------------------------------------------- options


@pytest.mark.slow
def test_a_rehearsal_reports_its_command_and_the_machine(device, tmp_path, monkeypatch, capsys):
    checks = device.checks("cpu")
    monkeypatch.setattr(device, "checks", lambda _: {"tests/test_cuda.py": checks["tests/test_cuda.py"]})
    assert device.main([str(tmp_path), "--part", "check", "--device", "cpu", "--minutes", "3"]) == 0
    told = json.loads((tmp_path / "check.json").read_text())
    (command,) = told["commands"]
    assert (command["name"], command["status"]) == ("tests/test_cuda.py", 0)
    assert command["figures"]["collected"] == sum(command["figures"][k] for k in ("passed", "failed", "skipped")) > 100
    assert told["device"] == "cpu"
    assert told["revision"]
    assert set(told["versions"]) == {"python", "torch", "triton", "torchvision", "timm", "semilearn", "scikit-learn"}
    assert (tmp_path / "check.txt").read_text() == capsys.readouterr().out
    assert "- `tests/test_cuda.py`: 0 passed" in (tmp_path / "summary.md").read_text()
    assert "'check'" in refusal(tmp_path, "--part", "check", "--device", "cpu")


def test_folder_by_itself_and_a_second_part_beside_the_first(device, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "output_of", lambda *_: json.dumps({**ABOUT, "device": "NVIDIA H100 80GB HBM3"}))
    monkeypatch.setattr(device, "checks", lambda _: {"nothing": (1, "-c pass")})
    monkeypatch.setattr(device, "train", lambda report, *_: report.run("training", "-c pass", 60))
    monkeypatch.setattr(device, "revision", lambda: "abc1234")
    monkeypatch.setattr(device, "ROOT", tmp_path)
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert device.main(["--part", "check"]) == device.main(["--part", "train", "--data_dir", str(tmp_path)]) == 0
    (folder,) = (tmp_path / "results" / "gpu").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-nvidia-h100-80gb-hbm3", folder.name)
    assert sorted(p.name for p in folder.iterdir()) == [
        "check.json", "check.txt", "summary.md", "train.json", "train.txt",
    ]  # fmt: skip
    assert re.findall("^## .*: (.*)$", (folder / "summary.md").read_text(), re.M) == ["check", "train"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--part", "check", "--minutes", "5"], r"error: --minutes 5: .*\b0 .*\b4 .*--part check"),
        (["--part", "train", "--minutes", "0"], r"error: --minutes 0: .*\b0 .*\b7 .*--part train"),
        (["--part", "train", "--data_dir", "nowhere"], "error: nowhere/cifar-10-batches-py: "),
        (["--part", "check", "--wheels", "nowhere"], "error: --wheels nowhere: "),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, arguments, why):
    out = tmp_path / "out"
    assert re.match(why, refusal(out, *arguments))
    assert not out.exists()


# ------------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("code", ["print('begun', flush=True)", "raise SystemExit(3)"])
def test_exit_status(report, tmp_path, code):
    assert report.run("it", shlex.join(["-c", code]), 60) == ("begun" in code)
    (command,) = json.loads((tmp_path / "check.json").read_text())["commands"]
    assert command["status"] == (0 if "begun" in code else 3)
    assert ("it (3)" in (tmp_path / "summary.md").read_text()) == ("begun" not in code)


@pytest.mark.slow
def test_a_command_and_what_it_starts_end_with_their_time(device, report, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "GRACE", 1)
    child = "import time; time.sleep(3); open('late', 'w')"
    deaf = (
        "import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"subprocess.run([sys.executable, '-c', {child!r}])"
    )
    monkeypatch.setattr(device, "ROOT", tmp_path)
    assert not report.run("deaf", shlex.join(["-c", deaf]), 1)
    assert not report.run("late", "-c pass", -1)
    time.sleep(3)
    assert not (tmp_path / "late").exists()
    statuses = [c["status"] for c in json.loads((tmp_path / "check.json").read_text())["commands"]]
    assert statuses == ["out of time", "no time left"]


def test_figures_of_a_command_that_had_no_time_to_end(report, tmp_path):
    figures = tmp_path / "figures.json"
    code = "import sys, time; open(sys.argv[1], 'w').write(sys.argv[2]); time.sleep(60)"
    assert not report.run("it", shlex.join(["-c", code, str(figures), '{"found": 1}']), 2, figures)
    assert json.loads((tmp_path / "check.json").read_text())["commands"][0]["figures"] == {"found": 1}


def test_figures_that_cannot_be_summed_up_end_nothing(report, tmp_path):
    figures = tmp_path / "figures.json"
    figures.write_text('{"profile": 1}')
    assert report.run("it", "-c pass", 60, figures)
    assert "KeyError" in (tmp_path / "summary.md").read_text()


def test_commands_at_the_same_time_end_when_there_is_enough(report, tmp_path):
    code = (
        "import pathlib, signal, sys, time; name = sys.argv[1]\n"
        "def saved(*_): print('saved', flush=True); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, saved); pathlib.Path(name).touch(); time.sleep(60)"
    )
    files = [tmp_path / name for name in "ab"]
    commands = {p.name: shlex.join(["-c", code, str(p)]) for p in files} | {"short": "-c raise(SystemExit(4))"}
    found = report.together(commands, 30, lambda: all(p.exists() for p in files))
    assert found == {"a": "stopped", "b": "stopped", "short": 4}
    assert {"a: saved\n", "b: saved\n"} < set((tmp_path / "check.txt").open())
    assert "short (4)" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(
    ("seconds", "taken", "limits"),
    [
        (220, {}, [60, 40, 30, 25, 15, 20, 30]),  # each takes all that it may
        (110, {}, [30, 20, 15, 12.5, 7.5, 10, 15]),
        (
            220,
            {0: 30, 1: 20},
            [60, 70, 80, 25, 15, 20, 30],
        ),  # what one leaves, the next may take; the later keep theirs
        (220, dict.fromkeys(range(7), 10), [60, 90, 110, 125, 130, 140, 160]),
    ],
)
def test_shares_of_time(device, report, tmp_path, monkeypatch, seconds, taken, limits):
    clock, given = Clock(device, monkeypatch), []

    def run(name, command, limit, figures):
        clock.now += min(limit, taken.get(len(given), limit))
        given.append(limit)

    monkeypatch.setattr(report, "run", run)
    device.check(report, "cuda", 1000 + seconds, tmp_path)
    assert given == pytest.approx(limits)


# ------------------------------------------------------------------------------------------------------------- training


class Runs:
    """In place of ``Report.together``: runs that write metrics as ``train.py`` does, at a given pace, while time passes."""

    def __init__(self, clock, step, evaluation, begin):
        self._clock, self._step, self._evaluation, self._begin = clock, step, evaluation, begin
        self.commands = {}

    def __call__(self, commands, seconds, enough):
        self.commands |= commands
        began, done = self._clock.now, dict.fromkeys(commands, 0)
        due = {}  # when a run's next step is done, and its seconds of training
        for name in commands:
            due[name] = (began + self._begin + self._step[name.split()[0]], self._step[name.split()[0]])
        while self._clock.now < began + seconds and due and not enough():
            self._clock.now += 0.1
            for name, (at, trained) in list(due.items()):
                words = shlex.split(commands[name])
                option = {k: words[words.index(f"--{k}") + 1] for k in ("save_dir", "save_name")}
                steps, evaluate, log = (
                    int(words[words.index(f"--num_{k}_iter") + 1]) for k in ("train", "eval", "log")
                )
                pace = self._step[name.split()[0]]
                while at <= self._clock.now and name in due:
                    done[name] += 1
                    evaluates = done[name] % evaluate == 0 or done[name] == steps
                    if evaluates or done[name] % log == 0:
                        score = {"eval/top-1-acc": 0.001 * done[name] ** 0.5} if evaluates else {}
                        folder = self._folder(option)
                        with (folder / "metrics.jsonl").open("a") as file:
                            print(json.dumps({"step": done[name], **score, "seconds": trained}), file=file)
                    at += pace + (self._evaluation if evaluates else 0)
                    trained += pace
                    due[name] = (at, trained)
                    if done[name] == steps:
                        (self._folder(option) / "result.json").write_text("{}")
                        del due[name]
        enough()
        return {name: "stopped" if name in due else 0 for name in commands}

    @staticmethod
    def _folder(option):
        folder = Path(option["save_dir"]) / option["save_name"]
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_both_runs_have_the_steps_that_the_slower_can_do(device, tmp_path, monkeypatch, kind):
    report = device.Report(tmp_path, device.TRAIN, ABOUT, {})
    clock = Clock(device, monkeypatch)
    runs = Runs(clock, {"fixmatch": 0.02, "muscle_fixmatch": 0.04}, evaluation=2, begin=8)
    monkeypatch.setattr(report, "together", runs)
    folder = tmp_path / "runs"
    device.train(report, kind, tmp_path, 1000 + 390, folder)
    steps = report.content["steps"]
    paces = report.content["paces"]
    assert paces["fixmatch"]["step"] == pytest.approx(0.02)
    assert paces["muscle_fixmatch"] == pytest.approx({"step": 0.04, "evaluation": 2, "begin": 8}, abs=0.2)
    evaluate = {"cuda": 1000, "cpu": 100}[kind]
    left = 390 - 8 - (8 + 300 * 0.04 + 2 if kind == "cuda" else 8 + 20 * 0.04 + 2)
    assert steps == pytest.approx(device.FILLED * left / (0.04 + 2 / evaluate), rel=0.02)
    assert clock.now < 1390
    for algorithm in device.TRAINED:
        lines = [json.loads(line) for line in (tmp_path / f"train.{algorithm}.metrics.jsonl").open()]
        assert lines[-1]["step"] == steps
        assert all(line["wall"] > line["seconds"] + 7.9 for line in lines)
        assert (tmp_path / f"train.{algorithm}.result.json").exists()
    rows = {by: [r for r in report.content["accuracy"] if r["by"] == by] for by in ("step", "seconds", "wall")}
    assert all(row["fixmatch"] == row["muscle_fixmatch"] for row in rows["step"])
    assert rows["seconds"][-1]["fixmatch"]["step"] == steps
    assert rows["seconds"][-1]["muscle_fixmatch"]["step"] == pytest.approx(steps / 2, abs=evaluate)
    for command in runs.commands.values():
        words = [sys.executable, ROOT / "train.py", *shlex.split(command)[1:], "--print-config"]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60)
        assert done.returncode == 0, done.stderr


def test_no_training_where_no_step_is_done(device, tmp_path, monkeypatch):
    report = device.Report(tmp_path, device.TRAIN, ABOUT, {})
    clock = Clock(device, monkeypatch)
    monkeypatch.setattr(report, "together", Runs(clock, {"fixmatch": 9, "muscle_fixmatch": 9}, 1, 60))
    device.train(report, "cuda", tmp_path, 1400, tmp_path / "runs")
    assert clock.now == pytest.approx(1100, abs=0.2)
    assert "how long a step" in (tmp_path / "train.txt").read_text()


def test_lines_are_taken_over_whole_and_once(device, tmp_path, monkeypatch):
    clock, source, target = Clock(device, monkeypatch), tmp_path / "source", tmp_path / "target"
    curve = device.Curve(source, target)
    curve.follow()
    source.write_text('{"step": 1}\n{"st')
    clock.now += 1.5
    curve.follow()
    curve.follow()
    with source.open("a") as file:
        file.write('ep": 2}\n')
    clock.now += 2
    curve.follow()
    assert curve.lines == [{"step": 1, "wall": 1.5}, {"step": 2, "wall": 3.5}]
    assert [json.loads(line) for line in target.open()] == curve.lines


# -------------------------------------------------------------------------------------------------------------- summary


def evaluations(*of):
    """Lines of metrics: (step, seconds, wall, accuracy), and a line without an evaluation after each."""
    lines = []
    for step, seconds, wall, accuracy in of:
        lines.append({"step": step, "seconds": seconds, "wall": wall, "eval/top-1-acc": accuracy})
        lines.append({"step": step + 1, "seconds": seconds, "wall": wall})
    return lines


def test_equal_steps_and_equal_seconds(device_summary):
    fast = evaluations((10, 1, 11, 0.1), (20, 2, 12, 0.2), (30, 3, 13, 0.3), (40, 4, 14, 0.4))
    slow = evaluations((10, 3, 14, 0.3), (20, 6, 18, 0.5), (30, 9, 22, 0.6))
    rows = device_summary.compared({"fast": fast, "slow": slow})

    def of(by):
        score = device_summary.SCORE
        return [
            (r["at"], *(r[n] and (r[n]["step"], r[n][score]) for n in ("fast", "slow"))) for r in rows if r["by"] == by
        ]

    assert of("step") == [(10, (10, 0.1), (10, 0.3)), (20, (20, 0.2), (20, 0.5)), (30, (30, 0.3), (30, 0.6))]
    assert of("seconds") == [
        (1, (10, 0.1), None), (2, (20, 0.2), None), (3, (30, 0.3), (10, 0.3)), (4, (40, 0.4), (10, 0.3)),
    ]  # fmt: skip
    assert of("wall") == [(3.5, None, None), (7, None, None), (10.5, None, None), (14, (40, 0.4), (10, 0.3))]
    assert device_summary.compared({"fast": fast, "slow": []}) == []


def test_summary_of_training(device_summary, tmp_path):
    curves = {"fixmatch": evaluations((1000, 20, 30, 0.5)), "muscle_fixmatch": evaluations((1000, 40, 55, 0.75))}
    told = {**ABOUT, "steps": 12345, "trained": "`cnn13`", "accuracy": device_summary.compared(curves), "commands": []}
    (tmp_path / "train.json").write_text(json.dumps(told))
    assert device_summary.main([str(tmp_path)]) == 0
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("## NVIDIA H100, 2026-11-28: train\n")
    assert "revision abc1234, torch 2.11.0, triton 3.6.0, cuda 13.0, driver 580.1." in text
    assert "seed 0, `cnn13`, 12,345 steps planned" in text
    assert "| at | `fixmatch` | `muscle_fixmatch` |" in text
    assert "| step 1,000 | 50.0 (1,000) | 75.0 (1,000) |" in text
    assert "| 20 s of training | 50.0 (1,000) |  |" in text
    assert "| 30 s of wall clock, start included | 50.0 (1,000) |  |" in text


def test_summary_of_what_a_gpu_adds(device_summary):
    options = {"size": 32, "algorithm": "muscle_fixmatch", "net": "cnn13", "precision": "bf16", "batch": 64}
    views = {
        "views_per_second": {"iic": [1, 2e6, 3]}, "without_kernel": {"iic": [1, 5e5, 3]}, "notes": ["no Triton"],
        "seconds_of_a_steps_views": 0.001, "share_of_a_step": 0.05,
    }  # fmt: skip
    profile = {"seconds": 0.02, "cpu_seconds": 0.019, "gpu_seconds": 0.015, "gpu_share": 0.75, "kernels": 1234.4}
    tests = {"collected": 10, "passed": 4, "failed": 1, "skipped": 2, "failures": ["tests/test_x.py::test_y"]}
    figures = {"tests/test_x.py": tests, "views": {"options": options, "in_training": views}}
    figures["profile"] = {"options": options, "profile": profile}
    lines = device_summary.check_lines({"commands": [{"name": k, "figures": v} for k, v in figures.items()]})
    assert lines == [
        "- `tests/test_x.py`: 4 passed, 1 failed, 2 skipped, 3 not run; `tests/test_x.py::test_y`",
        "- views per second, 32 x 32: `iic` 2,000,000",
        "- views per second, 32 x 32, without the kernel: `iic` 500,000",
        "- no Triton",
        "- views of a MUSCLE + FixMatch step: 1.00 ms, 5.0 % of it with `cnn13` in bf16",
        "- a step of `muscle_fixmatch`, `cnn13`, bf16, 64 + 64 images: 20.0 ms, CPU 19.0 ms, GPU busy 15.0 ms (75 %),"
        " 1,234 kernel launches",
        "",
    ]


def test_no_summary_of_nothing(device_summary, tmp_path, capsys):
    assert device_summary.main([str(tmp_path)]) == 2
    assert re.fullmatch(rf"error: {tmp_path}: .*check\.json .*train\.json.*\n", capsys.readouterr().err)


# ------------------------------------------------------------------------------------------------------ tests on a GPU

SOME_TESTS = """
import ctypes, sys
def test_a_compiled_net(): pass
def test_that_ruins_the_context(): sys.modules["torch"].lost = True
def test_that_comes_after_it(): assert not sys.modules["torch"].lost
def test_that_fails(): assert 1 == 2, "one is not two"
def test_that_hangs(): ctypes.CDLL(None).sleep(60)
def test_views(): pass
"""
A_TORCH = """
import sys, types
def synchronize():
    if torch.lost:
        raise RuntimeError("CUDA error: device-side assert triggered")
cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
torch = sys.modules["torch"] = types.SimpleNamespace(lost=False, cuda=cuda)
"""


@pytest.mark.slow
def test_a_test_that_hangs_or_ruins_its_process_takes_no_other_with_it(device, tmp_path):
    (tmp_path / "conftest.py").write_text(A_TORCH)
    (tmp_path / "test_some.py").write_text(SOME_TESTS)
    results = tmp_path / "results.json"
    command = device.checks("cpu")[device.CUDA_TESTS[0]][1].replace("--timeout 60", "--timeout 3")
    words = [*shlex.split(command)[:-1], "test_some.py", "--json", results]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    found = json.loads(results.read_text())
    failures = {f"test_some.py::test_that_{what}" for what in ("ruins_the_context", "fails", "hangs")}
    assert set(found.pop("failures")) == failures, done.stdout
    assert found == {"collected": 6, "passed": 3, "failed": 3, "skipped": 0}
    assert done.returncode == 1
    assert "one is not two" in done.stdout


def test_order_of_the_tests_on_a_gpu():
    from benchmarks.device_tests import turn

    names = ["kernel", "views[3]", "steady_step_never_waits_for_the_device[muscle_fixmatch-bf16]",
             "it_trains_in_every_precision[fp16]", "label_propagation", "steady_step[dash]", "loss_scaler",
             "is_not[default-muscle_fixmatch]", "is_not[reduce-overhead-muscle_fixmatch]", "compiled_views"]  # fmt: skip
    turns = [turn(f"tests/test_kernel.py::test_{name}") for name in names]
    assert turns == sorted(set(turns))
