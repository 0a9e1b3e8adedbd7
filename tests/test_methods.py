"""The methods around MUSCLE: Mean Teacher as its authors have it, label propagation in two stages, the contrastive loss,
pre-training, initial weights, learning-rate schedules."""

import inspect
import json
import math

import pytest
import torch
from conftest import SHORT
from torch.nn import functional as F

from muscle_plugin.algorithms import label_propagation
from muscle_plugin.algorithms.compose import OWN, algorithm_class
from muscle_plugin.data.load import load_data
from muscle_plugin.data.splits import Split
from muscle_plugin.errors import ConfigError, InputError, Interrupted
from muscle_plugin.files import load_tensors
from muscle_plugin.propagation import propagate
from muscle_plugin.registry.catalogue import FITTED, OWN_ALGORITHMS, all_algorithms
from muscle_plugin.runs import train as runs
from muscle_plugin.runs.build import build
from muscle_plugin.settings.resolve import load_settings
from muscle_plugin.training import host

LP = {"lp_k": 10, "epoch": 4, "num_train_iter": 16, "num_eval_iter": 4, "num_log_iter": 1}


def step_of(algorithm, it=0):
    """The values of one training step of a built algorithm, from its step's own batch."""
    algorithm.model.train()
    algorithm.it, algorithm.epoch = it, algorithm._epoch_of(it)
    algorithm.call_hook("before_run")
    algorithm.prepare_steps()
    batch = algorithm.batches.batch(it)
    return algorithm.train_step(**algorithm.process_batch(**batch)), batch


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", sorted(OWN_ALGORITHMS))
def test_the_table_of_own_algorithms_agrees_with_the_classes(name):
    entry, cls = OWN_ALGORITHMS[name], OWN[name]
    assert entry.class_name == cls.__name__
    assert entry.views == tuple(inspect.signature(cls.train_step).parameters)[1:]
    assert [a.name.lstrip("-") for a in algorithm_class(name).get_argument()] == [a.name for a in entry.arguments]
    assert (f"muscle_{name}" in all_algorithms()) == (name not in FITTED)


# -------------------------------------------------------------------------------------------------------- Mean Teacher


def test_mean_teachers_loss_is_its_authors(build_short):
    algorithm = build_short(algorithm="meanteacher_original", consistency=7.0, consistency_rampup=2, epoch=3)
    student, teacher = algorithm.model, algorithm.ema_model
    (out, log), batch = step_of(algorithm)
    student_logits = student(torch.cat([batch["x_lb"], batch["x_ulb_w"]]))["logits"]
    teacher_logits = teacher(torch.cat([batch["x_lb_w2"], batch["x_ulb_w2"]]))["logits"]
    j, b = len(batch["x_lb"]), len(student_logits)
    cross_entropy = F.cross_entropy(student_logits[:j], batch["y_lb"], reduction="sum") / b
    consistency = ((student_logits.softmax(1) - teacher_logits.softmax(1)) ** 2).mean()
    ramp = float(torch.exp(torch.tensor(-5.0)))  # epoch 0
    assert float(log["train/sup_loss"]) == pytest.approx(float(cross_entropy), abs=1e-5)
    assert float(log["train/unsup_loss"]) == pytest.approx(float(consistency), abs=1e-6)
    assert float(out["loss"]) == pytest.approx(float(cross_entropy + 7 * ramp * consistency), abs=1e-5)
    out["loss"].backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_mean_teachers_views_differ_and_are_weak(build_short):
    algorithm = build_short(algorithm="meanteacher_original")
    batch = algorithm.batches.batch(0)
    assert not torch.equal(batch["x_lb"], batch["x_lb_w2"])
    assert not torch.equal(batch["x_ulb_w"], batch["x_ulb_w2"])
    assert {v.strength for v in algorithm.batches.views.values()} == {"weak"}


def test_the_teacher_has_statistics_of_its_own_and_warms_up(short_run, tmp_path):
    short_run(algorithm="meanteacher_original", save_name="r", ema_m=0.97)
    saved = load_tensors(tmp_path / "r" / "latest_model.pth")
    names = [n for n in saved["model"] if n.endswith("running_mean")]
    assert any(not torch.equal(saved["model"][n], saved["ema_model"][n]) for n in names)
    # six steps at 1 - 1 / (t + 1): the average is that of all weights since the start, far from the initial ones
    assert any(not torch.allclose(saved["model"][n], saved["ema_model"][n]) for n in saved["model"] if "weight" in n)


def test_the_second_head_bears_the_consistency(build_short):
    algorithm = build_short(
        algorithm="meanteacher_original", net="cnn13", net_double_head=True, net_width=0.125, img_size=32,
        logit_distance=0.5, consistency=0.0,
    )  # fmt: skip
    (out, log), _ = step_of(algorithm)
    assert float(out["loss"]) > float(log["train/sup_loss"])  # the heads differ at first
    out["loss"].backward()
    assert all(p.grad is not None for n, p in algorithm.model.named_parameters())


# --------------------------------------------------------------------------------------------------- label propagation


@pytest.mark.parametrize(
    "name", ["labelprop", "meanteacher_labelprop", "muscle_labelprop", "muscle_meanteacher_labelprop"]
)
def test_label_propagation_trains_in_two_stages(name, short_run, tmp_path):
    result = short_run(algorithm=name, save_name="r", **LP)
    assert result["complete"]
    lines = metrics(tmp_path / "r")
    with_pseudo = [line["step"] for line in lines if "train/pseudo_accuracy" in line]
    assert with_pseudo == list(range(9, 17))  # two of the four epochs
    last = lines[-1]
    assert 0 < last["train/pseudo_coverage"] <= 1
    assert 0 < last["train/pseudo_weight"] <= 1
    assert 0 <= last["train/pseudo_accuracy"] <= 1
    rates = [line["lr"] for line in lines]
    assert rates[7] > rates[6]  # the learning rate begins anew with stage 2
    assert rates[0] == pytest.approx(rates[8])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["labelprop", "muscle_meanteacher_labelprop"])
@pytest.mark.parametrize("cut", [3, 8, 10, 12])
def test_it_resumes_in_either_stage(name, cut, short_run, tmp_path):
    short_run(algorithm=name, save_name="whole", **LP)

    def stop_at(original):
        def build_and_stop(*arguments):
            algorithm = original(*arguments)
            save = algorithm._save_if_due

            def due():
                if algorithm.it == cut:
                    algorithm.request_stop()
                save()

            algorithm._save_if_due = due
            return algorithm

        return build_and_stop

    settings = load_settings(None, **{**SHORT, "save_dir": str(tmp_path), "algorithm": name, "save_name": "cut", **LP})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "build", stop_at(runs.build))
        with pytest.raises(Interrupted):
            runs.train(settings, quiet=True)
    short_run(algorithm=name, save_name="cut", resume="yes", **LP)
    a, b = (load_tensors(tmp_path / n / "latest_model.pth") for n in ("whole", "cut"))
    for key in ("model", "ema_model"):
        assert all(torch.equal(a[key][k], b[key][k]) for k in a[key])


def test_pseudo_labels_are_those_of_the_present_features_and_weigh_as_defined(build_short):
    algorithm = build_short(algorithm="labelprop", num_labels=100, **LP)
    algorithm.it = 8
    algorithm.refresh_pseudo_labels()
    source, split = algorithm.source, algorithm.split
    assert algorithm.pseudo_labels.shape == algorithm.pseudo_weights.shape == (len(split.unlabelled),)
    right = (algorithm.pseudo_labels == source.train_labels[split.unlabelled]).float()
    assert right.mean() > 0.5  # pixels through a random net are worth that much on digits
    told = algorithm.pseudo_weights > 0
    assert algorithm.pseudo_log["pseudo_accuracy"] == pytest.approx(float(right[told].mean()), abs=1e-6)
    assert torch.isfinite(algorithm.pseudo_weights).all()

    logits = torch.randn(6, 10)
    y, idx = torch.tensor([3, 1]), torch.tensor([0, 5, 9, 2])
    expected = sum(
        float(algorithm.class_weights[c]) * float(F.cross_entropy(row[None], torch.tensor([c])))
        for row, c in zip(logits[:2], y.tolist(), strict=True)
    ) + sum(
        float(algorithm.pseudo_weights[i]) * float(F.cross_entropy(row[None], algorithm.pseudo_labels[i : i + 1]))
        for row, i in zip(logits[2:], idx.tolist(), strict=True)
    )
    assert float(algorithm.class_loss(logits, y, idx)) == pytest.approx(expected / 6, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({}, {"class_mass": "uniform", "k": 10}),
        ({"lp_class_mass": "none"}, {"class_mass": "none", "k": 10}),
        (
            {"lp_method": "poisson_mbo", "lp_class_mass": ",".join(map(str, range(1, 11))), "lp_k": 0},
            {"method": "poisson_mbo", "class_mass": [c / 55 for c in range(1, 11)], "k": None},
        ),
        (
            {"lp_class_mass": "labels", "lp_affinity": "local_scaling"},
            {"class_mass": "labels", "affinity": "local_scaling", "k": 10},
        ),
    ],
)
def test_its_settings_are_those_of_propagate(settings, arguments, build_short):
    algorithm = build_short(algorithm="labelprop", **{**LP, **settings})
    algorithm.refresh_pseudo_labels()
    source, split = algorithm.source, algorithm.split
    points = torch.cat([split.labelled, split.unlabelled])
    features = algorithm.batches.features(algorithm.model, source.train[points], 0, 256, algorithm.amp_cm)
    known = source.train_labels[points].clone()
    known[10:] = -1
    expected = propagate(features, known, 10, **arguments)
    assert torch.equal(algorithm.pseudo_labels, expected.labels[10:])


@pytest.mark.parametrize("name", ["labelprop_cifar10_500", "muscle_meanteacher_labelprop_cifar100_4000"])
def test_the_papers_configurations_take_rows_of_the_diffusion_as_they_are(name):
    settings = load_settings(name).settings
    assert (settings.lp_class_mass, settings.lp_method, settings.lp_k) == ("none", "diffusion", 50)


def test_the_log_shows_a_class_that_gets_hardly_any_pseudo_labels(build_short):
    """Its share is near 0, and so is the accuracy on its images; with no held-back labels only the share is known."""
    algorithm = build_short(algorithm="labelprop", **LP, lp_class_mass="1,1,1,1,1,1,1,1e-9,1,1")
    algorithm.refresh_pseudo_labels()
    log, truth = algorithm.pseudo_log, algorithm.source.train_labels[algorithm.split.unlabelled]
    for c in range(10):
        given = algorithm.pseudo_labels == c
        assert log[f"pseudo_share/{c}"] == pytest.approx(float(given.float().mean()))
        assert log[f"pseudo_accuracy/{c}"] == pytest.approx(float(given[truth == c].float().mean()))
    assert log["pseudo_accuracy/7"] == log["pseudo_accuracy_lowest"] < 0.05
    assert log["pseudo_share/7"] == log["pseudo_share_lowest"] < 0.005
    algorithm.source.labels[algorithm.source.train[algorithm.split.unlabelled]] = -1
    algorithm.refresh_pseudo_labels()
    assert math.isnan(algorithm.pseudo_log["pseudo_accuracy_lowest"])
    assert algorithm.pseudo_log["pseudo_share_lowest"] == log["pseudo_share_lowest"]


def test_of_many_classes_the_lowest_alone_is_logged(build_short, monkeypatch):
    monkeypatch.setattr(label_propagation, "LOGGED_CLASSES", 9)
    algorithm = build_short(algorithm="labelprop", **LP)
    algorithm.refresh_pseudo_labels()
    assert {k for k in algorithm.pseudo_log if "/" in k} == set()
    assert 0 <= algorithm.pseudo_log["pseudo_accuracy_lowest"] <= algorithm.pseudo_log["pseudo_accuracy"]


def test_shares_of_a_folder_are_as_many_as_its_classes():
    """How many those are is known when it has been read, before the first step."""
    source = load_data(load_settings(None, img_size=16).settings)
    with pytest.raises(InputError, match="lp_class_mass: expected 10 numbers, .*got 3"):
        build(
            load_settings(None, algorithm="labelprop", dataset="folder", num_labels=10, epoch=2, lp_class_mass="5,3,2"),
            source=source,
        )


def test_its_features_hang_on_no_batch_size(build_short):
    """``eval_batch_size`` may change when a run goes on."""
    algorithm = build_short(algorithm="labelprop")
    members = algorithm.source.train[:600]
    found = [
        algorithm.batches.features(algorithm.model, members, 3, batch, algorithm.amp_cm) for batch in (1000, 256, 100)
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


def test_all_steps_are_stage_1_where_all_epochs_are(build_short):
    algorithm = build_short(algorithm="labelprop", num_train_iter=7, lp_start=1.0, lr_schedule="cosine")
    assert algorithm.stage_1_steps == 7  # two epochs of three steps, and one left over
    rates = [algorithm.scheduler.lr_lambdas[0](step) for step in range(7)]
    assert rates == sorted(rates, reverse=True)


def test_what_stage_2_logs_is_averaged_over_its_own_steps(short_run, tmp_path):
    """The pseudo-labels' values begin between two log lines."""
    short_run(algorithm="labelprop", num_log_iter=2, num_eval_iter=6, save_name="log")
    lines = [json.loads(line) for line in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("train/pseudo_coverage") for line in lines] == [None, 1.0, 1.0]


def test_stage_1_of_label_propagation_alone_is_supervised_training(short_run, tmp_path):
    same = {"num_train_iter": 8, "epoch": 2, "lr_schedule": "constant"}
    short_run(algorithm="labelprop", save_name="a", **same, lp_start=1.0)
    short_run(algorithm="fullysupervised", save_name="b", **same)
    a, b = (load_tensors(tmp_path / n / "latest_model.pth")["model"] for n in "ab")
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


# -------------------------------------------------------------------------------------- contrastive loss, pre-training


@pytest.mark.parametrize("name", ["contrastive", "muscle_contrastive"])
def test_the_contrastive_loss_is_nt_xent_between_weak_and_hard_views(name, build_short):
    algorithm = build_short(algorithm=name, temperature=0.3, mi_weight=0.0) if "muscle" in name else build_short(
        algorithm=name, temperature=0.3
    )  # fmt: skip
    (_, log), batch = step_of(algorithm)
    j, i = len(batch["x_lb"]), len(batch["x_ulb_w"])
    features = algorithm.model(torch.cat([batch["x_lb"], batch["x_ulb_w"], batch["x_ulb_s"]]))["feat"][j:]
    z = F.normalize(features)
    similarity = (z @ z.T / 0.3).fill_diagonal_(-torch.inf)
    partner = torch.arange(2 * i).roll(i)
    assert float(log["train/unsup_loss"]) == pytest.approx(float(F.cross_entropy(similarity, partner)), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muscle", "contrastive", "muscle_contrastive"])
def test_pretraining_reads_no_label(name, short_run, tmp_path, monkeypatch):
    """With all labels changed, and the same images drawn, it ends with the same weights; training does not."""
    read = host.load_data
    split = Split(torch.arange(10), torch.arange(10, 1437))
    monkeypatch.setattr(host, "choose_split", lambda args, source: split)

    def weights(stage, shift):
        def shifted(args):
            source = read(args)
            source.labels.copy_((source.labels + shift) % 10)
            return source

        monkeypatch.setattr(host, "load_data", shifted)
        short_run(algorithm=name, stage=stage, save_name=f"{stage}{shift}")
        return load_tensors(tmp_path / f"{stage}{shift}" / "latest_model.pth")["model"]

    a, b = weights("pretrain", 0), weights("pretrain", 1)
    assert all(torch.equal(a[k], b[k]) for k in a)
    a, b = weights("train", 0), weights("train", 1)
    assert any(not torch.equal(a[k], b[k]) for k in a)


def test_pretraining_is_refused_where_labels_are_all_there_is():
    with pytest.raises(ConfigError, match="pretrain .*muscle, contrastive"):
        load_settings(None, algorithm="fixmatch", stage="pretrain")
    with pytest.raises(ConfigError, match="mi_weight: 0 .*pretrain"):
        load_settings(None, algorithm="muscle", stage="pretrain", mi_weight=0.0)


def test_training_starts_from_given_weights_without_the_classifier(short_run, build_short, tmp_path):
    short_run(algorithm="muscle_contrastive", stage="pretrain", save_name="pre")
    checkpoint = tmp_path / "pre" / "latest_model.pth"
    given = load_tensors(checkpoint)["ema_model"]
    fresh = build_short(algorithm="muscle").model.state_dict()
    for head in (False, True):
        started = build_short(algorithm="muscle", init_from=str(checkpoint), init_head=head).model.state_dict()
        for name, value in started.items():
            expected = fresh if "classifier" in name and not head else given
            assert torch.equal(value, expected[name]), name
    assert short_run(algorithm="muscle", init_from=str(checkpoint), save_name="tuned")["complete"]


def test_weights_of_another_net_are_refused(build_short, tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(3)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: .*missing: blocks\.\S+, "):
        build_short(algorithm="muscle", init_from=str(tmp_path / "other.pth"))
    with pytest.raises(ValueError, match=r"none\.pth: no such"):
        build_short(algorithm="muscle", init_from=str(tmp_path / "none.pth"))


def test_weights_that_fit_in_part_are_refused_by_name(build_short, tmp_path):
    """A head may be absent; a layer may neither be absent, nor of another shape, nor be in the file alone."""
    import timm

    def start(**changed):
        state = {**timm.create_model("test_resnet", num_classes=0).state_dict(), **changed}
        torch.save({n: t for n, t in state.items() if t is not None}, tmp_path / "w.pth")
        return build_short(net="timm:test_resnet", img_size=32, total_batch=6, init_from=str(tmp_path / "w.pth"))

    assert start(**{"fc.weight": torch.zeros(9, 1), "projector.weight": torch.zeros(3)})
    for changed, match in (
        ({"conv1.0.weight": None}, r"w\.pth: .*missing: backbone\.conv1\.0\.weight$"),
        ({"conv1.0.weight": torch.zeros(1)}, r"of another shape: backbone\.conv1\.0\.weight \(1,\) for"),
        ({"layer4.7.weight": torch.zeros(1)}, r"not in the model: backbone\.layer4\.7\.weight$"),
    ):
        with pytest.raises(ValueError, match=match):
            start(**changed)


def test_a_norm_within_a_backbones_head_is_loaded(build_short, tmp_path):
    import timm

    theirs = timm.create_model("test_convnext", num_classes=7)
    torch.nn.init.constant_(theirs.head.norm.weight, 0.5)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    host = build_short(net="timm:test_convnext", img_size=32, total_batch=6, init_from=str(tmp_path / "w.pth"))
    assert (host.model.backbone.head.norm.weight == 0.5).all()


def test_algorithms_that_wrap_the_net_take_and_give_weights(short_run, build_short, tmp_path):
    settings = {"net": "timm:test_resnet", "img_size": 32, "total_batch": 6, "num_train_iter": 2, "epoch": 2}
    names = ("fixmatch", "simmatch")
    for name in names:
        short_run(algorithm=name, save_name=name, **settings)
    for name, source in (names, names[::-1]):
        file = tmp_path / source / "latest_model.pth"
        host = build_short(algorithm=name, init_from=str(file), **settings)
        given = {n.replace("backbone.", ""): t for n, t in load_tensors(file)["ema_model"].items()}
        own = {n.replace("backbone.", ""): t for n, t in host.model.state_dict().items()}
        assert all(torch.equal(own[n], given[n]) for n in own.keys() & given.keys() if "classifier" not in n)


# ----------------------------------------------------------------------------------------------------- learning rate


def test_cosine_reaches_zero_where_it_is_told_to(short_run, tmp_path):
    run = {"num_train_iter": 12, "epoch": 1, "num_log_iter": 1, "lr": 0.1, "algorithm": "fixmatch"}
    short_run(save_name="a", lr_schedule="cosine", **run)
    short_run(save_name="b", lr_schedule="cosine", lr_zero_at=210 / 180, **run)
    short_run(save_name="c", lr_schedule="constant", **run)
    a, b, c = ([line["lr"] for line in metrics(tmp_path / n)] for n in "abc")
    assert a[-1] == pytest.approx(0, abs=1e-9)
    assert b[-1] == pytest.approx(0.1 * (1 + torch.cos(torch.tensor(torch.pi * 180 / 210)).item()) / 2, rel=1e-4)
    assert c == [0.1] * 12


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ConfigError, match="lr_zero_at: .*--lr_schedule cosine"):
        load_settings(None, lr_zero_at=1.2)
    with pytest.raises(ConfigError, match="first stage.*--epoch"):
        load_settings(None, algorithm="muscle_labelprop", num_train_iter=20, epoch=1)
    assert load_settings(None, algorithm="labelprop", epoch=1, lp_start=0).settings.lp_start == 0


def test_training_starts_from_a_timm_checkpoint(build_short, tmp_path):
    """A state dict as timm saves it, for a net of timm: all but the classifier is taken over."""
    import timm

    given = timm.create_model("resnet10t", num_classes=7).state_dict()
    torch.save(given, tmp_path / "timm.pth")
    net = {"net": "timm:resnet10t", "img_size": 32, "total_batch": 6}
    algorithm = build_short(algorithm="fixmatch", init_from=str(tmp_path / "timm.pth"), **net)
    own = algorithm.model.state_dict()
    shared = [n for n in given if not n.startswith("fc.")]
    assert shared
    for name in shared:
        assert torch.equal(own[f"backbone.{name}"], given[name]), name
    assert str(tmp_path / "timm.pth") in algorithm.notes[-1]
