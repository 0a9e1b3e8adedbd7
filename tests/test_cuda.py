"""On a GPU: the same views as on the CPU, nothing that waits for the device, training, checkpoints across devices."""

from pathlib import Path

import pytest
import torch
from conftest import KNOWN, SPECIAL, of_base
from test_augment import VALUES, pictures

from muscle_plugin.data.augment import AUGMENTATIONS
from muscle_plugin.data.batches import Batches
from muscle_plugin.data.datasets import load_source
from muscle_plugin.data.operations import OPERATIONS
from muscle_plugin.data.randaugment import Plan, apply
from muscle_plugin.data.source import SourceOptions
from muscle_plugin.data.splits import draw_split
from muscle_plugin.data.views import STRONG, UNLABELLED, View
from muscle_plugin.registry.catalogue import FITTED, all_algorithms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
#: Grey levels by which a view may differ from the CPU's; those not named are equal to the bit.
TOLERANCE = {"iic": 1, "digits_weak": 1, "digits_hard": 1}


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (33, 28)])
def test_views_are_those_of_the_cpu(name, channels, size):
    images = torch.randint(0, 256, (256, channels, *size), dtype=torch.uint8)
    there, here = (AUGMENTATIONS[name](images.to(d), torch.Generator().manual_seed(0)).cpu() for d in (CUDA, CPU))
    assert there.dtype == here.dtype
    scale = 1 if here.dtype == torch.uint8 else 255
    assert (there.float() - here.float()).abs().max() * scale <= TOLERANCE.get(name, 0)


def batches(device, **more):
    source = load_source("digits", SourceOptions(Path(), 32))
    made = Batches(
        source, draw_split(source, 40, 0), 32, 96, ("x_lb", "y_lb", "x_ulb_w", "x_ulb_s", "idx_ulb"), "fixmatch",
        "crop_flip", "randaugment", 3, 0, device, **more,
    )  # fmt: skip
    made.add_views({"x_ulb_h": View(UNLABELLED, STRONG, 3)})
    return made


@pytest.mark.parametrize("hard", ["randaugment", "randaugment_usb", "iic", "digits_hard"])
@pytest.mark.parametrize("where", ["device", "host"])
def test_making_a_batch_never_waits_for_the_device(hard, where):
    made = batches(CUDA, data_on=where)
    made._augment[STRONG] = AUGMENTATIONS[hard]
    made.batch(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 4):
            made.batch(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize("kernel", [True, False])
def test_batches_are_those_of_the_cpu(monkeypatch, where, kernel):
    if not kernel:
        monkeypatch.setenv("MUSCLE_VIEW_KERNEL", "0")
    made = batches(CUDA, data_on=where)
    assert (made._kernel is not None) == kernel, made.notes
    made.channels_last = True
    for step in (3, 4, 7):
        there, here = made.batch(step), batches(CPU).batch(step)
        for k, expected in here.items():
            torch.testing.assert_close(there[k].cpu(), expected, rtol=0, atol=0 if kernel else 1e-5)


@pytest.mark.parametrize("size", [(32, 32), (33, 28), (84, 84)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_kernels_operations_are_those_of_the_cpu(channels, size):
    kernel = pytest.importorskip("muscle_plugin.data.kernel")
    images = pictures(64, channels, *size)
    for name, values in VALUES.items():
        values = torch.zeros(64) if values is None else values.float().clamp(-300, 300)
        plan = Plan(torch.full((1, 64), OPERATIONS.index(name)), values.view(1, -1), 128)
        packed = kernel.pack(plan, torch.arange(64), *size).to(CUDA)
        one, zero = (torch.full((channels,), v, device=CUDA) for v in (1.0, 0.0))
        there = kernel.views(images.to(CUDA), packed, plan, one, zero, channels)
        assert torch.equal(there.cpu(), apply(images, plan).float()), name


def test_a_plan_for_a_second_gpu_is_drawn_without_the_first():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    there, here = batches(torch.device("cuda", 1)).batch(3), batches(CPU).batch(3)
    assert {t.device.index for t in there.values()} == {1}
    assert all(torch.equal(there[k].cpu(), here[k]) for k in here)


NEVER = sorted(n for n in all_algorithms().keys() - FITTED if of_base(KNOWN, n) is None)
HALF = ["fixmatch", "flexmatch", "softmatch", "comatch", "meanteacher", "meanteacher_original", "supervised", "muscle"]
HALF += ["muscle_fixmatch", "muscle_meanteacher"]


@pytest.mark.parametrize(
    ("name", "precision"), [(n, "fp32") for n in NEVER] + [(n, p) for n in HALF for p in ("bf16", "fp16")]
)
def test_a_steady_step_never_waits_for_the_device(build_short, name, precision):
    never = dict.fromkeys(("num_log_iter", "num_eval_iter", "num_save_iter"), 1000)
    special = of_base(SPECIAL, name) or {}
    algorithm = build_short(algorithm=name, device="cuda", precision=precision, num_train_iter=8, **never, **special)
    algorithm.warmup()
    batch, passed = algorithm.batches.batch, []

    def make(step):
        if step == 5:  # in the second epoch, past what is done once in it
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        if step == 7:  # the last one logs and saves
            torch.cuda.set_sync_debug_mode("default")
        passed.append(step)
        return batch(step)

    algorithm.batches.batch = make
    try:
        algorithm.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert passed[-3:] == [5, 6, 7]


@pytest.mark.parametrize("optim", ["SGD", "AdamW"])
@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
def test_the_loss_scaler_does_not_ask_for_its_flag(build_short, optim, clip_grad):
    algorithm = build_short(algorithm="fixmatch", device="cuda", precision="fp16", optim=optim, clip_grad=clip_grad)
    algorithm.call_hook("before_run")
    for step in range(4):
        algorithm.it = step
        with algorithm.in_step():
            algorithm.out_dict, algorithm.log_dict = algorithm.train_step(
                **algorithm.process_batch(**algorithm.batches.batch(step))
            )
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            algorithm.call_hook("after_train_step", "ParamUpdateHook")
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.timeout(300)  # compiles
@pytest.mark.parametrize("algorithm", ["fixmatch", "meanteacher", "muscle_fixmatch", "muscle_meanteacher"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_net_trains_as_one_that_is_not(short_run, tmp_path, algorithm, mode):
    for name in ("no", mode):
        short_run(algorithm=algorithm, device="cuda", compile=name, save_name=name)
    plain, compiled = (torch.load(tmp_path / n / "latest_model.pth", weights_only=True)["model"] for n in ("no", mode))
    for k, v in plain.items():
        torch.testing.assert_close(compiled[k], v, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("algorithm", ["fixmatch", "muscle_fixmatch", "muscle_meanteacher", "muscle_remixmatch"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_trains_in_every_precision(algorithm, precision, short_run):
    result = short_run(algorithm=algorithm, device="cuda", precision=precision, num_train_iter=12)
    assert result["complete"]
    assert 0 <= result["last_top1"] <= 1


def test_a_net_trained_on_the_gpu_predicts_the_same_on_the_cpu(short_run, tmp_path):
    from muscle_plugin.inference.predict import Predictor

    short_run(algorithm="muscle_fixmatch", device="cuda", save_name="r")
    images = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
    there, here = (Predictor(tmp_path / "r" / "latest_model.pth", d).probabilities(images) for d in ("cuda", "cpu"))
    assert torch.allclose(there, here, atol=1e-3)


@pytest.mark.parametrize("algorithm", ["fixmatch", "comatch", "softmatch", "muscle_remixmatch", "labelprop"])
@pytest.mark.parametrize(("there", "here"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_goes_on_on_another_device(short_run, monkeypatch, algorithm, there, here):
    from muscle_plugin.errors import Interrupted
    from muscle_plugin.training.host import Host

    settings = {"algorithm": algorithm, "save_name": "r"}
    settings |= {"lp_start": 0.5, "lp_k": 5} if algorithm == "labelprop" else {}
    save = Host._save_if_due
    with monkeypatch.context() as patch:
        patch.setattr(Host, "_save_if_due", lambda self: (self.it == 4 and self.request_stop(), save(self)))
        with pytest.raises(Interrupted):
            short_run(**settings, device=there)
    assert short_run(**settings, device=here, resume="yes")["complete"]


@pytest.mark.parametrize(
    ("net", "img_size"), [("small_cnn", 16), ("cnn13", 16), ("wrn_28_2", 32), ("timm:vit_tiny_patch16_224", 32)]
)
@pytest.mark.parametrize("algorithm", ["fixmatch", "muscle_fixmatch"])
def test_a_seed_fixes_the_weights(short_run, tmp_path, algorithm, net, img_size):
    for name in ("a", "b"):
        result = short_run(algorithm=algorithm, device="cuda", save_name=name, net=net, img_size=img_size, seed=1)
        assert not any("deterministic" in w for w in result["warnings"])
    a, b = (torch.load(tmp_path / n / "latest_model.pth", weights_only=True)["model"] for n in ("a", "b"))
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_a_gpu_run_learns(short_run):
    result = short_run(
        algorithm="muscle_fixmatch", device="cuda", num_labels=40, num_train_iter=300, num_eval_iter=100,
        total_batch=64, weak_augment="digits_weak", hard_augment="digits_hard",
    )  # fmt: skip
    assert result["last_top1"] > 0.75


@pytest.mark.parametrize("classes", [3, 12])
@pytest.mark.parametrize(
    ("method", "mass"), [("diffusion", "none"), ("diffusion", "uniform"), ("poisson_mbo", "uniform")]
)
def test_label_propagation_is_that_of_the_cpu(classes, method, mass):
    from muscle_plugin.propagation import propagate

    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, 32, generator=generator)
    truth = torch.arange(3000) % classes
    features = centres[truth] + 0.8 * torch.randn(3000, 32, generator=generator)
    labels = torch.where(torch.arange(3000) < 4 * classes, truth, -1)
    settings = {"k": 20, "method": method, "class_mass": mass}
    here, there = (propagate(features.to(d), labels.to(d), classes, **settings) for d in (CPU, CUDA))
    assert (here.labels == there.labels.cpu()).double().mean() > 0.999
    assert (here.weights - there.weights.cpu()).abs().max() < 1e-3
