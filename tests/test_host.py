"""The host: runs that learn, write what they promise, are cut off and go on exactly."""

import ast
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CONFIGS, ROOT, SHORT
from sklearn import metrics as sklearn_metrics

from muscle_plugin.algorithms.muscle import Muscle
from muscle_plugin.errors import DataError, DeviceError, InputError, Interrupted, RunError
from muscle_plugin.files import atomic_write, load_tensors, save_tensors
from muscle_plugin.run_files import saved_checkpoints
from muscle_plugin.runs.environment import environment
from muscle_plugin.runs.train import resume_command
from muscle_plugin.settings.resolve import load_settings
from muscle_plugin.training.evaluation import prediction_metrics
from muscle_plugin.training.hooks import EMA, HostLoggingHook
from muscle_plugin.training.host import Host
from muscle_plugin.training.state import NOT_CAPTURED


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_time(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def weights(run_dir):
    checkpoint = load_tensors(run_dir / "latest_model.pth")
    return checkpoint["model"], checkpoint["ema_model"]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_a_run_writes_what_it_promises(short_run, tmp_path):
    result = short_run(algorithm="muscle_fixmatch", save_name="r", use_tensorboard=True)
    run_dir = tmp_path / "r"
    assert result == json.loads((run_dir / "result.json").read_text())
    wanted = (
        "algorithm dataset num_labels seed complete steps best_top1 last_top1 median20_top1 seconds images_per_second"
    )
    assert set(wanted.split()) <= set(result)
    assert (result["complete"], result["steps"], result["algorithm"]) == (True, 6, "muscle_fixmatch")
    assert 0 <= result["last_top1"] <= result["best_top1"] <= 1
    assert [row["step"] for row in lines(run_dir)] == [2, 3, 4, 6]
    last = lines(run_dir)[-1]
    assert {
        "lr",
        "train/mi",
        "train/entropy",
        "train/conditional_entropy",
        "train/total_loss",
        "eval/top-1-acc",
    } <= set(last)
    assert last["train/mi"] == pytest.approx(last["train/entropy"] - last["train/conditional_entropy"], abs=1e-5)
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["torch"] == torch.__version__.split("+")[0] or environment["torch"] == torch.__version__
    assert {"git_revision", "semilearn", "device", "command"} <= set(environment)
    assert list((run_dir / "tensorboard").iterdir())
    assert not [p for p in run_dir.rglob("*") if p.suffix == ".part"]


def test_the_recorded_command_has_no_path_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here, outside = tmp_path / "my runs" / "a", tmp_path.parent / f"{tmp_path.name}-b"
    algorithm = Namespace(
        device=torch.device("cpu"), precision="fp32", args=Namespace(world_size=1), model=torch.nn.Linear(1, 1)
    )
    words = ["train.py", "--save_dir", str(here), f"--data_dir={here}", f"--c={outside}", f"{outside}{here}", "a"]
    recorded = environment(algorithm, load_settings(None), words)["command"]
    assert recorded == ["train.py", "--save_dir", "my runs/a", "--data_dir=my runs/a", *words[4:]]


def test_the_checkpoint_is_plain_data_with_usb_names(short_run, tmp_path):
    short_run(algorithm="fixmatch", save_name="r")
    checkpoint = torch.load(tmp_path / "r" / "latest_model.pth", weights_only=True)
    assert {"model", "ema_model", "it", "epoch", "best_it", "best_eval_acc"} <= set(checkpoint)
    assert checkpoint["it"] == 6


def test_same_seed_same_weights_other_seed_others(short_run, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        short_run(algorithm="muscle", save_name=name, seed=seed)
    assert_same(weights(tmp_path / "a")[1], weights(tmp_path / "b")[1])
    assert without_time(lines(tmp_path / "a")) == without_time(lines(tmp_path / "b"))
    a, c = weights(tmp_path / "a")[0], weights(tmp_path / "c")[0]
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_seed_changes_labels_initial_weights_and_order(build_short):
    a, b = build_short(algorithm="fixmatch", seed=0), build_short(algorithm="fixmatch", seed=1)
    assert not torch.equal(a.split.labelled, b.split.labelled)
    assert any(not torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))
    orders = [[x.batches.order["unlabelled"].batch(t) for t in range(3)] for x in (a, b)]
    assert not torch.equal(torch.cat(orders[0]), torch.cat(orders[1]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm", ["muscle_fixmatch", "muscle_meanteacher", "muscle_mixmatch", "muscle_comatch", "flexmatch"]
)
@pytest.mark.parametrize("cut", [2, 3, 5])
def test_a_cut_off_run_goes_on_exactly(short_run, tmp_path, algorithm, cut, monkeypatch):
    """Stopped after ``cut`` steps: within an epoch, at its end (also an evaluation), between two log lines."""
    from muscle_plugin.training.host import Host

    short_run(algorithm=algorithm, save_name="whole")
    original = Host._save_if_due

    def stop(self):
        if self.it == cut:
            self.request_stop()
        original(self)

    monkeypatch.setattr(Host, "_save_if_due", stop)
    with pytest.raises(Interrupted, match=rf"\b{cut} of 6\b"):
        short_run(algorithm=algorithm, save_name="cut")
    half = json.loads((tmp_path / "cut" / "result.json").read_text())
    assert (half["complete"], half["steps"]) == (False, cut)
    monkeypatch.setattr(Host, "_save_if_due", original)
    short_run(algorithm=algorithm, save_name="cut", resume="yes")
    for whole, cut_off in zip(weights(tmp_path / "whole"), weights(tmp_path / "cut"), strict=True):
        assert_same(whole, cut_off)
    assert without_time(lines(tmp_path / "whole")) == without_time(lines(tmp_path / "cut"))
    whole, cut_off = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("whole", "cut"))
    assert {k for k in whole if whole[k] != cut_off[k]} <= {"seconds", "images_per_second"}


def test_log_lines_written_after_the_checkpoint_are_not_repeated(short_run, tmp_path):
    short_run(algorithm="fixmatch", save_name="r")
    before = lines(tmp_path / "r")
    with (tmp_path / "r" / "metrics.jsonl").open("a") as f:
        f.write('{"step": 7, "lr": 1}\n{"step": 8, "l')  # a process that died while it logged
    short_run(algorithm="fixmatch", save_name="r", resume="yes")
    assert lines(tmp_path / "r") == before


def _start(tmp_path, *words):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--c", str(CONFIGS / "muscle_digits_10.yaml"), "--save_dir", str(tmp_path),
         "--save_name", "r", "--img_size", "16", "--num_train_iter", "60", "--total_batch", "16", "--num_eval_iter", "20",
         "--num_save_iter", "7", "--num_threads", "1", "--use_tensorboard", "false", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


def _wait_for_step(run_dir, process, step):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = run_dir / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) * 10 >= step:
            return
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_from_the_command_line_interrupted_or_killed_then_resumed(tmp_path, number):
    whole = _start(tmp_path / "whole")
    whole.communicate(timeout=300)
    assert whole.returncode == 0
    process = _start(tmp_path / "cut")
    _wait_for_step(tmp_path / "cut" / "r", process, 20)
    os.kill(process.pid, number)
    _, error = process.communicate(timeout=120)
    if number == signal.SIGINT:
        assert process.returncode == 130, error
        assert "to resume:" in error
        assert error.rstrip().endswith("--resume")
    again = _start(tmp_path / "cut", "--resume")
    _, error = again.communicate(timeout=300)
    assert again.returncode == 0, error
    assert_same(weights(tmp_path / "whole" / "r")[1], weights(tmp_path / "cut" / "r")[1])
    assert without_time(lines(tmp_path / "whole" / "r")) == without_time(lines(tmp_path / "cut" / "r"))


def test_an_existing_run_is_never_deleted_unasked(short_run, tmp_path):
    short_run(algorithm="supervised", save_name="r")
    kept = (tmp_path / "r" / "result.json").read_bytes()
    with pytest.raises(RunError, match=r"\b6 of 6\b.*--overwrite"):
        short_run(algorithm="supervised", save_name="r")
    with pytest.raises(RunError, match=r"\blr .*0\.05, .*0\.01\b"):
        short_run(algorithm="supervised", save_name="r", resume="yes", lr=0.01)
    assert (tmp_path / "r" / "result.json").read_bytes() == kept
    assert short_run(algorithm="supervised", save_name="r", overwrite=True, seed=3)["seed"] == 3


def test_a_run_that_failed_before_its_first_step_can_be_started_again(short_run, tmp_path):
    with pytest.raises(InputError, match="^net: .*'nonsense'"):
        short_run(save_name="r", net="nonsense")
    assert short_run(save_name="r")["complete"]


def test_a_run_killed_before_its_first_checkpoint_can_be_started_again(short_run, tmp_path):
    short_run(save_name="r")
    for path in (tmp_path / "r").glob("*.pth"):
        path.unlink()
    with pytest.raises(RunError, match="finished run"):  # its figures are worth keeping
        short_run(save_name="r")
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    (tmp_path / "r" / "result.json").write_text(json.dumps(result | {"steps": 0, "complete": False}))
    (tmp_path / "r" / "metrics.jsonl").write_text('{"step": 2, "lr": 1}\n')
    (tmp_path / "r" / ".latest_model.pth.12ab.part").write_text("half of the first one")
    (tmp_path / "r" / "slurm-1.out").write_text("of a scheduler")
    with pytest.raises(RunError, match="unfinished run.*--overwrite"):
        short_run(save_name="r")
    assert short_run(save_name="r", resume="auto")["complete"]
    assert [row["step"] for row in lines(tmp_path / "r")] == [2, 3, 4, 6]
    assert "lr" in lines(tmp_path / "r")[0]
    assert lines(tmp_path / "r")[0]["lr"] != 1


@pytest.mark.parametrize("wrong", [{"num_labels": 7}, {"net": "nonsense"}, {"dataset": "folder", "num_classes": None}])
def test_a_run_is_overwritten_only_by_one_that_can_begin(short_run, tmp_path, wrong):
    short_run(save_name="r")
    kept = {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir() if p.is_file()}
    with pytest.raises((DataError, InputError)):
        short_run(save_name="r", overwrite=True, **wrong)
    assert {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir() if p.is_file()} == kept
    assert {p.name for p in tmp_path.iterdir()} == {"r", ".r.lock"}


def test_a_run_comes_back_if_the_one_that_was_to_overwrite_it_is_killed_first(short_run, tmp_path):
    short_run(save_name="r")
    (tmp_path / "r").rename(tmp_path / ".r.overwritten")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.yaml").write_text("lr: 1\n")
    with pytest.raises(RunError, match=r"finished run \(step 6 of 6\)"):
        short_run(save_name="r")
    assert short_run(save_name="r", overwrite=True, seed=3)["seed"] == 3
    assert {p.name for p in tmp_path.iterdir()} == {"r", ".r.lock"}


def test_a_continuation_keeps_the_environment_it_began_in(short_run, tmp_path):
    short_run(save_name="r")
    short_run(save_name="r", resume="yes")
    environment = json.loads((tmp_path / "r" / "environment.json").read_text())
    assert len(environment["continuations"]) == 1
    assert "resume" not in (tmp_path / "r" / "config.yaml").read_text()


def test_two_processes_cannot_write_one_run(short_run, tmp_path):
    from muscle_plugin.runs.directory import run_lock

    with run_lock(tmp_path / "r"), pytest.raises(RunError, match="another process"):
        short_run(save_name="r", overwrite=True)
    assert short_run(save_name="r")["complete"]


def test_ctrl_c_while_starting_is_no_traceback(monkeypatch):
    from muscle_plugin.cli import data, main, run_command, train

    def press(*_):
        raise KeyboardInterrupt

    for command in (train, data):
        monkeypatch.setattr(command, "configuration", press)
    assert run_command("train", ["--lr", "1"], "train.py") == 130
    assert main(["data", "show"]) == 130


def test_a_second_ctrl_c_in_the_middle_of_a_checkpoint_stops_at_once(tmp_path, monkeypatch, capsys):
    """PyTorch makes an error of its own of an interruption while it writes."""
    from muscle_plugin import cli, files

    save, write = Host._save_if_due, files._Hashing.write

    def press_once(self):
        if self.it == 3:
            signal.raise_signal(signal.SIGINT)
        save(self)

    def press_again(self, data):
        if saved_checkpoints(tmp_path / "r"):
            signal.raise_signal(signal.SIGINT)
        return write(self, data)

    monkeypatch.setattr(Host, "_save_if_due", press_once)
    monkeypatch.setattr(files._Hashing, "write", press_again)
    settings = SHORT | {"num_save_iter": 2, "save_dir": tmp_path, "save_name": "r"}
    assert cli.run_command("train", [str(w) for k, v in settings.items() for w in (f"--{k}", v)], "train.py") == 130
    lines = capsys.readouterr().err.strip().splitlines()
    assert (
        lines[-1]
        == "stopped at once; the same command starts again, with --resume from the last checkpoint if there is one"
    )
    assert all(line.startswith("note: ") for line in filter(None, lines[:-1]))
    (checkpoint,) = saved_checkpoints(tmp_path / "r")
    assert load_tensors(checkpoint)["it"] == 2
    assert not (tmp_path / "r" / "failure.json").exists()


def test_ctrl_c_while_python_ends_is_no_traceback():
    code = (
        "import atexit, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what runs in the background ignores it
        "from muscle_plugin.cli import as_program\n"
        "atexit.register(signal.raise_signal, signal.SIGINT)\n"
        "def press(): signal.raise_signal(signal.SIGINT)\n"
        "sys.exit(as_program(press))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (130, "")


def test_overwrite_leaves_other_folders_alone(short_run, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("...")
    with pytest.raises(RunError, match="thesis .*run directory"):
        short_run(save_name="thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


def test_nothing_to_resume_is_an_error_and_auto_starts(short_run, tmp_path):
    with pytest.raises(RunError, match="no checkpoint"):
        short_run(algorithm="supervised", save_name="r", resume="yes")
    assert short_run(algorithm="supervised", save_name="r", resume="auto")["complete"]


def test_a_damaged_or_foreign_checkpoint_is_one_line(short_run, tmp_path):
    short_run(algorithm="supervised", save_name="r")
    for path in (tmp_path / "r" / "latest_model.pth", tmp_path / "r" / "previous_model.pth"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RunError, match="latest_model.pth: damaged") as caught:
        short_run(algorithm="supervised", save_name="r", resume="yes")
    assert "\n" not in str(caught.value)
    short_run(algorithm="fixmatch", save_name="f")
    with pytest.raises(InputError, match="algorithm 'fixmatch'.* 'muscle_fixmatch'"):
        short_run(
            algorithm="muscle_fixmatch", save_name="n", resume="yes", load_path=str(tmp_path / "f" / "latest_model.pth")
        )


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    torch.save({"format": 1, "x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth: "):
        load_tensors(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_a_failed_write_keeps_the_old_file(tmp_path):
    save_tensors(tmp_path / "c.pth", {"x": 1})
    with pytest.raises(OSError, match="disk full"), atomic_write(tmp_path / "c.pth") as f:
        f.write(b"half")
        raise OSError("disk full")
    assert load_tensors(tmp_path / "c.pth") == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["c.pth"]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "auto"])
def test_precisions_train(short_run, tmp_path, precision):
    result = short_run(algorithm="muscle_fixmatch", precision=precision, save_name="p")
    assert result["precision"] == ("fp32" if precision == "auto" else precision)
    assert all(np.isfinite(v) for row in lines(tmp_path / "p") for v in row.values())


@pytest.mark.parametrize("name", ["simmatch", "muscle_simmatch"])
def test_what_no_cpu_computes_in_half_precision_is_one_line(short_run, name):
    with pytest.raises(DeviceError, match="^precision: simmatch .*bf16.*CPU.*--precision fp32"):
        short_run(algorithm=name, precision="bf16")


def test_mean_teacher_under_bf16_uses_the_teachers_own_weights(build_short):
    """Autocast's cache would hand the student's weights to the teacher."""
    algorithm = build_short(algorithm="meanteacher", precision="bf16")
    algorithm.call_hook("before_run")
    with torch.no_grad():
        for p in algorithm.ema_model.parameters():
            p.add_(torch.randn_like(p))
    x = algorithm.batches.batch(0)["x_lb"]
    with algorithm.amp_cm(), torch.no_grad():
        own = algorithm.model(x)["logits"]
        algorithm.ema.apply_shadow()
        averaged = algorithm.model(x)["logits"]
        algorithm.ema.restore()
        expected = algorithm.ema_model(x)["logits"]
    assert torch.equal(averaged, expected)
    assert not torch.equal(own, averaged)


def test_ema_is_usbs():
    from semilearn.core.utils import EMA as USBEMA

    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))

    a, b, shadow = net(), net(), net()
    ours, theirs = EMA(a, shadow, 0.9), USBEMA(b, 0.9)
    theirs.register()
    for step in range(5):
        for model in (a, b):
            torch.manual_seed(step)
            model(torch.randn(8, 4)).sum()
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn_like(p))
        ours.update()
        theirs.update()
    for name, value in shadow.named_parameters():
        torch.testing.assert_close(value, theirs.shadow[name])
    assert torch.equal(shadow[1].running_mean, a[1].running_mean)
    own = [p.clone() for p in a.parameters()]
    ours.apply_shadow()
    assert all(torch.equal(p, s) for p, s in zip(a.parameters(), shadow.parameters(), strict=True))
    ours.restore()
    assert all(torch.equal(p, o) for p, o in zip(a.parameters(), own, strict=True))


@pytest.mark.parametrize("c", [2, 7, 100])
def test_metrics_equal_scikit_learns(c):
    rng = np.random.default_rng(c)
    true = rng.integers(0, c, 300)
    predicted = np.where(rng.random(300) < 0.5, true, rng.integers(0, max(2, c // 2), 300))
    logits = torch.nn.functional.one_hot(torch.from_numpy(predicted), c).float()
    ours = prediction_metrics(logits, torch.from_numpy(true))
    average = {"average": "macro", "zero_division": 0}
    assert ours["top-1-acc"] == pytest.approx(sklearn_metrics.accuracy_score(true, predicted))
    assert ours["balanced_acc"] == pytest.approx(sklearn_metrics.balanced_accuracy_score(true, predicted))
    assert ours["precision"] == pytest.approx(sklearn_metrics.precision_score(true, predicted, **average))
    assert ours["recall"] == pytest.approx(sklearn_metrics.recall_score(true, predicted, **average))
    assert ours["F1"] == pytest.approx(sklearn_metrics.f1_score(true, predicted, **average))
    assert ours["top_class_share"] == np.bincount(predicted).max() / 300


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["train.py", "--c", "a b.yaml", "-o"], "python train.py --c 'a b.yaml' --resume"),
        (["muscle-plugin", "train", "--overwrite", "true", "--lr", "1"], "muscle-plugin train --lr 1 --resume"),
        (["train.py", "--resume", "auto", "--seed=3"], "python train.py --seed=3 --resume"),
        (["train.py", "--overwrite=1", "--resume"], "python train.py --resume"),
    ],
)
def test_the_command_to_go_on(command, expected):
    assert resume_command(command, load_settings(None), False) == expected


@pytest.mark.parametrize("flag", [["--load_path", "x.pth"], ["--load_path=x.pth"], ["--load-path", "x.pth"]])
def test_the_command_to_go_on_names_another_checkpoint_only_until_there_is_an_own_one(flag):
    resolved = replace(load_settings(None, load_path="x.pth"), sources={"load_path": "command line"})
    command = ["train.py", *flag, "--seed", "3"]
    assert resume_command(command, resolved, False) == f"python train.py {' '.join(flag)} --seed 3 --resume"
    assert resume_command(command, resolved, True) == "python train.py --seed 3 --resume"
    of_a_file = replace(resolved, sources={"load_path": "c.yaml"})
    assert resume_command(["train.py", "c.yaml"], of_a_file, True) == "python train.py c.yaml --load_path None --resume"


@pytest.mark.slow
def test_plain_lines_when_not_a_terminal(tmp_path):
    process = _start(tmp_path)
    out, _ = process.communicate(timeout=300)
    assert "\x1b" not in out
    assert "\r" not in out
    assert re.search("muscle .*digits.* 10 labels", out)
    assert "step 60/60" in out
    assert "images/s" in out
    assert "test accuracy" in out


def test_an_absent_gpu_is_one_line(short_run):
    if torch.cuda.device_count() > 7:
        pytest.skip("this machine has the GPU that the test takes to be absent")
    with pytest.raises(DeviceError, match=r"device: cuda:7 .*\b\d\b"):
        short_run(device="cuda:7")


def test_absent_cifar_says_how_to_provide_it(short_run, tmp_path, monkeypatch):
    from torchvision import datasets

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(datasets.CIFAR10, "download", no_network)
    with pytest.raises(DataError, match="downloaded.*cifar-10-batches-py.*--data_dir"):
        short_run(
            dataset="cifar10",
            img_size=32,
            data_dir=str(tmp_path / "none"),
            weak_augment="crop_flip",
            hard_augment="iic",
        )


def test_checkpoints_of_an_earlier_run_are_not_replaced_from_python(build_short):
    build_short(algorithm="fixmatch", num_train_iter=2).train()
    again = build_short(algorithm="fixmatch", num_train_iter=2)
    with pytest.raises(RunError, match="already holds a run"):
        again.train()
    again.load_model(again.run_dir / "latest_model.pth")
    again.train()
    build_short(algorithm="fixmatch", num_train_iter=2, overwrite=True).train()


@pytest.mark.parametrize("owner", [Host, Muscle, HostLoggingHook])
def test_what_our_mixins_keep_never_joins_the_state_of_usbs_classes(owner):
    """An attribute that one of them sets is annotated, and so left out, or one of USB's own that is saved by name."""
    tree = ast.parse(inspect.getsource(owner))
    stored = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    assert stored
    assert stored - NOT_CAPTURED <= {*inspect.get_annotations(owner), "device"}
