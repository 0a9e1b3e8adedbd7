"""The package on a simulated GPU (``fake_cuda``): nothing mixes devices, a steady step waits for nothing, and what
comes out is what the CPU computes. What this cannot see is left to ``test_cuda.py``: kernels, timing, several GPUs."""

from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import SPECIAL, of_base
from fake_cuda import CPU, CUDA, OLDEST, FakeCuda, FakeTensor, MixedDevicesError, Wait
from torch import nn

from muscle_plugin.data.augment import AUGMENTATIONS
from muscle_plugin.data.batches import Batches
from muscle_plugin.data.datasets.digits import digits
from muscle_plugin.data.source import SourceOptions
from muscle_plugin.data.splits import draw_split
from muscle_plugin.data.views import STRONG, UNLABELLED, View
from muscle_plugin.errors import Interrupted
from muscle_plugin.inference.predict import Predictor
from muscle_plugin.propagation import propagate
from muscle_plugin.registry.catalogue import FITTED, all_algorithms
from muscle_plugin.training.data import fixed_images
from muscle_plugin.training.evaluation import prediction_metrics
from muscle_plugin.training.host import Host
from muscle_plugin.usb.names import Hook

version = tuple(int(n) for n in torch.__version__.split(".")[:2])
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: test_cuda.py asks it"),
    pytest.mark.skipif(version < OLDEST, reason=f"FakeTensor of torch {'.'.join(map(str, OLDEST))} or newer"),
]


@pytest.fixture
def gpu():
    with FakeCuda() as gpu:
        yield gpu


# ------------------------------------------------------------------------------------------------------- the GPU itself


def put(x, place, value):
    x = x.clone()
    x[place] = value


@pytest.mark.parametrize(
    ("what", "waits"),
    {
        "item": (lambda x: x.sum().item(), "item"),
        "float": (lambda x: float(x.sum()), "item"),
        "if": (lambda x: 1 if x.sum() > 0 else 0, "item"),
        "tolist": (lambda x: x.tolist(), "copy to the CPU"),
        "cpu": (lambda x: x.cpu(), "copy to the CPU"),
        "to cpu": (lambda x: x.to("cpu", non_blocking=True), "copy to the CPU"),
        "into a CPU tensor": (lambda x: torch.zeros(2).copy_(x), "copy to the CPU"),
        "mask": (lambda x: x[x > 0], "index by a mask"),
        "put by mask": (lambda x: put(x, x > 0, x[:1].sum()), "put by a mask"),
        "its gradient": (lambda x: x.clone().requires_grad_()[x > 0].sum().backward(), "index by a mask, put by a mask"),
        "nonzero": (lambda x: x.nonzero(), "nonzero"),
        "masked_select": (lambda x: x.masked_select(x > 0), "masked_select"),
        "bincount": (lambda x: x.long().bincount(minlength=3), "bincount"),
        "unique": (lambda x: x.unique(), "_unique2"),
        "equal": (lambda x: torch.equal(x, x), "equal"),
        "repeats": (lambda x: x.repeat_interleave(x.long()), "repeat_interleave"),
        "to": (lambda x: torch.ones(2).to(x.device), "copy to the device"),
        "cuda": (lambda x: torch.ones(2).cuda(), "copy to the device"),
        "from a CPU tensor": (lambda x: x.copy_(torch.ones(2)), "copy to the device"),
        "tensor on device": (lambda x: torch.tensor([1.0, 2.0], device=x.device), "copy to the device"),
        "new_tensor": (lambda x: x.new_tensor([1.0]), "copy to the device"),
        "by places on the CPU": (lambda x: x[torch.tensor([0, 1])], "copy of an index to the device"),
        "by a list": (lambda x: x[[0, 1]], "copy to the device"),
        "number to places": (lambda x: put(x, torch.arange(1, device=x.device), 1.0), "copy of a number to the device"),
        "synchronize": (lambda x: torch.cuda.synchronize(), "synchronize"),
        "copy that does not wait": (lambda x: torch.ones(2).to(x.device, non_blocking=True), None),
        "made there": (lambda x: torch.full((2,), 1.0, device=x.device).to(x.device), None),
        "number to one place": (lambda x: put(x, 0, 1.0), "copy to the device"),
        "number to a row": (lambda x: put(x.view(1, 2), 0, 1.0), None),
        "number by mask": (lambda x: put(x, x > 0, 1.0), None),
        "repeats of known size": (lambda x: x.repeat_interleave(x.long(), output_size=2), None),
        "where": (lambda x: torch.where(x > 0, x, 0).sum(), None),
        "number of the CPU": (lambda x: x * torch.tensor(2.0), None),
        "one hot": (lambda x: nn.functional.one_hot(x.long(), 3), None),
        "quantile": (lambda x: torch.quantile(x, 0.8), None),
        "cross-entropy": (lambda x: nn.functional.cross_entropy(x.view(1, 2), x[:1].long()), None),
        "on the CPU": (lambda x: torch.ones(2)[torch.ones(2) > 0].nonzero().tolist(), None),
    }.values(),
)  # fmt: skip
def test_what_waits_is_counted(gpu, what, waits):
    x = torch.ones(2, device="cuda")
    what(x)
    assert ", ".join(w.what for w in gpu.waits) == (waits or "")


@pytest.mark.parametrize(
    "what",
    {
        "sum": lambda x: x + torch.ones(2),
        "in place": lambda x: x.add_(torch.ones(2)),
        "of the CPU in place": lambda x: torch.ones(2).add_(x),
        "cat": lambda x: torch.cat([x, torch.ones(2)]),
        "stack": lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
        "index": lambda x: torch.ones(2)[x.long()],
        "index_select": lambda x: x.index_select(0, torch.arange(2)),
        "gather": lambda x: x.gather(0, torch.arange(2)),
        "put": lambda x: put(x, torch.arange(2, device=x.device), torch.ones(2)),
        "lists": lambda x: torch._foreach_lerp_([x], [torch.ones(2)], 0.5),
        "net": lambda x: nn.Linear(2, 3)(x),
        "generator": lambda x: torch.rand(2, generator=torch.Generator(), device=x.device),
        "loss": lambda x: nn.functional.cross_entropy(x.view(1, 2), torch.zeros(1, dtype=torch.int64)),
    }.values(),
)
def test_what_mixes_devices_is_refused(gpu, what):
    with pytest.raises(MixedDevicesError):
        what(torch.ones(2, device="cuda"))


def test_shapes_change_in_place(gpu):
    x = torch.arange(6.0, device="cuda").view(2, 3)
    x.t_().unsqueeze_(0)
    total = torch.mul(x, x, out=torch.empty(0, device="cuda"))
    assert x.shape == x.value.shape == total.shape == total.value.shape == (1, 3, 2)
    x[0, 0].add_(1)  # a view
    assert x.value[0, 0].tolist() == [1.0, 4.0]
    assert not gpu.waits


def test_numpy_wants_a_tensor_of_the_cpu(gpu):
    with pytest.raises(RuntimeError, match="not supported"):
        torch.ones(2, device="cuda").numpy()


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
def test_losses_and_gradients_are_those_of_the_cpu(precision):
    def trained(device):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(0.1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 10)
        ).to(device)
        x, y = torch.randn(4, 3, 8, 8).to(device), torch.arange(4).to(device)
        with torch.autocast("cuda", precision) if precision and device == CUDA else nullcontext():
            out = net(x)
        loss = nn.functional.cross_entropy(out.float(), y)
        (loss + (2 * out[:, :1].expand(-1, 3)).float().square().mean()).backward()
        return out, loss, [p.grad for p in net.parameters()]

    with FakeCuda():
        out, loss, gradients = trained(CUDA)
    assert out.dtype == (precision or torch.float32)
    _, expected, theirs = trained(CPU)
    assert loss.device == gradients[0].device == CUDA
    torch.testing.assert_close(loss.value, expected, rtol=0.02 if precision else 0, atol=0)
    if precision is None:
        assert all(torch.equal(g.value, h) for g, h in zip(gradients, theirs, strict=True))


# ------------------------------------------------------------------------------------------------------------ the views


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_those_of_the_cpu_and_wait_for_nothing(gpu, name, channels):
    images = torch.randint(0, 256, (64, channels, 33, 28), dtype=torch.uint8)
    there = AUGMENTATIONS[name](images.to(CUDA, non_blocking=True), torch.Generator().manual_seed(0))
    here = AUGMENTATIONS[name](images, torch.Generator().manual_seed(0))
    assert there.device == CUDA
    assert torch.equal(there.value, here)
    assert not gpu.waits


def batches(device, data_on, hard="randaugment"):
    source = digits(SourceOptions(Path(), 16))
    views = ("x_lb", "x_ulb_w", "x_ulb_m", "x_ulb_s", "x_ulb_s_0", "x_ulb_s_0_rot")
    made = Batches(
        source, draw_split(source, 40, 0), 8, 24, (*views, "y_lb", "rot_v", "idx_lb", "idx_ulb"), "fixmatch",
        "crop_flip", hard, 3, 0, device, data_on,
    )  # fmt: skip
    made.add_views({"x_ulb_h": View(UNLABELLED, STRONG, 3)})
    return made


@pytest.mark.slow
@pytest.mark.parametrize("data_on", ["device", "host"])
@pytest.mark.parametrize("hard", ["randaugment", "digits_hard"])
def test_batches_are_those_of_the_cpu_and_wait_for_nothing(gpu, data_on, hard):
    there, here = (batches(d, data_on, hard) for d in (torch.device("cuda"), CPU))
    assert there.resident == (data_on == "device")
    gpu.waits.clear()
    for step in (0, 1, 5):
        made, expected = there.batch(step), here.batch(step)
        assert made.keys() == expected.keys()
        assert all(x.device == CUDA for x in made.values())
        assert all(torch.equal(x.value, expected[k]) for k, x in made.items())
    assert not gpu.waits


@pytest.mark.parametrize("data_on", ["device", "host"])
def test_the_kernel_is_given_what_is_on_the_gpu(gpu, monkeypatch, data_on):
    """Triton itself, which wants a driver, is left out: what it would be launched with is looked at."""
    kernel = pytest.importorskip("muscle_plugin.data.kernel", reason="Triton is not installed")
    launched = []

    class Launched:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: launched.append((grid, arguments, constants))

    made = batches(CUDA, data_on)
    made._kernel = kernel
    monkeypatch.setattr(kernel, "_views", Launched())
    gpu.waits.clear()
    batch = made.batch(1)
    assert not gpu.waits
    counts = [sum(v.count * made.size[v.images] for v in views.values()) for views in made._by_strength().values()]
    assert [grid for grid, *_ in launched] == [(n,) for n in counts]
    for (n,), (pool, plan, out, *others), constants in launched:
        assert all(x.device == CUDA for x in (pool, plan, out, *others[:2]))
        assert (pool.dtype, plan.dtype, out.dtype) == (torch.uint8, torch.int32, torch.float32)
        assert (plan.shape, out.shape) == ((n, constants["COLUMNS"]), (n, 3, *made._shape[1:]))
        assert pool.is_contiguous()
        assert plan.value[:, 0].max() < len(pool)
    assert all(x.device == CUDA for x in batch.values())


# ------------------------------------------------------------------------------------------------------- the algorithms

LEARNING = "pytorch_metric_learning/"
#: What is left of waiting in a step (docs/performance.md); an algorithm not named has none.
KNOWN = {
    "contrastive": {
        Wait("nonzero", f"{LEARNING}utils/loss_and_miner_utils.py get_all_pairs_indices"): 2,
        Wait("copy of a number to the device", f"{LEARNING}losses/generic_pair_loss.py mat_based_loss"): 2,
        Wait("item", f"{LEARNING}losses/generic_pair_loss.py _assert_either_pos_or_neg"): 1,
        Wait("item", f"{LEARNING}losses/supcon_loss.py _compute_loss"): 2,
        Wait("index by a mask", f"{LEARNING}reducers/threshold_reducer.py element_reduction_helper"): 1,
        Wait("put by a mask", "muscle_plugin/training/hooks.py after_train_step"): 1,  # its gradient
    },
    "freematch": {
        Wait("item", "semilearn/algorithms/freematch/freematch.py train_step"): 1,
        Wait("index by a mask", "semilearn/algorithms/freematch/freematch.py entropy_loss"): 1,
        Wait("bincount", "semilearn/algorithms/freematch/freematch.py entropy_loss"): 1,
        Wait("put by a mask", "muscle_plugin/training/hooks.py after_train_step"): 1,  # its gradient
    },
    "vat": {Wait("copy to the CPU", "semilearn/algorithms/vat/vat.py vat_loss"): 1},
}
#: A step that logs reads all values at once; one that evaluates sees to it that the weights are finite, and reads its results.
LOG = {Wait("copy to the CPU", "muscle_plugin/training/hooks.py read"): 1}
RESULTS = {Wait("copy to the CPU", "muscle_plugin/training/evaluation.py prediction_metrics"): 2}
EVALUATION = {Wait("copy to the CPU", "muscle_plugin/training/monitor.py check_now"): 1, **RESULTS}
#: Where a refresh of pseudo-labels, once an epoch, reads values or makes what hangs on them; after the first MUSCLE plans anew.
PROPAGATION = {f"propagation/{name}.py" for name in ("class_mass", "diffusion", "graph")}
REFRESH = {"algorithms/label_propagation.py", "data/views.py", *PROPAGATION}
PLANNING = {"algorithms/forward_capture.py", "training/state.py"}
STEPS, STEADY, LAST = 4, (1, 2), 3


class Steps(Hook):
    """The waits of each step, from its batch to its log line, and of what comes between two steps."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu, self.of, self.after, self.mark = gpu, {}, {}, Counter()

    def since(self):
        waits, self.mark = self.gpu.waits - self.mark, self.gpu.waits.copy()
        return waits

    def before_train_step(self, algorithm):
        self.after[algorithm.it - 1] = self.since()

    def after_train_step(self, algorithm):
        self.of[algorithm.it] = self.since()


def trained(build_short, name, device, precision="fp32", gpu=None, **settings):
    """An algorithm after ``STEPS`` steps, the last of which logs and evaluates (but saves nothing); and the waits of each."""
    never = dict.fromkeys(("num_log_iter", "num_eval_iter", "num_save_iter"), 1000)
    settings = {"num_train_iter": STEPS, "clip_grad": 1.0, **never, **(of_base(SPECIAL, name) or {}), **settings}
    if "crmatch" in name:  # wants a large net
        settings["total_batch"] = 2
    algorithm = build_short(algorithm=name, device=device, precision=precision, **settings)
    algorithm.loader_dict["eval"] = fixed_images(algorithm, algorithm.source.test[:8])
    algorithm.save_model = lambda *_: None
    steps = Steps(gpu) if gpu else None
    if steps:
        algorithm.register_hook(steps, "Steps", "LOWEST")
    algorithm.warmup()
    algorithm.train()
    return algorithm, steps


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", sorted(all_algorithms().keys() - FITTED))
def test_an_algorithm_trains_and_does_not_wait(build_short, gpu, name, precision):
    algorithm, steps = trained(build_short, name, "cuda", precision, gpu)
    known = Counter(of_base(KNOWN, name) or {})
    assert {s: steps.of[s] for s in STEADY} == dict.fromkeys(STEADY, known)
    assert steps.of[LAST] == known + Counter(LOG) + Counter(EVALUATION)
    between = {w.where.partition(" ")[0].removeprefix("muscle_plugin/") for w in steps.after[STEADY[0]]}
    assert bool(between) == name.endswith("labelprop")
    assert between <= REFRESH | PLANNING
    assert not steps.after[0]

    assert algorithm.device == CUDA
    assert algorithm.updates == STEPS + getattr(algorithm.args, "num_wu_iter", 0)
    assert all(g["fused"] for g in algorithm.optimizer.param_groups)
    assert (algorithm.loss_scaler.is_enabled(), algorithm.loss_scaler._device) == (precision == "fp16", "cuda")
    nets = {**algorithm.model.state_dict(), **algorithm.ema_model.state_dict()}
    assert all(isinstance(x, FakeTensor) and x.device == CUDA for x in nets.values())
    if precision == "fp32":
        assert_as_on_the_cpu(build_short, algorithm, name)


def assert_as_on_the_cpu(build_short, algorithm, name):
    expected, _ = trained(build_short, name, "cpu")
    for net in ("model", "ema_model"):
        ours = {k: v.value for k, v in getattr(algorithm, net).state_dict().items()}
        torch.testing.assert_close(ours, dict(getattr(expected, net).state_dict()), rtol=1e-4, atol=1e-5)
    assert algorithm.last_metrics == pytest.approx(expected.last_metrics, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["2,3", "none"])
def test_a_head_on_frozen_features_trains_and_does_not_wait(short_run, build_short, gpu, tmp_path, pool):
    short_run(algorithm="supervised", device="cpu", save_name="before")
    frozen = {"tune": "head", "init_from": str(tmp_path / "before"), "cache_dir": str(tmp_path), "view_pool": pool}
    algorithm, steps = trained(build_short, "muscle_fixmatch", "cuda", "fp32", gpu, **frozen)
    assert [steps.of[s] for s in STEADY] == [Counter(), Counter()]
    expected, _ = trained(build_short, "muscle_fixmatch", "cpu", **frozen)
    ours = {k: v.value for k, v in algorithm.model.state_dict().items()}
    torch.testing.assert_close(ours, dict(expected.model.state_dict()), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("data_on", ["device", "host"])
@pytest.mark.parametrize("name", ["fixmatch", "muscle_remixmatch"])
def test_a_step_waits_for_nothing_wherever_the_images_are(build_short, gpu, name, data_on):
    augmentations = {"weak_augment": "crop_flip", "hard_augment": "randaugment"}
    algorithm, steps = trained(build_short, name, "cuda", gpu=gpu, data_on=data_on, **augmentations)
    assert algorithm.batches.resident == (data_on == "device")
    assert not any(steps.of[s] for s in STEADY)


@pytest.mark.parametrize("optim", ["SGD", "AdamW"])
@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
@pytest.mark.parametrize("scale", [2.0**10, 2.0**40])
def test_the_loss_scaler_does_not_wait_even_for_a_step_that_it_leaves_out(build_short, gpu, optim, clip_grad, scale):
    algorithm = build_short(algorithm="fixmatch", device="cuda", precision="fp16", optim=optim, clip_grad=clip_grad)
    algorithm.loss_scaler = torch.amp.GradScaler("cuda", init_scale=scale)
    algorithm.call_hook("before_run")
    before = [p.value.clone() for p in algorithm.model.parameters()]
    batch = algorithm.process_batch(**algorithm.batches.batch(0))
    with algorithm.in_step():
        algorithm.out_dict, algorithm.log_dict = algorithm.train_step(**batch)
    gpu.waits.clear()
    algorithm.call_hook("after_train_step", "ParamUpdateHook")
    algorithm.call_hook("after_train_step", "EMAHook")
    assert not gpu.waits
    left_out = all(torch.equal(p.value, b) for p, b in zip(algorithm.model.parameters(), before, strict=True))
    assert left_out == (scale > 2.0**20) == bool(algorithm.monitor.state.skipped.value)


@pytest.mark.parametrize("told_apart", [False, True])
def test_an_evaluation_waits_for_nothing_but_its_results(build_short, gpu, told_apart):
    algorithm = build_short(algorithm="fixmatch", device="cuda", eval_batch_size=100)
    algorithm.call_hook("before_run")
    if told_apart:
        algorithm.test_sequestered = algorithm.source.test_labels > 6
    gpu.waits.clear()
    metrics = algorithm.evaluate(return_logits=True)
    logits = {Wait("copy to the CPU", "muscle_plugin/training/host.py evaluate"): 1}
    assert gpu.waits == Counter(RESULTS) + Counter(logits)
    expected = prediction_metrics(
        torch.from_numpy(metrics.pop("eval/logits")), algorithm.source.test_labels, algorithm.test_sequestered
    )
    assert metrics == pytest.approx({f"eval/{k}": v for k, v in expected.items()})


@pytest.mark.parametrize(
    ("neighbours", "method", "mass"),
    [
        ("exact", "diffusion", "none"),
        ("approximate", "diffusion", "uniform"),
        ("exact", "poisson_mbo", "none"),
        ("exact", "poisson_mbo", [0.2, 0.3, 0.5]),
    ],
)
def test_label_propagation_is_that_of_the_cpu(gpu, neighbours, method, mass):
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(300) % 3
    features = torch.randn(3, 16, generator=generator)[truth] + 0.5 * torch.randn(300, 16, generator=generator)
    labels = torch.where(torch.arange(300) < 12, truth, -1)
    settings = {"k": 10, "neighbours": neighbours, "method": method, "class_mass": mass}
    there = propagate(features.to(CUDA), labels.to(CUDA), 3, **settings)
    assert {w.where.partition(" ")[0].removeprefix("muscle_plugin/") for w in gpu.waits} <= {"elsewhere", *REFRESH}
    here = propagate(features, labels, 3, backend="torch", **settings)
    assert (there.stats.backend, there.labels.device) == ("torch", CUDA)
    assert torch.equal(there.labels.value, here.labels)
    torch.testing.assert_close(there.weights.value, here.weights)
    torch.testing.assert_close(there.class_weights.value, here.class_weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muscle_comatch", "flexmatch", "meanteacher_labelprop"])
def test_a_run_goes_on_to_the_bit(gpu, whole_and_resumed, name, tmp_path):
    whole_and_resumed(algorithm=name, device="cuda", precision="fp16")
    images = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
    there, here = (Predictor(tmp_path / "whole" / "latest_model.pth", d).probabilities(images) for d in ("cuda", "cpu"))
    assert torch.equal(there, here)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muscle_comatch", "softmatch", "remixmatch", "meanteacher_labelprop"])
@pytest.mark.parametrize("there", ["cpu", "cuda"])
def test_a_run_goes_on_on_another_device(short_run, monkeypatch, name, there):
    devices = {"cpu": nullcontext, "cuda": FakeCuda}
    (here,) = devices.keys() - {there}
    save = Host._save_if_due
    with monkeypatch.context() as patch:
        patch.setattr(Host, "_save_if_due", lambda self: (self.it == 4 and self.request_stop(), save(self)))
        with pytest.raises(Interrupted), devices[there]():
            short_run(algorithm=name, device=there, save_name="r")
    with devices[here]():
        result = short_run(algorithm=name, device=here, save_name="r", resume="yes")
    assert result["complete"]


def test_an_algorithm_may_log_what_it_has_on_the_cpu(build_short, gpu, monkeypatch):
    algorithm = build_short(algorithm="fixmatch", device="cuda", num_train_iter=2)
    algorithm.hooks_dict["LoggingHook"].sums["train/then"] = torch.tensor(2.0)  # as in a run that goes on
    algorithm.hooks_dict["LoggingHook"].counts["train/then"] = 1
    step, records = algorithm.train_step, []

    def logs(**batch):
        out, log = step(**batch)
        return out, {**log, "train/now": torch.tensor(0.5)}

    monkeypatch.setattr(algorithm, "train_step", logs)
    monkeypatch.setattr(algorithm, "record", records.append)
    algorithm.train()
    assert [(r["train/then"], r["train/now"]) for r in records] == [(2.0, 0.5)]
