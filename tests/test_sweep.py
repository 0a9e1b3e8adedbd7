"""Sweeps from the command line: what is finished is skipped, what was killed goes on, what fails stops nothing else."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from plugin_fixture import plugins_forgotten  # noqa: F401

from muscle_plugin import cli
from muscle_plugin.errors import InputError
from muscle_plugin.settings.resolve import load_settings
from muscle_plugin.settings.sources import Layer
from muscle_plugin.studies import dry_run
from muscle_plugin.studies.jobs import jobs_of

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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_needs_anothers_weights_waits_for_them(tmp_path):
    (tmp_path / "before.yaml").write_text("dataset: digits\nalgorithm: muscle\nstage: pretrain\n")
    after = "dataset: digits\nalgorithm: supervised\ninit_from: '{save_dir}/before_{seed}/latest_model.pth'\n"
    (tmp_path / "after.yaml").write_text(after)
    files = (tmp_path / "after.yaml", tmp_path / "before.yaml")
    code, out = sweep(*files, "--seeds", 1, "--jobs", 2, "--save_dir", tmp_path / "runs", *LIGHT)
    assert code == 0, out
    assert out.index("before, seed 0") < out.index("after, seed 0")
    assert set(results(tmp_path / "runs")) == {"before_0", "after_0"}


def configured(folder, **inits):
    """Files of configurations that start from one another's weights."""
    for name, init in inits.items():
        start = f"init_from: '{{save_dir}}/{init}_{{seed}}/latest_model.pth'\n" if init else ""
        (folder / f"{name}.yaml").write_text(f"extends: supervised_digits_10\n{start}")
    return [str(folder / f"{name}.yaml") for name in inits]


@pytest.mark.parametrize(
    ("inits", "named"),
    [({"a": "a"}, "a_0 from a_0"), ({"a": "b", "b": "c", "c": "a"}, "a_0 from b_0 from c_0 from a_0")],
)
def test_runs_that_start_from_their_own_weights_are_refused(inits, named, tmp_path, capsys):
    files = configured(tmp_path, **inits, other=None)
    assert cli.main(["sweep", *files, "--seeds", "1", "--save_dir", str(tmp_path / "runs")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: init_from: ")
    circle = line.rpartition(": ")[2].split(" from ")
    assert circle[0] == circle[-1]
    assert set(circle) == set(named.split(" from "))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_run_whose_predecessor_failed_is_not_begun_and_says_why(tmp_path, capsys):
    first, second, third = configured(tmp_path, first=None, second="first", third="second")
    (tmp_path / "first.yaml").write_text(f"dataset: cifar10\nalgorithm: supervised\ndata_dir: {tmp_path}\n")
    words = [third, second, first, "--seeds", "1", "--jobs", "1", "--save_dir", str(tmp_path / "runs"), *LIGHT]
    assert cli.main(["sweep", *words]) == 1
    out = capsys.readouterr().out
    assert "second, seed 0: not begun, since first_0 did not finish" in out
    assert "third, seed 0: not begun, since second_0 did not finish" in out
    assert not list((tmp_path / "runs").glob("second_*")) + list((tmp_path / "runs").glob("third_*"))


# ------------------------------------------------------------------------------------------------------------- dry runs


@pytest.fixture
def timed(monkeypatch):
    """The algorithms that dry runs build, and with each the steps that it trains."""
    from muscle_plugin.runs import build as module
    from muscle_plugin.training.host import Host

    found, build, step = [], module.build, Host.in_step

    def building(*args, **kwargs):
        found.append((build(*args, **kwargs), []))
        return found[-1][0]

    def stepping(self):
        if self.it not in found[-1][1]:  # it is asked for more than once in a step
            found[-1][1].append(self.it)
        return step(self)

    monkeypatch.setattr(module, "build", building)
    monkeypatch.setattr(Host, "in_step", stepping)
    return found


def cells(out, name):
    """The row of a configuration in the table of a dry run."""
    (line,) = [x for x in out.splitlines() if x.startswith(f"│ {name} ")]
    return [c.strip() for c in line.split("│")[2:-1]]


def test_a_dry_run_times_each_kind_of_run_once_and_trains_nothing(timed, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    words = [
        "muscle_digits_10",
        "fixmatch_digits_*",
        "--seeds",
        "3",
        "--jobs",
        "2",
        "--save_dir",
        str(tmp_path / "runs"),
    ]
    assert cli.main(["sweep", *words, "--dry-run"]) == 0
    assert not (tmp_path / "runs").exists()
    assert [a.args.algorithm for a, _ in timed] == ["muscle", "fixmatch"]
    most = dry_run.WARM_UP_STEPS + dry_run.TIMED_STEPS
    assert all(1 < len(steps) <= most and steps == [*range(len(steps))] for _, steps in timed)
    out = capsys.readouterr().out
    assert "15 runs, 2 at a time" in out
    assert cells(out, "fixmatch_digits_100")[:3] == ["3", "0", "1,200"]
    assert "Left: " in out


def test_a_dry_run_counts_what_is_left_of_runs(make_run, tmp_path, monkeypatch):
    settings = {"save_dir": str(tmp_path / "runs"), "num_threads": 1}
    make_run("muscle_digits_10", 0, **settings)
    make_run("muscle_digits_10", 1, stopped_at=900, **settings)
    jobs = jobs_of(["muscle_digits_10"], 3, Layer("test", settings))
    assert [job.state for job in jobs] == ["finished", "cut off", "new"]
    timing = dry_run.Timing(images=1437, labelled=10, steps=1200, stages=((0, 2.0),))
    assert [timing.seconds(1200, job.result.get("steps", 0)) for job in jobs] == [0, 600, 2400]


def test_the_stages_of_a_run_are_timed_each(timed, tmp_path):
    (job,) = jobs_of(["labelprop_digits_10"], 1, Layer("test", {"save_dir": str(tmp_path)}))
    timing = dry_run._timed(job)
    assert [start for start, _ in timing.stages] == [0, 600]
    ((algorithm, steps),) = timed
    assert steps[0] == 0
    assert 601 in steps
    assert algorithm.pseudo_labels is None  # no label was propagated
    by_hand = dry_run.Timing(1437, 10, 1200, ((0, 1.0), (600, 3.0)))
    assert [by_hand.seconds(1200, done) for done in (0, 500, 900, 1200)] == [2400, 1900, 900, 0]
    assert by_hand.seconds(400, 0) == 200 + 600


@pytest.mark.parametrize(
    ("changes", "alike"),
    [
        ({"lr": 0.5, "num_labels": 20, "epoch": 9, "seed": 3, "save_dir": "elsewhere", "keep_checkpoints": 9}, True),
        ({"net": "cnn13"}, False),
        ({"net_dropout": 0.5}, False),
        ({"precision": "bf16"}, False),
        ({"dataset": "cifar10"}, False),
        ({"data_dir": "elsewhere"}, False),  # other images
        ({"num_threads": 2}, False),
        ({"mi_weight": 0}, False),  # nothing is forwarded for it
        ({"hard_views": 2}, False),
        ({"total_batch": 50}, False),
        ({"algorithm": "muscle_fixmatch"}, False),
    ],
)
def test_which_settings_make_steps_alike(changes, alike):
    one, other = load_settings("muscle_digits_10"), load_settings("muscle_digits_10", **changes)
    assert (dry_run._step_key(one) == dry_run._step_key(other)) == alike


def test_a_dry_run_counts_the_steps_of_an_epoch_over_a_folder_of_images(tmp_path):
    rng = np.random.default_rng(0)
    for name, unlabelled in (("a", 30), ("b", 90)):
        for i in range(unlabelled + 20):
            part = f"labelled/{i % 2}" if i < 20 else "unlabelled"
            (tmp_path / name / part).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / part / f"{i}.png")
        settings = "dataset: folder\nalgorithm: fixmatch\nimg_size: 16\ntotal_batch: 4\nepoch: 2\nnum_threads: 1\n"
        (tmp_path / f"{name}.yaml").write_text(f"{settings}data_dir: {tmp_path / name}\n")
    jobs = jobs_of([str(tmp_path / f"{n}.yaml") for n in "ab"], 1, Layer("test", {"save_dir": str(tmp_path / "r")}))
    timings = [dry_run._timed(job) for job in jobs]
    assert [t.steps_of(job.resolved) for t, job in zip(timings, jobs, strict=True)] == [30, 90]
    assert [t.steps for t in timings] == [30, 90]


def test_a_run_that_cannot_be_timed_is_told_of_and_the_others_count(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "no_data.yaml").write_text(f"dataset: cifar10\nnum_labels: 10\ndata_dir: {tmp_path}\n")
    words = ["--seeds", "1", "--save_dir", str(tmp_path / "runs"), "--dry-run"]
    assert cli.main(["sweep", str(tmp_path / "no_data.yaml"), "supervised_digits_10", *words]) == 0
    out = capsys.readouterr().out
    assert cells(out, "no_data")[2:] == ["?"] * 4
    assert "no_data: not timed: " in out
    assert cli.main(["sweep", str(tmp_path / "no_data.yaml"), *words]) == 2


#: A plugin whose algorithm has a setting of its own.
OWN = """
from semilearn.algorithms.fixmatch.fixmatch import FixMatch
from semilearn.algorithms.utils import SSL_Argument
from semilearn.core.utils import ALGORITHMS

@ALGORITHMS.register("own")
class Own(FixMatch):
    @staticmethod
    def get_argument():
        return [*FixMatch.get_argument(), SSL_Argument("--own_weight", float, 1.0)]
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--dry-run",), ()])
def test_a_setting_of_a_plugin_is_a_flag(more, tmp_path, plugins_forgotten, capsys):  # noqa: F811
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "mine.yaml").write_text("extends: supervised_digits_10\nalgorithm: own\nplugins: own.py\n")
    words = [str(tmp_path / "mine.yaml"), "--seeds", "1", "--save_dir", str(tmp_path / "runs"), "--plugins", *LIGHT]
    assert cli.main(["sweep", *words, "--own_weight", "0.25", *more]) == 0, capsys.readouterr()
    if not more:
        assert "own_weight: 0.25" in (tmp_path / "runs" / "mine_0" / "config.yaml").read_text()
    assert cli.main(["sweep", *words, "--own_wieght", "0.25", *more]) == 2
    assert "did you mean 'own_weight'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tabel1",), "no such study or configuration; did you mean 'table1'"),
        (("muscle_digits_10", "--seed", "3"), "--seed: a sweep decides it for each run itself; give --seeds N"),
        (("muscle_digits_10", "--seeds", "0"), "--seeds: must be at least 1, got 0"),
        (("muscle_digits_10", "--lrr", "3"), "--lrr is not a setting; did you mean 'lr'?"),
        (("muscle_digits_10", "--sedes", "3"), "--sedes is not a setting; did you mean 'seeds'?"),
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


@pytest.mark.slow
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


# ---------------------------------------------------------------------------------------------------------------- GPUs


#: A plugin that notes which GPU its process sees, in a file for each process.
SEEN = """
import os
from pathlib import Path
here = Path(__file__).with_name("seen")
here.mkdir(exist_ok=True)
(here / str(os.getpid())).write_text(str(os.environ.get("CUDA_VISIBLE_DEVICES")))
"""


@pytest.fixture
def gpus(monkeypatch):
    """A function that lets the sweep, but no run, find so many GPUs; runs train on the CPU. The environment may name some."""
    import torch

    def there(count, visible=None):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return there


@pytest.mark.parametrize(
    ("count", "visible", "words", "at_once", "names"),
    [
        (0, None, ("--jobs", "2"), 2, ()),
        (0, "", ("--jobs", "2"), 2, ()),
        (2, None, (), 2, ("0", "1")),
        (2, None, ("--jobs", "3"), 3, ("0", "1")),
        (2, None, ("--device", "cpu", "--jobs", "3"), 3, ()),
        (2, None, ("--gpus_per_run", "0.4"), 4, ("0", "1")),
        (1, None, ("--gpus_per_run", "0.5", "--jobs", "8"), 2, ("0",)),
        (2, "3,5", (), 2, ("3", "5")),
        (1, "7,9", (), 1, ("7",)),  # of which CUDA finds but the first
        (2, "GPU-8932f937,GPU-4c2a", (), 2, ("GPU-8932f937", "GPU-4c2a")),
        (1, "MIG-1a,MIG-2b", (), 2, ("MIG-1a", "MIG-2b")),  # of which a process sees one
    ],
)
def test_gpus_and_how_many_runs_share_them(
    gpus, monkeypatch, count, visible, words, at_once, names, tmp_path, capsys
):  # fmt: skip
    from muscle_plugin.studies import pool as module

    def local_pool(*asked):
        raise InputError(repr(asked))

    gpus(count, visible)
    monkeypatch.setattr(module, "LocalPool", local_pool)
    # what needs no GPU is first: the others want some all the same
    (tmp_path / "first.yaml").write_text("extends: supervised_digits_10\ndevice: cpu\n")
    runs = [str(tmp_path / "first.yaml"), "supervised_digits_10", "--save_dir", str(tmp_path / "runs")]
    assert cli.main(["sweep", *runs, *words]) == 2
    assert capsys.readouterr().err == f"error: {(at_once, names)!r}\n"


@pytest.mark.slow
def test_more_runs_than_gpus_take_them_in_turn(gpus, tmp_path, plugins_forgotten, capsys):  # noqa: F811
    gpus(2, "GPU-8932f937,GPU-4c2a")
    (tmp_path / "seen.py").write_text(SEEN)
    words = ("supervised_digits_10", "--seeds", 3, "--jobs", 3, "--save_dir", tmp_path / "runs", *LIGHT)
    assert cli.main(["sweep", *map(str, words), "--plugins", str(tmp_path / "seen.py")]) == 0
    (tmp_path / "seen" / str(os.getpid())).unlink()  # of this process, which reads the settings
    seen = sorted(p.read_text() for p in (tmp_path / "seen").iterdir())
    assert seen == ["GPU-4c2a", "GPU-8932f937", "GPU-8932f937"]
    assert "\n3 at a time; " in capsys.readouterr().out
    assert len(results(tmp_path / "runs")) == 3


@pytest.mark.parametrize(
    ("count", "words", "message"),
    [
        (2, ("--device", "cuda:1"), "--device: a sweep gives each run its GPU itself, got cuda:1; give --device cuda, and in"),
        (2, ("--gpu", "0"), "--device: a sweep gives each run its GPU itself, got cuda:0; give --device cuda"),
        (2, ("--gpus_per_run", "2"), "--gpus_per_run: a share of one GPU, above 0 and at most 1, got 2"),
        (2, ("--gpus_per_run", "0"), "--gpus_per_run: a share of one GPU, above 0 and at most 1, got 0"),
        (2, ("--device", "cpu", "--gpus_per_run", "0.5"), "--gpus_per_run: asks for GPUs, but there are none for these runs ("),
        (0, ("--gpus_per_run", "0.5"), "--gpus_per_run: asks for GPUs, but there are none for these runs (this machine has no"),
        (0, ("--device", "cuda"), "device cuda: asks for GPUs, but there are none for these runs (this machine has no usable"),
        (0, ("--device", "cuda", "--ray"), "device cuda: asks for GPUs, but there are none for these runs"),
        (2, ("--jobs", "3", "--ray", "auto"), "--jobs: the cluster at auto runs as many as it has room for (--gpus_per_run)"),
    ],
)  # fmt: skip
def test_gpus_that_runs_cannot_have_are_one_line_and_nothing_is_begun(gpus, count, words, message, tmp_path, capsys):
    gpus(count)
    assert cli.main(["sweep", "supervised_digits_10", "--save_dir", str(tmp_path / "runs"), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not (tmp_path / "runs").exists()


def test_a_configuration_that_names_a_gpu_is_named(tmp_path, capsys):
    (tmp_path / "second.yaml").write_text("extends: supervised_digits_10\ndevice: cuda:1\n")
    words = ["supervised_digits_10", str(tmp_path / "second.yaml"), "--save_dir", str(tmp_path / "runs")]
    assert cli.main(["sweep", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: second: device: a sweep gives each run its GPU itself, got cuda:1")


@pytest.mark.parametrize(("share", "runs"), [(1, 1), (0.5, 2), (0.4, 2), (0.3, 3), (0.1, 10), (1 / 3, 3), (0.3333, 3)])
def test_a_share_of_a_gpu_leaves_room_for_so_many_runs(share, runs):
    from muscle_plugin.studies.pool import runs_per_gpu

    assert runs_per_gpu(share) == runs


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("ray"), reason="Ray is not installed (extra `cluster`)")
def test_on_ray_more_jobs_than_gpus_share_them(gpus, tmp_path, plugins_forgotten, capsys):  # noqa: F811
    gpus(1)
    (tmp_path / "seen.py").write_text(SEEN)
    words = ("supervised_digits_10", "--seeds", 2, "--jobs", 2, "--ray", "--save_dir", tmp_path / "runs", *LIGHT)
    assert cli.main(["sweep", *map(str, words), "--plugins", str(tmp_path / "seen.py")]) == 0
    (tmp_path / "seen" / str(os.getpid())).unlink()
    assert "\n2 at a time; " in capsys.readouterr().out
    assert len(results(tmp_path / "runs")) == 2
    assert {p.read_text() for p in (tmp_path / "seen").iterdir()} == {"0"}


@pytest.mark.slow
def test_a_worker_keeps_no_memory_of_a_run_that_is_over(tmp_path, monkeypatch):
    """Its next run, or another process, wants it: a compiled net refers to itself, and PyTorch keeps what is freed of a GPU."""
    import gc

    import torch

    from muscle_plugin.studies.pool import execute

    def parameters():
        return sum(type(x) is torch.nn.Parameter for x in gc.get_objects())

    given_back = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(parameters()))
    gc.collect()
    before = parameters()
    settings = dict(zip([w[2:] for w in LIGHT[::2]], LIGHT[1::2], strict=True)) | {"num_train_iter": 2, "device": "cpu"}
    gc.disable()
    try:
        outcome = execute("fixmatch_digits_10", {**settings, "save_dir": str(tmp_path), "compile": "default"}, [])
    finally:
        gc.enable()
    assert outcome[0] == "finished"
    assert given_back == [before]
