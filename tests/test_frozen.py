"""Heads on the features of a frozen backbone: the pool of views, what trains on it, and baselines that are fitted to it."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import SHORT
from processes import in_processes, needs_fork
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F
from torchvision.models import alexnet

from muscle_plugin.algorithms.compose import algorithm_class
from muscle_plugin.algorithms.muscle import EXTRA_HARD
from muscle_plugin.cli import main
from muscle_plugin.data.view_pool import CHUNK, PooledBatches
from muscle_plugin.data.views import UNLABELLED
from muscle_plugin.errors import ConfigError, InputError
from muscle_plugin.files import load_tensors
from muscle_plugin.inference.predict import Predictor
from muscle_plugin.nets import build_net
from muscle_plugin.nets.frozen import Encoder, FeatureHead
from muscle_plugin.propagation import propagate
from muscle_plugin.registry.catalogue import FITTED, all_algorithms
from muscle_plugin.runs.build import build
from muscle_plugin.settings.resolve import load_settings

REFUSED = ("crmatch", "vat", "remixmatch", "sequencematch")


@pytest.fixture
def frozen(short_run, tmp_path):
    """Settings of a head on a small net that has been trained a little."""
    short_run(algorithm="supervised", save_name="before")
    return {
        "tune": "head", "init_from": str(tmp_path / "before"), "net_dropout": 0.5, "cache_dir": str(tmp_path / "pool"),
        "view_pool": "2,3",
    }  # fmt: skip


def files(tmp_path):
    return sorted((tmp_path / "pool").glob("*.npy"))


def test_a_pool_holds_the_backbones_features_and_later_runs_share_it(short_run, build_short, frozen, tmp_path):
    first = short_run(algorithm="muscle_fixmatch", save_name="first", **frozen)
    made = {f: f.stat().st_mtime_ns for f in files(tmp_path)}
    assert [f.name.split("_")[1] for f in made] == ["plain", "strong", "weak"]
    again = short_run(algorithm="muscle_fixmatch", save_name="again", **frozen)
    assert first["last_top1"] == again["last_top1"]
    short_run(algorithm="muscle_labelprop", lp_start=0, save_name="third", seed=3, **frozen)
    assert {f: f.stat().st_mtime_ns for f in files(tmp_path)} == made
    algorithm = build_short(algorithm="fixmatch", **frozen)
    images, _ = super(PooledBatches, algorithm.batches).fixed
    features = algorithm.encoder(algorithm.batches.normalise(images))
    torch.testing.assert_close(algorithm.batches.fixed[0].float(), features, rtol=1e-3, atol=1e-4)
    assert [len(algorithm.batches.pool(strength)) for strength in ("weak", "strong")] == [2, 3]


def test_checkpoints_hold_the_head_alone(short_run, frozen, tmp_path):
    short_run(algorithm="fixmatch", save_name="r", **frozen)
    state = load_tensors(tmp_path / "r" / "latest_model.pth")["model"]
    assert sorted(state) == ["classifier.bias", "classifier.weight", "mean", "std"]
    assert not torch.equal(state["mean"], torch.zeros_like(state["mean"]))


def test_a_pool_that_is_cut_off_goes_on(build_short, frozen, tmp_path, monkeypatch):
    whole = build_short(algorithm="fixmatch", **frozen).batches.pool("strong").clone()
    for file in (tmp_path / "pool").glob("*strong*"):
        file.unlink()
    calls, encode = [], Encoder.__call__

    def stops(self, images):
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(self, images)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Encoder, "__call__", stops)
        build_short(algorithm="fixmatch", **frozen)
    calls.clear()
    monkeypatch.setattr(Encoder, "__call__", lambda self, images: (calls.append(len(images)), encode(self, images))[1])
    assert torch.equal(build_short(algorithm="fixmatch", **frozen).batches.pool("strong"), whole)
    assert 0 < len(calls) < 3 * -(-len(whole[0]) // CHUNK)


def test_a_damaged_pool_is_made_anew(build_short, frozen, tmp_path):
    whole = build_short(algorithm="fixmatch", **frozen).batches.pool("weak").clone()
    (file,) = (tmp_path / "pool").glob("*weak*.npy")
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    assert torch.equal(build_short(algorithm="fixmatch", **frozen).batches.pool("weak"), whole)
    repaired = file.stat().st_mtime_ns
    assert torch.equal(build_short(algorithm="fixmatch", **frozen).batches.pool("weak"), whole)
    assert file.stat().st_mtime_ns == repaired


def test_other_weights_images_or_augmentation_have_a_pool_of_their_own(build_short, short_run, frozen, tmp_path):
    short_run(algorithm="supervised", save_name="other", seed=1)
    build_short(algorithm="fixmatch", **frozen).batches.pool("weak")
    other = {"init_from": str(tmp_path / "other")}
    for changed in ({"weak_augment": "crop"}, {"img_size": 20}, {"view_pool": "1,3"}, other):
        before = len(files(tmp_path))
        build_short(algorithm="fixmatch", **frozen | changed).batches.pool("weak")
        assert len(files(tmp_path)) > before


def test_a_steps_views_are_a_function_of_seed_and_step_and_of_no_other_view(build_short, frozen):
    base = build_short(algorithm="fixmatch", **frozen)
    with_muscle = build_short(algorithm="muscle_fixmatch", hard_views=3, **frozen)
    with_muscle.prepare_steps()
    one, more, again = base.batches.batch(5), with_muscle.batches.batch(5), base.batches.batch(5)
    for name, x in one.items():
        assert torch.equal(x, again[name])
        assert torch.equal(x, more[name])
    # which of the pool's views of an image is taken differs from step to step
    order = with_muscle.batches.order[UNLABELLED]
    order.batch = lambda step: torch.arange(12)
    assert len({tuple(with_muscle.batches.batch(step)["x_ulb_s"][0].tolist()) for step in range(12)}) == 3
    del order.batch
    # three strong views of an image are the three that the pool has
    strong = torch.cat([more["x_ulb_s"][None], more[EXTRA_HARD[UNLABELLED]].unflatten(0, (2, -1))])
    pool = with_muscle.batches.pool("strong").float()
    of_pool = pool[:, with_muscle.split.unlabelled[with_muscle.batches.order[UNLABELLED].batch(5)]]
    assert torch.equal(strong.sum(0), of_pool.sum(0))


def _own_part(rank, world, settings, expected):
    batch = build(load_settings(None, **settings)).batches.batch(2)
    for name, of_all in expected.items():
        assert torch.equal(batch[name], of_all.chunk(world)[rank])


@needs_fork
def test_several_processes_draw_the_views_that_one_would(build_short, frozen, tmp_path):
    settings = {**SHORT, **frozen, "algorithm": "fixmatch", "save_dir": str(tmp_path)}
    in_processes(2, _own_part, settings, build_short(algorithm="fixmatch", **frozen).batches.batch(2))


def test_without_a_pool_each_step_forwards_its_views(build_short, frozen):
    pooled = build_short(algorithm="fixmatch", **frozen)
    direct = build_short(algorithm="fixmatch", **frozen | {"view_pool": "none"})
    for name, x in direct.batches.batch(0).items():
        assert x.shape == pooled.batches.batch(0)[name].shape
    features = direct.batches.images_of(0)
    assert torch.equal(direct.encoder(features["x_ulb_w"]), direct.batches.batch(0)["x_ulb_w"])
    torch.testing.assert_close(pooled.model.mean, direct.model.mean, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in sorted(all_algorithms()) if not n.endswith(REFUSED) and n not in FITTED])
def test_every_algorithm_trains_on_a_pool_and_resumes_exactly(whole_and_resumed, frozen, name):
    more = {"num_wu_iter": 2} if name.endswith("dash") else {"lp_start": 0} if name.endswith("labelprop") else {}
    whole_and_resumed(algorithm=name, num_train_iter=4, num_eval_iter=2, **more, **frozen)


@pytest.mark.parametrize("name", ["crmatch", "muscle_vat", "remixmatch"])
def test_what_needs_the_pixels_is_refused_in_one_line(short_run, frozen, name):
    with pytest.raises(
        ConfigError, match=f"^--(tune|view_pool): {name.removeprefix('muscle_')} .*give --(tune|view_pool)"
    ):
        short_run(algorithm=name, **frozen)


def test_a_backbone_that_cannot_take_the_images_is_one_line(build_short, tmp_path):
    settings = {"net": "alexnet", "net_from_name": True, "tune": "head", "view_pool": "none", "pretrain_path": "x"}
    weights = tmp_path / "alexnet.pth"
    torch.save(alexnet().state_dict(), weights)
    with pytest.raises(InputError, match="^net: alexnet cannot take images of 16 x 16: "):
        build_short(algorithm="fixmatch", **settings | {"pretrain_path": str(weights)})


def test_a_builder_of_the_callers_own_makes_the_backbone(frozen, tmp_path):
    resolved = load_settings(None, **{**SHORT, **frozen, "algorithm": "fixmatch", "save_dir": str(tmp_path)})
    built = []

    def builder(num_classes, **_):
        built.append(num_classes)
        return build_net("small_cnn", num_classes, 1)

    algorithm_class("fixmatch")(Namespace(resolved=resolved, source=None), builder)
    assert built == [2]


def test_weights_that_have_moved_resume_a_run_and_other_weights_do_not(short_run, frozen, tmp_path):
    short_run(algorithm="fixmatch", save_name="r", **frozen)
    moved = (tmp_path / "before").rename(tmp_path / "moved")
    assert short_run(algorithm="fixmatch", save_name="r", resume="yes", **frozen | {"init_from": str(moved)})[
        "complete"
    ]
    short_run(algorithm="supervised", save_name="other", seed=1)
    with pytest.raises(InputError, match="another run: SHA-256 of the backbone"):
        short_run(algorithm="fixmatch", save_name="r", resume="yes", **frozen | {"init_from": str(tmp_path / "other")})


def test_predict_agrees_with_the_evaluation_on_the_pool(short_run, frozen, tmp_path):
    short_run(algorithm="muscle_fixmatch", save_name="r", **frozen)
    algorithm = build(load_settings(None, **{**SHORT, **frozen, "save_dir": str(tmp_path), "algorithm": "fixmatch"}))
    head = load_tensors(tmp_path / "r" / "latest_model.pth")["ema_model"]
    algorithm.model.load_state_dict(head)
    test, images = algorithm.source.test, algorithm.source.images
    with torch.no_grad():
        expected = algorithm.model.eval()(algorithm.batches.fixed[0][test].float())["logits"]
    given = Predictor(tmp_path / "r" / "latest_model.pth", "cpu").logits(images[test].repeat(1, 3, 1, 1))
    torch.testing.assert_close(given, expected, rtol=0.01, atol=0.01)


def test_rotations_train_where_each_step_forwards_the_backbone(short_run, frozen):
    assert short_run(algorithm="remixmatch", **frozen | {"view_pool": "none"})["complete"]


def test_label_propagation_without_a_pool_is_the_same(build_short, frozen):
    made = [
        build_short(algorithm="labelprop", lp_start=0, lp_k=5, **frozen | {"view_pool": pool})
        for pool in ("2,3", "none")
    ]
    for algorithm in made:
        algorithm.refresh_pseudo_labels()
    same = made[0].pseudo_labels == made[1].pseudo_labels  # features are rounded to half precision
    assert float(same.float().mean()) > 0.99


def test_label_propagation_takes_its_graph_from_the_pool(build_short, frozen, tmp_path):
    algorithm = build_short(algorithm="labelprop", lp_start=0, lp_k=5, **frozen)
    algorithm.epoch = 0
    algorithm.refresh_pseudo_labels()
    (kept,) = (tmp_path / "pool").glob("*neighbours*")
    written = kept.stat().st_mtime_ns
    source, split = algorithm.source, algorithm.split
    known = torch.full((len(source.train),), -1)
    known[split.labelled] = source.train_labels[split.labelled]
    features = algorithm.batches.fixed[0][source.train].float()
    expected = propagate(features, known, 10, class_mass="uniform", k=5)
    assert torch.equal(algorithm.pseudo_labels, expected.labels[split.unlabelled])
    again = build_short(algorithm="labelprop", lp_start=0, lp_k=5, **frozen)
    again.refresh_pseudo_labels()
    assert torch.equal(algorithm.pseudo_labels, again.pseudo_labels)
    assert kept.stat().st_mtime_ns == written


# ----------------------------------------------------------------------------------------------------------- baselines


def fitted(build_short, frozen, name, **more):
    algorithm = build_short(algorithm=name, **frozen | more)
    algorithm.train()
    features = F.normalize(algorithm.batches.fixed[0].float())
    labelled = algorithm.source.train[algorithm.split.labelled]
    known = features[labelled].numpy(), algorithm.source.labels[labelled].numpy()
    test = algorithm.source.test
    with torch.no_grad():
        given = algorithm.model.eval()(algorithm.batches.fixed[0][test].float())["logits"]
    return given, known, features[test].numpy()


def test_the_linear_probe_is_scikit_learns_logistic_regression(build_short, frozen):
    logits, (x, y), test = fitted(build_short, frozen, "linear_probe")
    expected = LogisticRegression(C=64, max_iter=1000).fit(x, y)
    np.testing.assert_allclose(logits.softmax(1), expected.predict_proba(test), atol=1e-3)


def test_with_enough_labels_the_linear_probe_chooses_its_penalty(build_short, frozen):
    logits, (x, y), test = fitted(build_short, frozen, "linear_probe", num_labels=200)
    usual = LogisticRegression(C=64, max_iter=1000).fit(x, y)
    assert not np.allclose(logits.softmax(1), usual.predict_proba(test), atol=1e-3)


def test_class_mean_gives_the_class_whose_mean_is_nearest(build_short, frozen):
    logits, (x, y), test = fitted(build_short, frozen, "class_mean", num_labels=40)
    means = np.stack([x[y == c].mean(0) for c in range(10)])
    nearest = ((test[:, None] - means) ** 2).sum(2).argmin(1)
    assert np.array_equal(logits.argmax(1), nearest)


@pytest.mark.parametrize("pool", ["2,3", "none"])
@pytest.mark.parametrize("name", sorted(FITTED))
def test_a_baseline_is_a_run_of_one_step(short_run, frozen, tmp_path, name, pool):
    settings = {k: v for k, v in frozen.items() if k != "net_dropout"} | {"view_pool": pool}
    result = short_run(algorithm=name, save_name="r", **settings)
    assert (result["steps"], result["complete"]) == (1, True)
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["eval/top-1-acc"] == result["last_top1"]


def test_a_baseline_without_frozen_features_is_refused(short_run):
    with pytest.raises(ConfigError, match="^--algorithm: linear_probe .*--tune head"):
        short_run(algorithm="linear_probe")


# ---------------------------------------------------------------------------------------------------------------- head


def test_dropout_of_the_head_keeps_the_mean_and_the_share():
    head = FeatureHead(64, 3, dropout=0.3)
    torch.manual_seed(0)
    x = torch.ones(2000, 64, requires_grad=True)
    out = head._dropped(x)
    assert float((out == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(out.mean()) == pytest.approx(1, abs=0.01)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    assert torch.equal(head.eval()._dropped(x), x)


def test_the_mlp_head_has_a_hidden_layer_as_wide_as_the_feature():
    head = FeatureHead(8, 3, hidden=True)
    assert {n: tuple(p.shape) for n, p in head.named_parameters() if p.ndim == 2} == {
        "blocks.0.weight": (8, 8),
        "classifier.weight": (3, 8),
    }


def test_data_show_draws_the_views_and_makes_no_pool(frozen, tmp_path, capsys):
    words = [f"--{k}={v}" for k, v in (SHORT | frozen).items() if k != "use_tensorboard"]
    assert main(["data", "show", *words, "--algorithm", "fixmatch", "--out", str(tmp_path / "views.png")]) == 0
    assert (tmp_path / "views.png").is_file()
    assert not files(tmp_path)


def test_a_dry_run_times_heads_on_frozen_features(frozen, tmp_path, capsys):
    settings = {k: v for k, v in (SHORT | frozen).items() if k != "num_threads"} | {"algorithm": "fixmatch"}
    (tmp_path / "head.yaml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in settings.items()))
    assert main(["sweep", str(tmp_path / "head.yaml"), "--seeds", "1", "--dry-run", "--save_dir", str(tmp_path)]) == 0
    assert "not timed" not in capsys.readouterr().out


def test_a_pool_of_no_views_is_refused_in_words():
    with pytest.raises(ConfigError, match="--view_pool: expected none, or the numbers of weak and strong views.*'2'"):
        load_settings(None, view_pool="2")
