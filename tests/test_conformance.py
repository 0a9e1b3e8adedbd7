"""Every algorithm that USB registers trains under the host, and so does every MUSCLE composition; each resumes exactly."""

import json

import numpy as np
import pytest
import torch

from muscle_plugin.files import load_tensors
from muscle_plugin.registry.catalogue import FITTED, all_algorithms, muscle_algorithms, usb_algorithms
from muscle_plugin.schedules import cosine

#: Settings without which an algorithm does not run on digits, with the reason.
SPECIAL = {
    # its head is sized for 8 x 8 feature maps and for nets with "wrn" in their name
    "crmatch": {"net": "wrn_28_2", "img_size": 32, "total_batch": 4, "num_eval_iter": 4},
    # it trains on labels alone first, 2,048 steps by default
    "dash": {"num_wu_iter": 2},
}


def special(name):
    return SPECIAL.get(name.removeprefix("muscle_"), {})


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(all_algorithms().keys() - FITTED))
def test_trains_and_resumes_exactly(whole_and_resumed, tmp_path, name):
    settings = {"algorithm": name, "num_train_iter": 4, "num_eval_iter": 2, "num_log_iter": 1, **special(name)}
    whole_and_resumed(**settings)
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert (result["complete"], result["steps"]) == (True, 4)
    assert result["evaluations"] == 4 // settings["num_eval_iter"]
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert all(np.isfinite(v) for r in rows for v in r.values())
    assert all(("train/mi" in r) == (name in muscle_algorithms()) for r in rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(usb_algorithms()) - {"crmatch"}))
def test_training_changes_the_net(short_run, tmp_path, build_short, name):
    before = dict(build_short(algorithm=name, **special(name)).model.named_parameters())
    short_run(algorithm=name, save_name="r", num_train_iter=2, **special(name))
    after = load_tensors(tmp_path / "r" / "latest_model.pth")["model"]
    assert any(not torch.equal(p, after[n]) for n, p in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("net", ["wrn_28_2", "vit_tiny_patch2_32"])
def test_usbs_nets_train(build_short, net):
    settings = {"net": net, "img_size": 32, "total_batch": 4, "num_train_iter": 1, "epoch": 1}
    algorithm = build_short(algorithm="muscle_fixmatch", **settings)
    algorithm.loader_dict["eval"] = []  # evaluating the ViT on all test images takes a quarter of a minute
    before = {n: p.detach().clone() for n, p in algorithm.model.named_parameters()}
    algorithm.train()
    assert all(torch.isfinite(p).all() for p in algorithm.model.parameters())
    assert any(not torch.equal(p, before[n]) for n, p in algorithm.model.named_parameters())


def test_torchvisions_nets_train(short_run):
    settings = {"net": "mobilenet_v3_small", "net_from_name": True, "img_size": 32, "total_batch": 4}
    assert short_run(algorithm="muscle_fixmatch", num_train_iter=2, **settings)["complete"]


def test_cnn13_has_the_parameters_of_its_paper():
    from muscle_plugin.nets import build_net

    counts = [sum(p.numel() for p in build_net("cnn13", c).parameters()) for c in (10, 100)]
    assert counts == [3_125_908, 3_137_608]
    out = build_net("cnn13", 10)(torch.zeros(2, 3, 32, 32))
    assert (out["logits"].shape, out["feat"].shape) == ((2, 10), (2, 128))


def test_an_unknown_net_is_one_line(short_run):
    from muscle_plugin.errors import InputError

    with pytest.raises(InputError, match="^net: .*'wrn_28_3'.* 'wrn_28_.'.*small_cnn, cnn13.*wrn_28_2"):
        short_run(net="wrn_28_3")


@pytest.mark.parametrize(("net", "size"), [("small_cnn", 8), ("vit_tiny_patch2_32", 16), ("cnn13", 8)])
def test_an_image_size_that_the_net_cannot_take_is_one_line(short_run, net, size):
    from muscle_plugin.errors import InputError

    with pytest.raises(InputError, match=rf"^net: {net} .*\b{size} x {size}\b"):
        short_run(net=net, img_size=size)


def test_an_algorithm_that_cannot_use_the_net_is_one_line(short_run):
    from muscle_plugin.errors import InputError

    with pytest.raises(InputError, match="crmatch .*small_cnn"):
        short_run(algorithm="crmatch")


def test_dashs_warm_up_leaves_the_learning_rates_schedule_to_the_training(build_short):
    algorithm = build_short(algorithm="dash", num_wu_iter=9, lr_schedule="cosine")
    before = [p.detach().clone() for p in algorithm.model.parameters()]
    algorithm.warmup()
    assert any(not torch.equal(a, b) for a, b in zip(before, algorithm.model.parameters(), strict=True))
    rates = []
    algorithm.record = lambda values: rates.append(values["lr"])
    algorithm.save_model = lambda *_: None
    algorithm.args.num_log_iter = algorithm.num_log_iter = 1
    assert [g["lr"] for g in algorithm.optimizer.param_groups] == [0.05, 0.05]
    algorithm.train()
    assert rates == pytest.approx([0.05 * cosine(step, 6) for step in range(1, 7)])


def test_dash_takes_its_threshold_from_labelled_training_images(build_short):
    algorithm = build_short(algorithm="dash", num_wu_iter=2)
    test_images = algorithm.loader_dict["eval"]
    seen = []
    evaluate = algorithm.evaluate
    algorithm.evaluate = lambda *a, **k: (seen.append(algorithm.loader_dict["eval"]), evaluate(*a, **k))[1]
    algorithm.warmup()
    assert seen
    assert all(loader is not test_images for loader in seen)
    assert algorithm.loader_dict["eval"] is test_images
