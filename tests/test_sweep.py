"""Sweeps from the command line: what is finished is skipped, what was killed goes on, what fails stops nothing else."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec

import pytest
from conftest import ROOT

from muscle_plugin import cli

LIGHT = (
    "--num_train_iter",
    "40",
    "--epoch",
    "2",
    "--num_eval_iter",
    "20",
    "--use_tensorboard",
    "false",
    "--total_batch",
    "24",
)


def start(*words, **more):
    return subprocess.Popen(
        [sys.executable, "-m", "muscle_plugin.cli", "sweep", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True, **more,
    )  # fmt: skip


def sweep(*words):
    process = start(*words)
    out, _ = process.communicate(timeout=400)
    return process.returncode, out


def results(folder):
    return {p.parent.name: json.loads(p.read_text()) for p in folder.glob("*/result.json")}


def steps(run):
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_failing_run_stops_no_other_and_what_is_finished_is_not_trained_again(tmp_path):
    bad = tmp_path / "no_data.yaml"
    bad.write_text(f"dataset: cifar10\nnum_labels: 10\ndata_dir: {tmp_path}\n")
    names, where = (bad, "supervised_digits_10", "muscle_digits_20"), tmp_path / "runs"
    words = (*names, "--seeds", 2, "--jobs", 1, "--save_dir", where, *LIGHT)
    code, out = sweep(*words)
    assert code == 1, out
    done = results(tmp_path / "runs")
    assert set(done) == {f"{n}_{s}" for n in ("supervised_digits_10", "muscle_digits_20") for s in (0, 1)}
    assert all(r["complete"] and r["steps"] == 40 for r in done.values())
    assert [r["seed"] for _, r in sorted(done.items())] == [0, 1, 0, 1]
    assert "failed: no_data, seed 1: " in out
    assert str(tmp_path / "runs" / "no_data_1" / "log.txt") in out
    failure = json.loads((tmp_path / "runs" / "no_data_0" / "failure.json").read_text())
    assert str(tmp_path) in failure["error"]
    before = {n: (tmp_path / "runs" / n / "result.json").stat().st_mtime_ns for n in done}
    code, out = sweep(*words[1:])
    assert (code, "4 of them finished before" in out) == (0, True)
    assert {n: (tmp_path / "runs" / n / "result.json").stat().st_mtime_ns for n in done} == before
    code, out = sweep("supervised_digits_10", "--seeds", 1, *words[5:], "--lr", "0.3")
    assert code == 2
    assert "this run began with other settings: lr was 0.05, now 0.3. Give another --save_dir" in out
    assert results(tmp_path / "runs") == done


def wait_for(condition, process, seconds=300):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


def test_a_killed_sweep_leaves_nothing_running_and_goes_on_where_it_was(tmp_path):
    runs = tmp_path / "runs"
    long = ("--num_train_iter", "200", "--epoch", "2", "--num_eval_iter", "20", "--use_tensorboard", "false")
    words = ("muscle_digits_10", "--seeds", 2, "--jobs", 2, "--save_dir", runs, *long)
    process = start(*words)
    wait_for(lambda: len(list(runs.glob("*/latest_model.pth"))) == 2, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.read()  # ends when the last process that writes to it has ended
    cut = results(runs)
    assert all(not r["complete"] and r["steps"] >= 20 for r in cut.values())
    code, out = sweep(*words)
    assert code == 0, out
    assert all(r["complete"] and r["steps"] == 200 for r in results(runs).values())
    for name in cut:
        assert steps(runs / name) == list(range(10, 201, 10))
        assert len(json.loads((runs / name / "environment.json").read_text())["continuations"]) == 1


def test_a_process_that_dies_is_replaced_and_its_run_goes_on(tmp_path):
    import psutil

    runs = tmp_path / "runs"
    process = start(
        "muscle_digits_10", "--seeds", 1, "--jobs", 1, "--save_dir", runs, *LIGHT, "--num_train_iter", "200"
    )
    wait_for(lambda: list(runs.glob("*/latest_model.pth")), process)
    (worker,) = [p for p in psutil.Process(process.pid).children() if "spawn_main" in str(p.cmdline())]
    worker.kill()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert steps(runs / "muscle_digits_10_0") == list(range(10, 201, 10))
    environment = json.loads((runs / "muscle_digits_10_0" / "environment.json").read_text())
    assert len(environment["continuations"]) == 1


def ignore_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what a script starts in the background


def test_ctrl_c_saves_what_runs_and_says_what_is_left(tmp_path):
    runs = tmp_path / "runs"
    words = ("muscle_digits_10", "--seeds", 3, "--jobs", 1, "--save_dir", runs, "--use_tensorboard", "false")
    process = start(*words, preexec_fn=ignore_interrupts)
    wait_for(lambda: len(list(runs.glob("*/latest_model.pth"))) == 1, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 130
    (result,) = results(runs).values()
    assert f"stopped after step {result['steps']} of 1200" in out
    assert "0 of 3 runs finished" in out
    assert "Traceback" not in out


def test_what_needs_anothers_weights_waits_for_them(tmp_path):
    (tmp_path / "before.yaml").write_text("dataset: digits\nalgorithm: muscle\nstage: pretrain\n")
    after = "dataset: digits\nalgorithm: supervised\ninit_from: '{save_dir}/before_{seed}/latest_model.pth'\n"
    (tmp_path / "after.yaml").write_text(after)
    files = (tmp_path / "after.yaml", tmp_path / "before.yaml")
    code, out = sweep(*files, "--seeds", 1, "--jobs", 2, "--save_dir", tmp_path / "runs", *LIGHT)
    assert code == 0, out
    assert out.index("before, seed 0") < out.index("after, seed 0")
    assert set(results(tmp_path / "runs")) == {"before_0", "after_0"}


def test_dry_run_measures_and_trains_nothing(tmp_path):
    code, out = sweep(
        "muscle_digits_10", "fixmatch_digits_*", "--seeds", 3, "--save_dir", tmp_path / "runs", "--dry-run"
    )
    assert code == 0, out
    assert not (tmp_path / "runs").exists()
    assert "15 runs" in out
    assert out.count("1,200") == 5
    assert "Left: " in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tabel1",), "no such study or configuration; did you mean 'table1'?"),
        (("muscle_digits_10", "--seed", "3"), "--seed: a sweep decides it for each run itself; give --seeds N"),
        (("muscle_digits_10", "--seeds", "0"), "--seeds: must be at least 1, got 0"),
        (("muscle_digits_10", "--lrr", "3"), "--lrr is not a setting; did you mean 'lr'?"),
        (("muscle_digits_10", "--num_labels", "13"), "--num_labels: 13 cannot be shared equally"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_begun(words, message, tmp_path, capsys):
    try:
        code = cli.main(["sweep", *words, "--save_dir", str(tmp_path / "runs")])
    except SystemExit as e:  # of argparse
        code = e.code
    assert code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(not find_spec("ray"), reason="Ray is not installed (extra `cluster`)")
def test_on_ray_a_sweep_with_a_killed_worker_is_complete_and_each_run_once(tmp_path):
    import psutil

    runs = tmp_path / "runs"
    configs = [f"{a}_digits_10" for a in ("supervised", "fixmatch", "muscle")]
    words = (*configs, "--seeds", 2, "--jobs", 2, "--ray", "--save_dir", runs, *LIGHT, "--num_train_iter", "120")
    process = start(*words)
    wait_for(lambda: len(list(runs.glob("*/latest_model.pth"))) >= 2, process)
    workers = [
        p for p in psutil.Process(process.pid).children(recursive=True) if "ray::execute" in p.name() + str(p.cmdline())
    ]
    assert workers
    workers[0].kill()
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    done = results(runs)
    assert len(done) == 6
    assert all(r["complete"] and r["steps"] == 120 for r in done.values())
    assert all(steps(runs / name) == list(range(10, 121, 10)) for name in done)
    reported = Counter(line.split("]")[1].split(":")[0] for line in out.splitlines() if line.startswith("["))
    assert len(reported) == 6
    assert set(reported.values()) == {1}
    again = [json.loads((runs / n / "environment.json").read_text()).get("continuations", []) for n in done]
    assert sum(map(len, again)) <= 1  # only the killed one, if it had saved something
