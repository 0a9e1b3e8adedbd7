"""MUSCLE as a composition: what is forwarded, what is reused, and that weight 0 leaves the base as it is."""

import copy

import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F

from muscle_plugin.files import load_tensors
from muscle_plugin.losses import mutual_information
from muscle_plugin.registry.catalogue import muscle_algorithms
from muscle_plugin.usb.calls import usb_calls_on


def prepared(algorithm):
    algorithm.epoch = 0
    algorithm.model.train()
    algorithm.call_hook("before_run")
    algorithm.prepare_steps()
    return algorithm


@pytest.fixture(autouse=True)
def _usb_calls_on_cpu():
    with usb_calls_on(torch.device("cpu")):
        yield


class Forwards:
    """Counts the images that go through a net, at its first convolution: whoever calls it, however wrapped."""

    def __init__(self, net):
        self.images = []
        first = next(m for m in net.modules() if isinstance(m, torch.nn.Conv2d))
        self._handles = [first.register_forward_pre_hook(lambda _, args: self.images.append(args[0].detach()))]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for h in self._handles:
            h.remove()

    def total(self):
        return sum(len(x) for x in self.images)


def step(algorithm, number=0):
    batch = algorithm.batches.batch(number)
    return batch, *algorithm.train_step(**algorithm.process_batch(**batch))


def test_muscle_fixmatch_forwards_512_images_at_the_papers_batch(build_short):
    algorithm = prepared(build_short(algorithm="muscle_fixmatch", total_batch=128))
    with Forwards(algorithm.model) as seen:
        step(algorithm)
    assert seen.total() == 512  # 128 weak and 3 x 128 hard views; FixMatch's own 192 are among them
    assert len(seen.images) == 1  # in one forward


def test_muscle_forwards_512_images_at_the_papers_batch(build_short):
    algorithm = prepared(build_short(algorithm="muscle", total_batch=128))
    with Forwards(algorithm.model) as seen:
        step(algorithm)
    assert seen.total() == 512


def test_muscle_meanteacher_uses_the_students_own_weak_view(build_short):
    algorithm = prepared(build_short(algorithm="muscle_meanteacher", total_batch=16))
    assert algorithm.plan.weak == {"labelled": "x_lb", "unlabelled": "x_ulb_s"}
    with Forwards(algorithm.model) as student, Forwards(algorithm.ema_model) as teacher:
        step(algorithm)
    assert (student.total(), teacher.total()) == (8 + 8 + 3 * 16, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(muscle_algorithms()))
def test_no_image_is_forwarded_twice(build_short, name):
    """Beyond what the base does itself: its own forwards are the same, and MUSCLE adds only images not among them."""
    net = {"net": "wrn_28_2", "img_size": 32, "total_batch": 4} if "crmatch" in name else {}
    extra = {"num_wu_iter": 1} if "dash" in name else {}
    algorithm = build_short(algorithm=name, **net, **extra)
    algorithm.warmup()
    prepared(algorithm)
    batch = algorithm.batches.batch(0)
    extra_views = torch.cat([batch[n] for n in algorithm.plan.extra_views])
    with Forwards(algorithm.model) as alone:
        algorithm.mi_loss.weight = 0.0
        algorithm.train_step(**algorithm.process_batch(**batch))
        algorithm.mi_loss.weight = 1.0
    with Forwards(algorithm.model) as seen:
        algorithm.train_step(**algorithm.process_batch(**batch))
    assert seen.total() == alone.total() + len(extra_views)
    hard_rows = {
        kind: len(algorithm.plan.hard[kind]) + (batch[extra].shape[0] // size if extra in batch else 0)
        for kind, extra, size in zip(
            ("labelled", "unlabelled"), ("x_lb_h", "x_ulb_h"), algorithm.batch_sizes, strict=True
        )
    }
    assert hard_rows == {"labelled": 3, "unlabelled": 3}
    reused = [batch[n] for n in algorithm.plan.found]
    for rows in reused:
        assert not any(torch.equal(rows[0], r) for r in extra_views)


def test_the_loss_is_the_bases_minus_the_mutual_information_of_the_views(build_short):
    """Against a separate computation: with batch norm in evaluation mode, forwards do not influence each other."""
    algorithm = prepared(build_short(algorithm="muscle_fixmatch", mi_weight=0.7))
    algorithm.model.eval()
    batch, out, log = step(algorithm)
    logits = {n: algorithm.model(x)["logits"] for n, x in batch.items() if n.startswith("x_")}
    j, i = algorithm.batch_sizes
    weak = torch.cat([logits["x_lb"], logits["x_ulb_w"]]).softmax(1)
    hard_lb = logits["x_lb_h"].view(3, j, -1)
    hard_ulb = torch.cat([logits["x_ulb_s"].unsqueeze(0), logits["x_ulb_h"].view(2, i, -1)])
    expected_mi = mutual_information(weak, torch.cat([hard_lb, hard_ulb], 1).softmax(2))
    target = logits["x_ulb_w"].softmax(1)
    mask = (target.max(1).values >= algorithm.p_cutoff).float()
    base = F.cross_entropy(logits["x_lb"], batch["y_lb"])
    base = base + (F.cross_entropy(logits["x_ulb_s"], target.argmax(1), reduction="none") * mask).mean()
    torch.testing.assert_close(log["train/mi"], expected_mi.detach())
    torch.testing.assert_close(out["loss"], base - 0.7 * expected_mi)


def test_views_are_paired_with_their_own_image(build_short):
    """Row n of every view must show image n: MI of mismatched pairs would be far lower for a net that knows the class."""
    algorithm = prepared(build_short(algorithm="muscle", total_batch=40))
    batch = algorithm.batches.batch(0)
    for name in ("x_lb_h", "x_ulb_h"):
        weak = batch["x_lb" if name == "x_lb_h" else "x_ulb_w"].flatten(1)
        weak = F.normalize(weak - weak.mean(1, keepdim=True))
        for views in batch[name].flatten(1).chunk(3):
            hard = F.normalize(views - views.mean(1, keepdim=True))
            similarity = hard @ weak.t()
            own = similarity.diagonal().mean()
            others = (similarity.sum() - similarity.diagonal().sum()) / (len(weak) * (len(weak) - 1))
            assert own > others + 0.1


def test_the_gradient_reaches_both_views(build_short):
    algorithm = prepared(build_short(algorithm="muscle"))
    tap_batch = algorithm.batches.batch(0)
    logits = {}
    original = type(algorithm)._predictions

    def keep(self, *args):
        logits["weak"], logits["hard"] = original(self, *args)
        for x in logits.values():
            x.retain_grad()
        return logits["weak"], logits["hard"]

    type(algorithm)._predictions = keep
    try:
        out, _ = algorithm.train_step(**algorithm.process_batch(**tap_batch))
        out["loss"].backward()
    finally:
        type(algorithm)._predictions = original
    assert logits["weak"].grad.abs().sum() > 0
    assert logits["hard"].grad.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("base", ["fixmatch", "meanteacher", "mixmatch", "freematch", "vat"])
def test_weight_zero_trains_bit_for_bit_as_the_base(short_run, tmp_path, base):
    short_run(algorithm=base, save_name="base")
    short_run(algorithm=f"muscle_{base}", save_name="muscle", mi_weight=0)
    short_run(algorithm=f"muscle_{base}", save_name="one", mi_weight=1)
    a, b, c = (load_tensors(tmp_path / n / "latest_model.pth") for n in ("base", "muscle", "one"))
    for net in ("model", "ema_model"):
        assert all(torch.equal(a[net][k], b[net][k]) for k in a[net])
    assert any(not torch.equal(a["model"][k], c["model"][k]) for k in a["model"])


@pytest.mark.parametrize(
    "name",
    [
        "muscle_freematch",
        "muscle_vat",
        "muscle_comatch",
        "muscle_simmatch",
        "muscle_softmatch",
        "muscle_meanteacher_original",
    ],
)
def test_planning_leaves_no_trace(build_short, name):
    from muscle_plugin.training import state

    algorithm = build_short(algorithm=name)
    algorithm.epoch = 0
    algorithm.call_hook("before_run")
    algorithm.model.train()

    def everything():
        nets = {n: state.plain(net.state_dict(), copy=True) for n, net in algorithm.nets.items()}
        return {**state.capture(algorithm, copy=True), **nets, "random": state.capture_random(algorithm.device)}

    before = everything()
    algorithm.prepare_steps()
    after = everything()

    def flat(x, path=""):
        if isinstance(x, dict):
            for k, v in x.items():
                yield from flat(v, f"{path}/{k}")
        elif isinstance(x, (list, tuple)):
            for k, v in enumerate(x):
                yield from flat(v, f"{path}/{k}")
        else:
            yield path, x

    first, second = dict(flat(before)), dict(flat(after))
    assert first.keys() == second.keys()
    for path, value in first.items():
        same = torch.equal(value, second[path]) if isinstance(value, torch.Tensor) else value == second[path]
        assert same, path
    assert all(p.grad is None for p in algorithm.model.parameters())


@pytest.mark.parametrize(("ratio", "views"), [(0.25, 1), (1, 2), (3, 5), (7, 3)])
def test_any_ratio_and_number_of_views(short_run, ratio, views):
    result = short_run(algorithm="muscle_fixmatch", ratio=ratio, total_batch=32, hard_views=views)
    assert result["complete"]


@pytest.mark.parametrize("settings", [{"mi_labelled": False}, {"mi_batch_norm": "separate"}, {"use_cat": False}])
def test_variants_train(short_run, settings):
    assert short_run(algorithm="muscle_fixmatch", **settings)["complete"]


def test_separate_batch_norm_leaves_the_running_statistics_to_the_base(build_short):
    base = prepared(build_short(algorithm="fixmatch"))
    separate = prepared(build_short(algorithm="muscle_fixmatch", mi_batch_norm="separate"))
    joint = prepared(build_short(algorithm="muscle_fixmatch"))
    for a in (base, separate, joint):
        step(a)
    buffers = [dict(a.model.named_buffers()) for a in (base, separate, joint)]
    assert all(torch.equal(buffers[0][k], buffers[1][k]) for k in buffers[0])
    assert any(not torch.equal(buffers[0][k], buffers[2][k]) for k in buffers[0])


def test_a_step_unlike_the_planned_one_is_an_error(build_short):
    algorithm = prepared(build_short(algorithm="muscle_fixmatch"))
    batch = algorithm.process_batch(**algorithm.batches.batch(0))
    batch["x_ulb_s"] = batch["x_ulb_s"][:-1]
    with pytest.raises(RuntimeError, match="planned"):
        algorithm.train_step(**batch)


# ----------------------------------------------------------------------------------------------------- Mean Teacher


def test_meanteacher_trains_the_student_and_not_the_teacher(build_short):
    algorithm = prepared(build_short(algorithm="meanteacher"))
    with torch.no_grad():
        for p in algorithm.ema_model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    algorithm.it = algorithm.num_train_iter  # the ramp is over
    _, out, log = step(algorithm)
    assert log["train/unsup_loss"] > 0
    sup_only = copy.deepcopy({n: p.detach() for n, p in algorithm.model.named_parameters()})
    out["loss"].backward()
    gradient = {n: p.grad.clone() for n, p in algorithm.model.named_parameters()}
    assert all(p.grad is None for p in algorithm.ema_model.parameters())
    algorithm.model.zero_grad()
    algorithm.lambda_u = 0
    _, out, _ = step(algorithm)
    out["loss"].backward()
    without = {n: p.grad for n, p in algorithm.model.named_parameters()}
    assert any(not torch.allclose(gradient[n], without[n]) for n in sup_only)


def test_meanteacher_is_that_of_usb_0_3_2(build_short):
    """Compared with USB's own class, hosted, where USB's is the working one."""
    import inspect

    from semilearn.core.utils import ALGORITHMS

    from muscle_plugin.training import Host

    usb = ALGORITHMS["meanteacher"]
    if "logits_x_ulb_s = outs_x_ulb_s" not in inspect.getsource(usb.train_step):
        pytest.skip("this USB's MeanTeacher takes the student's logits from the teacher")
    ours = prepared(build_short(algorithm="meanteacher"))
    theirs_class = type("StockMeanTeacher", (Host, usb), {"usb_name": "meanteacher"})
    args = copy.copy(ours.args)
    args.uratio = 1
    theirs = prepared(theirs_class(args, ours.net_builder))
    for number in range(3):
        for a in (ours, theirs):
            a.it = number
            batch = a.batches.batch(number)
            with torch.random.fork_rng():
                a.out_dict, a.log_dict = a.train_step(**a.process_batch(**batch))
            a.call_hook("after_train_step", "ParamUpdateHook")
            a.call_hook("after_train_step", "EMAHook")
    for x, y in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(x, y)


# ------------------------------------------------------------------------------------------------------ registration


def test_register_makes_usb_know_us(tmp_path):
    import semilearn

    import muscle_plugin.register  # noqa: F401
    from muscle_plugin.settings.resolve import load_settings

    resolved = load_settings(
        ROOT / "benchmark_configs" / "muscle_fixmatch_digits_10.yaml", img_size=16, total_batch=16, num_train_iter=4,
        num_eval_iter=2, epoch=1, save_dir=str(tmp_path),
    )  # fmt: skip
    from argparse import Namespace

    args = Namespace(**resolved.as_dict())
    builder = semilearn.get_net_builder("small_cnn", False)
    algorithm = semilearn.get_algorithm(args, builder, None, None)
    algorithm.train()
    assert algorithm.results_dict["eval/best_acc"] > 0


def test_a_clash_of_names_is_an_error(monkeypatch):
    from semilearn.core.utils import ALGORITHMS

    from muscle_plugin import register

    class Other:
        pass

    monkeypatch.setitem(ALGORITHMS._dict, "muscle_fixmatch", Other)
    with pytest.raises(RuntimeError, match="algorithm 'muscle_fixmatch'"):
        register.register_all()
