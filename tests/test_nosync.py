"""A steady-state step waits for nothing, and computes what it did when it waited."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import KNOWN, SPECIAL, of_base
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import in_processes, needs_fork
from sklearn import metrics as sklearn_metrics
from torch import Tensor, nn
from waits import Waits, waits_per_step

from muscle_plugin.files import load_tensors
from muscle_plugin.registry.catalogue import FITTED, all_algorithms
from muscle_plugin.training.evaluation import in_top
from muscle_plugin.training.hooks import EMA, compute_update_on, keep_how, read
from muscle_plugin.usb.calls import no_waiting, speed_patches, usb_calls_on
from muscle_plugin.usb.names import (
    AlgorithmBase,
    DistAlignQueueHook,
    FlexMatchThresholdingHook,
    FreeMatchThresholdingHook,
    SoftMatchWeightingHook,
)
from muscle_plugin.usb.thresholds import (
    TAKE_OVER,
    AlignmentQueue,
    FlexMatchThresholds,
    FreeMatchThresholds,
    SoftMatchWeights,
    take_over,
)

CPU = torch.device("cpu")
of_patches = pytest.mark.skipif(not speed_patches(), reason="MUSCLE_USB_PATCHES=0 switches off what is tested")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(all_algorithms().keys() - FITTED))
def test_a_steady_step_does_not_wait(build_short, name):
    never = dict.fromkeys(("num_log_iter", "num_eval_iter", "num_save_iter"), 1000)
    special = of_base(SPECIAL, name) or {}
    algorithm = build_short(algorithm=name, num_train_iter=8, clip_grad=1.0, **never, **special)
    algorithm.warmup()
    waits = waits_per_step(algorithm, begin=5)  # in the second epoch, past what is done once in it
    assert list(waits) == [5, 6]
    for seen in waits.values():
        assert sum(seen.values()) <= (of_base(KNOWN, name) or 0), dict(seen)


SCALAR, MASK = torch.tensor(1.0), torch.tensor([True, False])


@pytest.mark.parametrize(
    ("what", "count"),
    {
        "item": (lambda x: x.sum().item(), 1),
        "float": (lambda x: float(x.sum()), 1),
        "if": (lambda x: 1 if x.sum() > 0 else 0, 1),
        "tolist": (lambda x: x.tolist(), 1),
        "numpy": (lambda x: x.numpy(), 1),
        "cpu": (lambda x: x.cpu(), 1),
        "to cpu": (lambda x: x.to("cpu"), 1),
        "mask": (lambda x: x[x > 0], 1),
        "put by mask": (lambda x: x.clone().__setitem__(x > 0, x[:1].sum()), 1),
        "put a number": (lambda x: x.clone().__setitem__(torch.tensor([0]), 1.0), 1),
        "nonzero": (lambda x: x.nonzero(), 1),
        "bincount": (lambda x: x.long().bincount(), 1),
        "unique": (lambda x: x.unique(), 1),
        "equal": (lambda x: torch.equal(x, x), 1),
        "repeats": (lambda x: x.repeat_interleave(x.long()), 1),
        "copy": (lambda x: torch.randperm(2).to(x.device), 1),
        "tensor on device": (lambda x: torch.tensor([1.0, 2.0], device=x.device), 1),
        "copy that does not wait": (lambda x: torch.randperm(2).to(x.device, non_blocking=True), 0),
        "made there": (lambda x: torch.arange(2, device=x.device).to(x.device), 0),
        "by places": (lambda x: x[torch.tensor([0, 1])], 0),
        "where": (lambda x: torch.where(x > 0, x, 0).sum(), 0),
        "one hot": (lambda x: nn.functional.one_hot(x.long(), 3), 0),
        "cross-entropy": (lambda x: nn.functional.cross_entropy(x.view(1, 2), x[:1].long()), 0),
    }.values(),
)  # fmt: skip
def test_the_counter_sees_it(what, count):
    x = torch.tensor([1.0, 1.0])
    with Waits() as waits:
        what(x)
    assert sum(waits.seen.values()) == count, waits.seen


@of_patches
def test_only_usbs_floats_are_put_off():
    usb = {"__name__": "semilearn.algorithms.x"}
    ask = {n: eval("lambda t: t.item()", {"__name__": n}) for n in (usb["__name__"], "my_algorithm", "torch.optim.sgd")}
    x = torch.tensor(0.1, requires_grad=True)
    with no_waiting(CPU):
        later = ask[usb["__name__"]](x)
        assert (type(later), later.dtype, later.requires_grad) == (Tensor, torch.float64, False)
        with torch.no_grad():
            x.mul_(2)
        assert float(later) == pytest.approx(0.1)  # a copy
        assert type(ask["my_algorithm"](x)) is type(ask["torch.optim.sgd"](x)) is float
        assert type(ask[usb["__name__"]](torch.tensor(3))) is int
        assert f"{later:.3f}" == "0.100"
    assert type(ask[usb["__name__"]](x)) is float
    assert "item" not in vars(Tensor)
    with pytest.raises(KeyError), no_waiting(CPU):
        raise KeyError
    assert not {"item", "to"} & set(vars(Tensor))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("fixmatch", {}), ("flexmatch", {"p_cutoff": 0.2}), ("flexmatch", {"p_cutoff": 0.2, "thresh_warmup": False}),
        ("freematch", {}), ("softmatch", {}), ("comatch", {}), ("simmatch", {}), ("mixmatch", {}), ("muscle_pimodel", {}),
        ("muscle_flexmatch", {"p_cutoff": 0.2}),
    ],
)  # fmt: skip
def test_training_without_the_patches_for_speed_is_the_same_to_the_bit(short_run, tmp_path, monkeypatch, name, more):
    settings = {"algorithm": name, "num_train_iter": 12, "num_log_iter": 3, "num_eval_iter": 6, **more}
    short_run(save_name="now", **settings)
    monkeypatch.setenv("MUSCLE_USB_PATCHES", "0")
    short_run(save_name="then", **settings)
    now, then = (load_tensors(tmp_path / n / "latest_model.pth") for n in ("now", "then"))
    for net in ("model", "ema_model"):
        assert all(torch.equal(v, then[net][k]) for k, v in now[net].items())
    rows = [
        [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (tmp_path / n / "metrics.jsonl").open()
        ]
        for n in ("now", "then")
    ]
    assert rows[0] == rows[1]


def test_without_the_patches_for_speed_usbs_code_runs_as_usb_wrote_it(build_short, monkeypatch):
    monkeypatch.setenv("MUSCLE_USB_PATCHES", "0")
    made = build_short(algorithm="softmatch", num_train_iter=2)
    assert type(made.hooks_dict["MaskingHook"]) is SoftMatchWeightingHook
    found = []
    monkeypatch.setattr(Tensor, "item", lambda x: found.append(sys._getframe(1).f_globals["__name__"]) or float(x))
    made.train()
    assert {"semilearn.algorithms.softmatch.softmatch", "semilearn.algorithms.softmatch.utils"} <= set(found)


def test_several_processes_keep_the_thresholds_in_which_usb_is_wrong(monkeypatch):
    monkeypatch.setenv("MUSCLE_USB_PATCHES", "0")
    monkeypatch.setattr("muscle_plugin.distributed.world_size", lambda: 2)
    hook = SoftMatchWeightingHook(4)
    take_over(hook, 8)
    assert type(hook) is SoftMatchWeights


# ---------------------------------------------------------------------------------------------------------- thresholds


def algorithm(**more):
    return SimpleNamespace(
        distributed=False,
        world_size=1,
        compute_prob=lambda x: x.softmax(-1),
        use_quantile=False,
        clip_thresh=False,
        **more,
    )


def sharpened(generator, rows, classes):
    return (3 * torch.randn(rows, classes, generator=generator)).softmax(1)


def same_state(ours, theirs):
    for name, value in vars(theirs).items():
        now = getattr(ours, name)
        if isinstance(value, Tensor):
            assert now.dtype == value.dtype
            assert torch.equal(now, value), name
        else:
            assert now == value


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**31), st.booleans(), st.integers(1, 12), st.integers(2, 6), st.sampled_from([0.3, 0.6, 0.95]),
    st.booleans(),
)  # fmt: skip
def test_flexmatchs_thresholds_are_usbs(seed, thresh_warmup, images, classes, cutoff, one_class):
    generator = torch.Generator().manual_seed(seed)
    theirs, ours = (c(images, classes, thresh_warmup) for c in (FlexMatchThresholdingHook, FlexMatchThresholds))
    for _ in range(12):
        index = torch.randint(images, (5,), generator=generator)  # with repetitions
        p = sharpened(generator, 5, classes)
        if one_class:  # all images may come to be of one class: then nothing changes
            p = p.sort(1, descending=True).values
        given_ = {"logits_x_ulb": p, "idx_ulb": index, "softmax_x_ulb": False}
        masks = [h.masking(algorithm(p_cutoff=cutoff), **given_) for h in (theirs, ours)]
        assert torch.equal(*masks)
        assert masks[0].dtype == masks[1].dtype
        same_state(ours, theirs)


@pytest.mark.parametrize("use_quantile", [False, True])
@pytest.mark.parametrize("clip_thresh", [False, True])
def test_freematchs_thresholds_are_usbs(use_quantile, clip_thresh):
    generator = torch.Generator().manual_seed(0)
    theirs, ours = (c(4, momentum=0.7) for c in (FreeMatchThresholdingHook, FreeMatchThresholds))
    for _ in range(30):
        logits = 5 * torch.randn(9, 4, generator=generator)
        algorithms = [algorithm(), algorithm()]
        for a in algorithms:
            a.use_quantile, a.clip_thresh = use_quantile, clip_thresh
        masks = [h.masking(a, logits_x_ulb=logits) for h, a in zip((theirs, ours), algorithms, strict=True)]
        assert torch.equal(*masks)
        same_state(ours, theirs)
        for name in ("p_model", "label_hist", "time_p"):
            assert torch.equal(getattr(algorithms[0], name), getattr(algorithms[1], name))


def test_softmatchs_weights_are_usbs():
    generator = torch.Generator().manual_seed(0)
    theirs, ours = (c(4, momentum=0.9) for c in (SoftMatchWeightingHook, SoftMatchWeights))
    for _ in range(50):
        p = sharpened(generator, 9, 4)
        assert torch.equal(*(h.masking(algorithm(), logits_x_ulb=p, softmax_x_ulb=False) for h in (theirs, ours)))
        same_state(ours, theirs)


@pytest.mark.parametrize("target", ["uniform", "model"])
def test_the_alignment_queue_is_usbs(target):
    generator = torch.Generator().manual_seed(0)
    theirs, ours = (c(4, queue_length=3, p_target_type=target) for c in (DistAlignQueueHook, AlignmentQueue))
    for _ in range(8):
        p, q = (sharpened(generator, 9, 4) for _ in range(2))
        assert torch.equal(*(h.dist_align(algorithm(), p, q) for h in (theirs, ours)))
        same_state(ours, theirs)


def _one_of_two(rank, world, folder):
    """A process of two: its half of each batch; it writes what its hooks then hold."""
    torch.save([vars(h) for h in _hooks_after_batches(rank, world)], folder / f"{rank}.pt")


def _hooks_after_batches(rank, world):
    generator = torch.Generator().manual_seed(0)
    hooks = [FlexMatchThresholds(20, 4), FreeMatchThresholds(4), SoftMatchWeights(4), AlignmentQueue(4, queue_length=3)]
    one = algorithm(p_cutoff=0.5)
    one.distributed, one.world_size = world > 1, world
    for _ in range(6):
        p, index = sharpened(generator, 8, 4), torch.randperm(20, generator=generator)[:8]
        p, index = p.chunk(world)[rank], index.chunk(world)[rank]
        for hook in hooks[:3]:
            hook.masking(one, logits_x_ulb=p, idx_ulb=index, softmax_x_ulb=False)
        hooks[3].dist_align(one, p)
    return hooks


@needs_fork
def test_two_processes_hold_what_one_would(tmp_path):
    in_processes(2, _one_of_two, tmp_path)
    for rank in range(2):
        there = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for held, hook in zip(there, _hooks_after_batches(0, 1), strict=True):
            for name, value in vars(hook).items():
                torch.testing.assert_close(held[name], value)


@of_patches
@pytest.mark.parametrize("usb", list(TAKE_OVER))
def test_usbs_instance_is_taken_over_with_what_it_holds(build_short, usb):
    name = {"Flex": "flexmatch", "Free": "freematch", "Soft": "softmatch", "Dist": "comatch"}[usb.__name__[:4]]
    hook = build_short(algorithm=name).hooks_dict["DistAlignHook" if name == "comatch" else "MaskingHook"]
    assert type(hook) is TAKE_OVER[usb]
    assert isinstance(hook, usb)
    assert hook.num_classes == 10


# ------------------------------------------------------------------------------------- log, average, optimiser, metrics


def test_the_log_is_read_in_one_transfer():
    values = {"a": torch.tensor(0.1), "b": 0.2, "c": torch.tensor(0.3, dtype=torch.float64), "d": np.float64(0.4)}
    with Waits() as waits:
        numbers = read(values)
    assert waits.seen == {"tolist": 1}
    assert numbers == {k: float(v) for k, v in values.items()}
    assert list(numbers) == list(values)
    assert all(type(v) is float for v in numbers.values())
    assert read({"a": 1.0}) == {"a": 1.0}


@pytest.mark.parametrize("own", [False, True])
def test_integer_buffers_of_the_average(own):
    net, average = (nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)) for _ in range(2))
    ema = EMA(net, average, 0.9, own_buffers=own)
    for _ in range(3):
        net(torch.randn(4, 1, 2, 2))
        ema.update()
    assert net[1].num_batches_tracked == 3
    assert average[1].num_batches_tracked == (0 if own else 3)
    assert average[1].num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_updates_are_fused_on_a_gpu_alone_whatever_a_checkpoint_says(kind):
    def made(device):
        net = nn.Linear(3, 2)
        optimizer = kind([{"params": [net.weight]}, {"params": [net.bias], "weight_decay": 0.0}], lr=0.1)
        compute_update_on(optimizer, torch.device(device))
        net(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return optimizer

    before, now = made("cpu"), made("cuda")
    assert [g["fused"] for g in before.param_groups] == [None, None]
    assert [(g["fused"], g["foreach"]) for g in now.param_groups] == [(True, False)] * 2
    for source, target, fused in ((before, now, True), (now, before, None)):
        saved = source.state_dict()
        keep_how(saved, target)
        target.load_state_dict(saved)
        assert [g["fused"] for g in target.param_groups] == [fused, fused]
        assert target.param_groups[1]["weight_decay"] == 0
        target.step()


def test_top_k_is_scikit_learns_where_logits_are_equal():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 4, (500, 10), generator=generator).float()
    labels = torch.randint(0, 10, (500,), generator=generator)
    for k in range(1, 10):
        expected = sklearn_metrics.top_k_accuracy_score(labels, logits, k=k, labels=range(10))
        assert float(in_top(logits, labels, k).double().mean()) == expected


@pytest.mark.parametrize("batch", [360, 256, 7])
def test_evaluation_gives_usbs_figures(build_short, batch):
    made = build_short(algorithm="fixmatch", eval_batch_size=batch, num_train_iter=6)
    made.train()
    ours = made.evaluate()
    with usb_calls_on(made.device):
        theirs = AlgorithmBase.evaluate(made, return_logits=True)
    logits, labels = theirs.pop("eval/logits"), made.source.test_labels
    assert len(labels) % batch or batch == 360
    top5 = sklearn_metrics.top_k_accuracy_score(labels, logits, k=5, labels=range(10))
    assert (ours["eval/top-1-acc"], ours["eval/top-5-acc"]) == (theirs["eval/top-1-acc"], top5)
    assert {k: ours[k] for k in theirs} == pytest.approx(theirs, rel=1e-6)
    assert 0.1 < ours["eval/top-1-acc"] < 1
