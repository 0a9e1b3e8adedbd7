"""Numbers that went wrong: losses that are not finite, collapse, labels and images that cannot be right, logs that grow."""

import json
import logging
import math
import pickle
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import in_processes, needs_fork

from muscle_plugin.algorithms.label_propagation import PseudoLabels
from muscle_plugin.algorithms.muscle import Muscle, chance_information
from muscle_plugin.cli import run_command
from muscle_plugin.data.checks import check_labels, equal_images, find_oddities, find_shortage
from muscle_plugin.data.source import Source
from muscle_plugin.data.splits import Split
from muscle_plugin.errors import ConfigError, DataError, InputError, Interrupted, NotFinite, WriteError
from muscle_plugin.files import load_tensors
from muscle_plugin.runs import logs
from muscle_plugin.settings.resolve import load_settings
from muscle_plugin.training import Host
from muscle_plugin.training.monitor import LOW_ENTROPY_LINES, MonitorState, TrainingMonitor
from muscle_plugin.usb.calls import speed_patches

CPU = torch.device("cpu")
NAN = float("nan")


def spoil(monkeypatch, steps, value=NAN, term="train/mi"):
    """Let MUSCLE's loss and one of its terms be ``value`` at these steps, counted from 1."""
    inner = Muscle.train_step

    def train_step(self, **batch):
        out, log = inner(self, **batch)
        if self.it + 1 in steps:
            out["loss"] = out["loss"] * value
            log[term] = log[term] * value
        return out, log

    monkeypatch.setattr(Muscle, "train_step", train_step)


def monitor(limit, said=None, labelled=(4,) * 10):
    """A monitor of losses on the CPU, which keeps what it tells the user in ``said``."""
    tell = [].append if said is None else said.append
    return TrainingMonitor(CPU, limit, tell, lambda *_: "advice", torch.tensor(labelled))


def image_folder(root, labelled, unlabelled=0, test=None):
    """Noise of 16 x 16 pixels, brighter by class: so many images of each class, and so many without one."""
    rng = np.random.default_rng(0)
    kinds = {f"{part}/{c}": n for part, of in (("labelled", labelled), ("test", test or {})) for c, n in of.items()}
    for number, (place, n) in enumerate({**kinds, "unlabelled": unlabelled}.items()):
        (root / place).mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 100, (16, 16, 3), np.uint8) + 60 * (number % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(root / place / f"{i}.png")
    return root


def train(tmp_path, words):
    """Run ``train`` on a single thread, into ``tmp_path``, and return its status."""
    words = f"{words} --save_dir {tmp_path} --save_name r --num_threads 1 --use_tensorboard false"
    return run_command("train", words.split(), "train.py")


def failure(run_dir):
    return json.loads((run_dir / "failure.json").read_text())


# --------------------------------------------------------------------------------------------------------- not finite


def test_a_learning_rate_far_too_high_is_one_line_with_status_1(tmp_path, capsys):
    words = "--algorithm muscle_fixmatch --img_size 16 --total_batch 16 --num_train_iter 60 --num_eval_iter 50 --num_threads 1"
    words += f" --dataset digits --lr 1e6 --use_tensorboard false --save_name r --save_dir {tmp_path}"
    assert run_command("train", words.split(), "train.py") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: step \d+: .*\bloss .* step \d+; .*\btrain/.*no checkpoint", line)
    assert re.search(r"--lr .*\b1e\+06\b.* --clip_grad 1", line)
    assert "no update" not in line
    found = failure(tmp_path / "r")
    assert found["error"] == f"NotFinite: {line.removeprefix('error: ')}"
    assert found["weights_not_finite"] is None  # nobody looked
    assert found["noticed_at_step"] % 10 == 0
    assert 1 < found["not_finite_since_step"]["loss"] <= found["noticed_at_step"]


def test_the_checkpoint_before_stays_and_says_where(short_run, tmp_path, monkeypatch):
    """Checkpoint at 3, NaN at step 5: nothing after it is written, and the message has it all."""
    plan = {
        "algorithm": "muscle_fixmatch",
        "num_log_iter": 2,
        "num_eval_iter": 3,
        "num_train_iter": 12,
        "save_name": "r",
    }
    spoil(monkeypatch, {5})
    with pytest.raises(NotFinite) as caught:
        short_run(**plan)
    text, found = str(caught.value), failure(tmp_path / "r")
    assert re.match(r"step 5: .*\bloss .*\bstep 6; .*: train/mi;", text)
    assert "step 4: train/sup_loss" in text
    assert f"{tmp_path}/r/latest_model.pth of step 3" in text
    assert "\n" not in text
    assert found["not_finite_since_step"]["train/mi"] == 5
    if speed_patches():  # else USB logs it as a number, which is not watched
        assert found["not_finite_since_step"]["train/sup_loss"] == 6
    assert (found["last_checkpoint_step"], found["last_finite"]["step"]) == (3, 4)
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").open()]
    assert [r["step"] for r in rows] == [2, 3, 4]
    for name in ("latest_model.pth", "model_best.pth"):
        checkpoint = load_tensors(tmp_path / "r" / name)
        assert checkpoint["it"] == 3
        assert all(v.isfinite().all() for net in ("model", "ema_model") for v in checkpoint[net].values())
    start = {"init_from": str(tmp_path / "r" / "latest_model.pth"), "init_head": True, "lr": 0.001}
    monkeypatch.undo()  # what the message proposes
    assert short_run(**{**plan, **start, "save_name": "new"})["complete"]
    assert short_run(**plan, resume="yes")["complete"]
    assert not (tmp_path / "r" / "failure.json").exists()


@pytest.mark.parametrize(
    ("where", "error", "after"),
    [
        ("train_step", RuntimeError("out of everything"), 4),
        ("_save_if_due", WriteError(28, "No space left on device", "latest_model.pth"), 5),
    ],
)
def test_a_failure_of_any_kind_says_at_which_step(short_run, tmp_path, monkeypatch, where, error, after):
    owner = Muscle if where == "train_step" else Host
    inner = getattr(owner, where)

    def fails(self, **batch):
        if self.it == after:
            raise error
        return inner(self, **batch)

    monkeypatch.setattr(owner, where, fails)
    with pytest.raises(RuntimeError):
        short_run(algorithm="muscle_fixmatch", save_name="r")
    assert failure(tmp_path / "r")["after_step"] == after
    with pytest.raises(InputError, match="^net: .*'nonsense'"):
        short_run(save_name="n", net="nonsense")
    assert "after_step" not in failure(tmp_path / "n")  # none was begun


def test_weights_lost_in_the_last_step_reach_no_checkpoint(short_run, tmp_path, monkeypatch):
    """The loss of the step is finite: only the weights show it."""
    inner = torch.optim.SGD.step

    def step(self, *args, **kwargs):
        out = inner(self, *args, **kwargs)
        step.count += 1
        if step.count == 6:
            with torch.no_grad():
                self.param_groups[0]["params"][0].mul_(math.inf)
        return out

    step.count = 0
    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with pytest.raises(NotFinite, match=r"^step 6: .*weight of the net .*\bstep 6;.* smaller --lr "):
        short_run(algorithm="fixmatch", save_name="r", num_save_iter=2)
    assert load_tensors(tmp_path / "r" / "latest_model.pth")["it"] == 4
    assert any("weight of the net" in name for name in failure(tmp_path / "r")["weights_not_finite"])


@pytest.mark.parametrize("lost_at", [1, 2])
def test_the_learning_rate_is_blamed_only_where_weights_were_updated(short_run, monkeypatch, lost_at):
    spoil(monkeypatch, {lost_at})
    with pytest.raises(NotFinite) as caught:
        short_run(algorithm="muscle", save_name="r", num_log_iter=3)
    assert ("smaller --lr" in str(caught.value)) == (lost_at > 1)
    assert ("learning rate is not the cause" in str(caught.value)) == (lost_at == 1)


def test_the_learning_rate_can_be_blamed_after_a_warm_up_of_the_algorithms_own(short_run, monkeypatch):
    """Dash trains before its first step."""
    spoil(monkeypatch, {1})
    with pytest.raises(NotFinite, match="^step 1: .* smaller --lr"):
        short_run(algorithm="muscle_dash", num_wu_iter=2, save_name="r")


def test_a_value_lost_before_does_not_date_the_loss():
    watch, one = monitor(0), torch.tensor(1.0)
    for step, loss in enumerate((one, one, one * NAN), 1):
        watch.observe(step, loss, None, None, {"train/x": one * NAN})
    with pytest.raises(NotFinite, match="^step 3: the loss .*first non-finite .*train/x"):
        watch.check(3, {"longest": 1, "losses": 1}, {})


@pytest.mark.parametrize("more", ["", " --precision bf16", " --uratio 0.5 --batch_size 2"])
def test_softmatch_needs_a_variance(tmp_path, capsys, more):
    words = f"--c softmatch_digits_10 --batch_size 1 --uratio 1 --img_size 32{more}"
    assert train(tmp_path, words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: softmatch: .*variance .*\b2 or more unlabelled", line)


def test_a_stop_saves_nothing_that_is_lost(short_run, tmp_path, monkeypatch):
    spoil(monkeypatch, {3})
    inner = Host._save_if_due

    def stop(self):
        if self.it == 3:
            self.request_stop()
        inner(self)

    monkeypatch.setattr(Host, "_save_if_due", stop)
    with pytest.raises(NotFinite):
        short_run(algorithm="muscle", save_name="r", num_log_iter=50, num_eval_iter=50)
    assert not (tmp_path / "r" / "latest_model.pth").exists()


def test_a_gradient_that_is_not_finite_is_named_where_it_is_clipped(short_run, monkeypatch):
    inner = Muscle.train_step

    def train_step(self, **batch):
        out, log = inner(self, **batch)
        if self.it == 1:
            zero = next(self.model.parameters()).sum() * 0
            out["loss"] = out["loss"] + zero.sqrt()  # finite, with an infinite derivative
        return out, log

    monkeypatch.setattr(Muscle, "train_step", train_step)
    with pytest.raises(NotFinite, match=r"^step 2: the gradient .*\bstep 2\b"):
        short_run(algorithm="muscle", save_name="r", clip_grad=1.0)


def test_a_value_that_does_not_enter_the_loss_is_a_warning(short_run, tmp_path, monkeypatch):
    inner = Muscle.train_step

    def train_step(self, **batch):
        out, log = inner(self, **batch)
        return out, {**log, "train/of_interest": log["train/mi"] * NAN, "train/known_to_be_absent": NAN}

    monkeypatch.setattr(Muscle, "train_step", train_step)
    result = short_run(algorithm="muscle", save_name="r")
    assert result["complete"]
    (found,) = [w for w in result["warnings"] if "train/" in w]
    assert found.startswith("train/of_interest ")
    assert "known_to_be_absent" not in found
    assert found in (tmp_path / "r" / "log.txt").read_text()


# --------------------------------------------------------------------------------------------------------------- fp16


NARROW = {"net_width": 0.25}  # a CPU is slow at halves


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]


def test_fp16_leaves_out_steps_and_counts_them(short_run, tmp_path, monkeypatch):
    plan = {
        **NARROW,
        "algorithm": "muscle",
        "precision": "fp16",
        "num_train_iter": 12,
        "num_log_iter": 1,
        "num_eval_iter": 12,
    }
    short_run(**plan, save_name="before")
    usual = rows(tmp_path / "before")[-1]["train/skipped_steps"]
    spoil(monkeypatch, {6, 7})
    result = short_run(**plan, save_name="r")
    assert result["complete"]
    assert rows(tmp_path / "r")[-1]["train/skipped_steps"] == usual + 2
    assert not [w for w in result["warnings"] if "finite" in w]
    checkpoint = load_tensors(tmp_path / "r" / "latest_model.pth")
    assert all(v.isfinite().all() for v in checkpoint["model"].values())


def test_fp16_ends_where_it_goes_on(short_run, tmp_path, monkeypatch):
    plan = {
        **NARROW,
        "algorithm": "muscle",
        "precision": "fp16",
        "num_train_iter": 12,
        "num_log_iter": 2,
        "num_eval_iter": 6,
    }
    spoil(monkeypatch, range(7, 100))
    with pytest.raises(NotFinite, match=r"^step 7: .*\bloss .*\bgradient .*\b3 "):
        short_run(**plan, save_name="r", nonfinite_steps=3)
    assert failure(tmp_path / "r")["noticed_at_step"] == 10
    assert "--precision bf16" in failure(tmp_path / "r")["error"]
    assert load_tensors(tmp_path / "r" / "latest_model.pth")["it"] == 6
    assert short_run(**plan, save_name="r", nonfinite_steps=10, resume="yes")["complete"]


def test_the_count_of_skipped_steps_goes_on_after_a_stop(short_run, tmp_path, monkeypatch):
    plan = {**NARROW, "algorithm": "muscle", "precision": "fp16", "num_train_iter": 8, "num_log_iter": 2}
    spoil(monkeypatch, {3, 6})
    short_run(**plan, save_name="whole")
    inner = Host._save_if_due

    def stop(self):
        if self.it == 5:
            self.request_stop()
        inner(self)

    monkeypatch.setattr(Host, "_save_if_due", stop)
    with pytest.raises(Interrupted):
        short_run(**plan, save_name="cut")
    monkeypatch.setattr(Host, "_save_if_due", inner)
    short_run(**plan, save_name="cut", resume="yes")
    counts = [[r["train/skipped_steps"] for r in rows(tmp_path / n)] for n in ("whole", "cut")]
    assert counts[0] == counts[1]
    assert counts[0][-1] >= 2


def test_steps_can_be_left_out_under_fp16_only():
    with pytest.raises(ConfigError, match="nonfinite_steps: .*--precision fp16"):
        load_settings(None, nonfinite_steps=3)
    load_settings(None, nonfinite_steps=3, precision="fp16")
    load_settings(None, nonfinite_steps=0)


def test_the_first_step_of_each_value_is_kept():
    watch = monitor(0)
    one = torch.tensor(1.0)
    for step, (a, b) in enumerate([(one, one), (one, one / 0), (one * NAN, one), (one, one)], start=1):
        watch.observe(step, one if step < 4 else -one / 0, None, None, {"a": a, "b": b, "c": NAN, "d": torch.ones(3)})
    (names,) = watch.state.first
    assert names == ("loss", "a", "b")
    assert watch.state.first[names].tolist() == [4, 3, 2]
    assert (int(watch.longest), int(watch.state.losses), int(watch.state.run)) == (1, 1, 1)


def test_a_continuation_knows_no_more_of_skipped_steps_than_a_whole_run():
    """What a checkpoint says of them is the same, whether the run was resumed since or not."""
    whole = monitor(20)
    for step, value in enumerate((NAN, NAN, 1.0, NAN), 1):
        whole.observe(step, torch.tensor(value), None, torch.tensor(math.isnan(value)), {})
    resumed = monitor(20)
    resumed.load(MonitorState.model_validate(dict(whole.state)))
    for watch in (whole, resumed):
        watch.observe(5, torch.tensor(1.0), None, torch.tensor(False), {})
    assert repr(whole.state) == repr(resumed.state)


def test_steps_left_out_long_ago_are_not_blamed():
    watch = monitor(2)
    inf, one = torch.tensor(math.inf), torch.tensor(1.0)
    for step in range(1, 20):
        bad = step in (3, 4) or step >= 10
        watch.observe(step, one, inf if bad else one * 0, inf if bad else one * 0, {})
    assert watch.state.first["loss", "gradient"].tolist() == [math.inf, 10]
    assert (int(watch.state.skipped), int(watch.longest)) == (12, 10)


def test_the_error_passes_between_processes():
    error = pickle.loads(pickle.dumps(NotFinite("words", {"a": 1})))
    assert (str(error), error.details) == ("words", {"a": 1})


def _lost_in_one(rank, _):
    """A process of two; the loss is lost in the second alone."""
    watch = monitor(0)
    fine = torch.tensor(1.0)
    watch.observe(7, fine if rank == 0 else fine * NAN, None, None, {"train/x": fine})
    with pytest.raises(NotFinite, match=r"^step 7: the loss .*\bstep 9\b"):
        watch.check_now(9, {"the net": torch.nn.Linear(1, 1)})
    with pytest.raises(NotFinite, match=r"^step 7: the loss .*\bstep 9\b"):
        watch.check(9, {"longest": 0.5, "losses": 0.5}, {})


@needs_fork
def test_processes_end_together():
    in_processes(2, _lost_in_one)


# ----------------------------------------------------------------------------------------------------------- collapse


def test_mutual_informations_collapse_is_said_once():
    said = []
    watch = monitor(0, said)
    low, high = 0.05 * math.log(10), 0.5 * math.log(10)
    for step, h in enumerate([low] * (LOW_ENTROPY_LINES - 1) + [high] + [low] * 30):
        watch.see_entropy(step, h)
    assert len(said) == 1
    assert re.match(rf"H\(z\) .* {low:.3f} .* step {2 * LOW_ENTROPY_LINES - 1}\b.* 2\.30\b", said[0])
    assert [*watch.state.told.values()] == said
    assert "larger --mi_weight" in said[0]


def test_the_entropy_of_uneven_labels_is_no_collapse():
    said = []
    watch = monitor(0, said, (499, 1))
    for step in range(20):
        watch.see_entropy(step, 0.014)  # as 499 : 1 has
    assert not said
    for step in range(20):
        watch.see_entropy(step, 0.001)
    assert "mi_weight" not in said[0]  # which would pull towards equal classes
    assert "labelled images of each class (now 1 to 499)" in said[0]


def test_one_class_for_all_test_images():
    said = []
    watch = monitor(0, said)
    for share in (1.0, 1.0, 1.0, 1.0, 0.7, 0.4, 0.99, 0.99):  # at first it is no news
        watch.see_evaluation(1, share, 0.1, False, 0.99)
    assert not said
    watch.see_evaluation(800, 0.99, 0.1, False, 0.99)
    assert said == [*watch.state.told.values()]
    assert re.match(r"99\.0 % .*\bclass .*\bstep 800\b", said[0])
    last = monitor(0)
    last.see_evaluation(9, 1.0, 0.1, True, 0.99)
    assert re.search(r"--ema_m \(it is 0\.99\)", *last.state.told.values())  # 0.99 ** 9 is far from 0
    assert "ema_m" not in said[0]
    assert "--lr" in said[0]
    for share, largest, told in (
        (0.9, 0.9, False),  # there it is right
        (0.992, 0.9, False),
        (0.997, 0.9, True),
        (1.0, 1.0, False),
        (1.0, 500 / 501, True),
    ):
        uneven = monitor(0)
        uneven.see_evaluation(9, share, largest, True, 0.99)
        assert bool(uneven.state.told) == told


def test_one_class_is_said_once_whatever_the_share():
    said = []
    watch = monitor(0, said)
    for step, share in enumerate((0.3, 0.96, 0.97, 0.98, 0.99, 1.0), 1):
        watch.see_evaluation(step, share, 0.1, step == 6, 0.99)
    resumed = monitor(0, said)
    resumed.load(MonitorState.model_validate(dict(watch.state)))
    resumed.see_evaluation(7, 0.991, 0.1, True, 0.99)
    assert len(said) == 1
    assert [*resumed.state.told.values()] == said


def test_a_collapsed_run_says_so(short_run, tmp_path, monkeypatch):
    inner = Muscle.train_step

    def train_step(self, **batch):
        out, log = inner(self, **batch)
        return out, {**log, "train/entropy": log["train/entropy"] * 0.01}

    monkeypatch.setattr(Muscle, "train_step", train_step)
    result = short_run(algorithm="muscle", save_name="r", num_log_iter=1)
    assert any(w.startswith("H(z) ") for w in result["warnings"])
    assert "warning: H(z) " in (tmp_path / "r" / "log.txt").read_text()


@pytest.mark.parametrize("algorithm", ["fixmatch", "muscle_fixmatch"])
def test_the_majority_class_for_all_is_said(tmp_path, algorithm):
    root = image_folder(tmp_path / "f", {"many": 100, "few": 1}, 60, {"many": 20, "few": 2})
    words = f"--c muscle_fixmatch_folder --data_dir {root} --algorithm {algorithm} --img_size 16 --num_train_iter 12"
    assert train(tmp_path, f"{words} --epoch 1 --num_eval_iter 4 --ema_m 0") == 0
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["last_evaluation"]["balanced_acc"] == 0.5
    (text,) = [w for w in result["warnings"] if "test images" in w]
    assert re.match(r"100\.0 % .*\bclass .*\b90\.9 %.*balanced_acc.* labelled images .*\b1 to 100\b", text)
    assert "mi_weight" not in text


# --------------------------------------------------------------------------------- pseudo-labels, and chance agreement


@pytest.mark.parametrize("algorithm", ["fixmatch", "muscle_fixmatch", "pseudolabel", "uda"])
def test_pseudo_labels_that_nothing_gets_are_said_once(tmp_path, capsys, algorithm):
    words = f"--c fixmatch_digits_10 --algorithm {algorithm} --num_train_iter 100 --epoch 1 --num_log_iter 50"
    assert train(tmp_path, f"{words} --p_cutoff 1.0 --total_batch 16") == 0
    (text,) = [w for w in json.loads((tmp_path / "r" / "result.json").read_text())["warnings"] if "util_ratio" in w]
    assert re.match(r"train/util_ratio .*0\.01 .*step 100 of 100: .*--p_cutoff \(it is 1\)", text)
    assert capsys.readouterr().out.count(f"warning: {text}") == 1


def test_pseudo_labels_that_come_in_time_are_enough():
    said = []
    watch = monitor(0, said)
    for step, ratio in enumerate((0, 0, 0, 0.02, 0, 0, 0, 0), 1):
        watch.see_utilisation(100 * step, 800, ratio, None)
    assert not said
    resumed = monitor(0, said)
    resumed.load(MonitorState.model_validate(dict(watch.state)))
    resumed.see_utilisation(900, 1000, 0, 0.95)
    assert not said
    late = monitor(0, said)
    late.see_utilisation(60, 100, 0, None)
    assert not said  # a trial of a few steps
    late.see_utilisation(700, 1000, 0, None)
    assert "p_cutoff" not in said[0]


@pytest.mark.parametrize(("images", "classes", "documented"), [(128, 10, 0.224), (1024, 10, 0.021), (128, 1000, 5.21)])
def test_chance_is_what_the_documents_say(images, classes, documented):
    assert chance_information(images, classes) == pytest.approx(documented, rel=0.25)


@pytest.mark.parametrize(("more", "noted"), [("", True), ("--mi_weight 0", False), ("--algorithm fixmatch", False)])
def test_too_many_classes_for_a_batch_are_noted(tmp_path, capsys, more, noted):
    root = image_folder(tmp_path / "f", {f"c{i:03d}": 1 for i in range(300)}, 4)
    words = f"--c muscle_fixmatch_folder --data_dir {root} --total_batch 128 --num_train_iter 1 --epoch 1 --img_size 16"
    assert train(tmp_path, f"{words} {more}") == 0
    notes = [x for x in capsys.readouterr().out.splitlines() if "mutual information" in x]
    assert len(notes) == noted
    assert not noted or re.search(r"\b128 images .*\b300 classes: .*\b4\.5 .*\b5\.7 nats.*--total_batch", notes[0])


# ----------------------------------------------------------------------------------------------- one image in a forward


@pytest.mark.parametrize(
    "words",
    [
        "--c supervised_digits_10",
        "--c fixmatch_digits_10 --use_cat false",
        "--c supervised_digits_10 --algorithm vat --uratio 1",
        "--c supervised_digits_10 --algorithm mixmatch --uratio 1",
        "--c supervised_digits_10 --algorithm dash --num_wu_iter 2",
        "--c muscle_digits_10",
        pytest.param("--c muscle_digits_10 --net timm:resnet18 --img_size 32", marks=pytest.mark.slow),
    ],
)
def test_one_image_of_one_value_per_channel_is_one_line(tmp_path, capsys, words):
    assert train(tmp_path, f"{words} --batch_size 1") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: net: .*\btwo or more images\b.*\b1 labelled \+ \d unlabelled\b.*--batch_size", line)
    assert not (tmp_path / "r" / "latest_model.pth").exists()
    assert train(tmp_path, f"{words} --batch_size 2 --num_train_iter 1 --epoch 1") == 0  # in the same directory


def test_one_image_trains_where_the_net_can(tmp_path):
    assert train(tmp_path, "--c supervised_digits_10 --batch_size 1 --img_size 32 --num_train_iter 2 --epoch 1") == 0
    assert train(tmp_path / "b", "--c fixmatch_digits_10 --batch_size 1 --uratio 1 --num_train_iter 2 --epoch 1") == 0


@pytest.mark.parametrize("algorithm", ["muscle", "muscle_vat", "muscle_simmatch"])
def test_data_show_runs_the_trial_step_as_training_does(tmp_path, capsys, algorithm):
    """On this device, and with the same errors."""
    out = tmp_path / "views.png"
    words = f"show --c muscle_digits_10 --algorithm {algorithm} --out {out}".split()
    assert run_command("data", words, "muscle-plugin data") == 0
    assert out.is_file()
    capsys.readouterr()
    assert run_command("data", [*words, "--batch_size", "1", "--uratio", "1"], "muscle-plugin data") == 2
    assert re.match("error: net: .*two or more images", capsys.readouterr().err)


# --------------------------------------------------------------------------------------------------------------- data


def test_few_images_make_a_step_of_each_epoch(tmp_path, capsys, monkeypatch):
    refreshed = []
    inner = PseudoLabels.refresh_pseudo_labels

    def refresh(self):
        refreshed.append(self.it)
        inner(self)

    monkeypatch.setattr(PseudoLabels, "refresh_pseudo_labels", refresh)
    root = image_folder(tmp_path / "f", {"a": 4, "b": 4}, 3, {"a": 4, "b": 4})
    words = (
        f"--c muscle_fixmatch_folder --data_dir {root} --algorithm labelprop --epoch 8 --num_log_iter 1 --img_size 16"
    )
    assert train(tmp_path, words) == 0
    assert refreshed == [4, 5, 6, 7]
    logged = rows(tmp_path / "r")
    assert [r["epoch"] for r in logged] == list(range(8))
    assert [r["lr"] for r in logged[:3]] == [r["lr"] for r in logged[4:7]]  # the schedule of either stage
    notes = [x for x in capsys.readouterr().out.splitlines() if x.startswith("note: ")]
    assert any(re.search(r"every unlabelled image 24 times \(only 3 exist\).*--total_batch", n) for n in notes)
    assert any(re.search(r"only 8 steps \(8 epochs over 3 images\).*--epoch", n) for n in notes)


def test_a_warm_up_longer_than_the_run_is_refused_where_epochs_give_its_length(tmp_path, capsys):
    root = image_folder(tmp_path / "f", {"a": 4, "b": 4}, 3)
    words = f"--c muscle_fixmatch_folder --data_dir {root} --epoch 8 --num_warmup_iter"
    assert train(tmp_path, f"{words} 8") == 2
    assert "num_warmup_iter: 8 must be less than the run's 8 steps" in capsys.readouterr().err


def test_a_usual_run_has_no_note_on_its_length():
    split = Split(torch.arange(10), torch.arange(1427))
    assert find_shortage(split, "fixmatch", 64, 64, 60, 1338) == []
    assert find_shortage(split, "fixmatch", 64, 64, 1, None) == []  # num_train_iter was asked for
    assert len(find_shortage(split, "fixmatch", 80, 64, 1, 22)) == 2
    few = Split(torch.arange(10), torch.arange(3))
    assert len(find_shortage(few, "fixmatch", 64, 64, 60, 1338)) == 1
    assert find_shortage(few, "supervised", 64, 64, 60, 1338) == []  # which does not see them


def source(labels, train, test, classes=3, images=None):
    labels = torch.tensor(labels)
    if images is None:
        images = torch.arange(len(labels) * 12).view(-1, 3, 2, 2).byte()
    return Source(
        images, labels, torch.tensor(train), torch.tensor(test, dtype=torch.int64), tuple("abcdefgh"[:classes])
    )


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([0, 1, 2, -1, 2], None),
        ([0, 1, 3, 4, 2], r"^x: 2 training .* 2: 3\b.*\b3\b"),
        ([0, -2, 2, 1, 2], r"^x: 1 training .* 1: -2\b"),
        ([0, 1, 2, 1, -1], r"^x: 1 test .* 0: -1\b"),
    ],
)
def test_labels_out_of_range(labels, text):
    made = source(labels, [0, 1, 2, 3], [4])
    if text is None:
        check_labels(made, "x")
    else:
        with pytest.raises(DataError, match=text):
            check_labels(made, "x")


def test_a_run_refuses_them(short_run, monkeypatch):
    from muscle_plugin.data.datasets import READERS
    from muscle_plugin.data.datasets.digits import digits

    def wrong(options):
        made = digits(options)
        labels = made.labels.clone()
        labels[made.train[5]] = 10
        return replace(made, labels=labels)

    monkeypatch.setitem(READERS, "digits", wrong)
    with pytest.raises(DataError, match=r"^digits: 1 training .* 5: 10\b"):
        short_run(save_name="r")


def test_oddities_are_noted():
    images = torch.randint(0, 256, (9, 3, 5, 5), dtype=torch.uint8)
    images[8] = images[2]  # test = unlabelled
    images[7] = images[2]
    images[4] = images[1]  # unlabelled = labelled
    images[5] = images[0]  # both labelled
    made = replace(
        source([0, 1, 0, 1, 1, 1, 0, 0, 0], range(7), [7, 8], 3, images), names=[f"{i}.png" for i in range(9)]
    )
    notes = find_oddities(made, Split(torch.tensor([0, 1, 5]), torch.tensor([0, 1, 2, 3, 4, 5, 6])))
    expected = [
        "no labelled .*class 'c'$",
        "no test .*class 'b', 'c'$",
        r"2 test .*\b2 .*training .*: 7\.png .*2\.png",
        r"1 unlabelled .*\b4 .*labelled .*: 4\.png .*1\.png",
        r"1 pair.* labels .*: 0\.png .*5\.png.*'a' .*'b'",
    ]
    assert all(re.match(e, n) for e, n in zip(expected, notes, strict=True)), notes


def test_a_large_set_is_not_compared(monkeypatch):
    monkeypatch.setattr("muscle_plugin.data.checks.COMPARED_BYTES", 10)
    made = source([0, 1, 2], [0, 1], [2])
    assert "duplicate" in find_oddities(made, Split(torch.tensor([0]), torch.tensor([1])))[-1]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 60), st.integers(1, 3))
def test_equal_images_are_found_exactly(seed, size, count, values):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, values, (count, size), np.uint8) * 85
    same = equal_images(torch.from_numpy(images)).numpy()
    for i in range(count):
        assert np.array_equal(same == same[i], (images == images[i]).all(1))


# --------------------------------------------------------------------------------------------------------------- logs


def test_the_log_file_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "LOG_BYTES", 1000)
    with logs.log_file(tmp_path) as logger:
        for i in range(1000):
            logger.info("line %d", i)
    sizes = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert set(sizes) == {"log.txt", "log.txt.1", "log.txt.2"}
    assert max(sizes.values()) <= 1000
    assert "line 999" in (tmp_path / "log.txt").read_text()


def test_a_warning_in_every_step_fills_no_log(tmp_path):
    seen = []
    logger = logging.Logger("x")
    logger.addHandler(handler := logging.Handler())
    handler.emit = seen.append
    with logs.output_to(logger):
        warnings.simplefilter("always")
        for i in range(1000):
            warnings.warn("the same", UserWarning, stacklevel=1)
            warnings.warn(f"another {i}", UserWarning, stacklevel=1)
    assert len(seen) == logs.LOGGED_WARNINGS
