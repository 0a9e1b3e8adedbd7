"""Devices, as far as a CPU shows: which of them can be named, what a run may go on with, memory that runs out, deterministic
algorithms."""

import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, SHORT
from plugin_fixture import plugins_forgotten  # noqa: F401

from muscle_plugin import cli, device
from muscle_plugin.device import choose_device, deterministic_kernels, fix_workspaces
from muscle_plugin.errors import DeviceError, InputError, RunError, WriteError
from muscle_plugin.files import load_tensors, read_whole, save_tensors
from muscle_plugin.runs.train import saying_how_to_resume
from muscle_plugin.settings.resolve import load_settings
from muscle_plugin.settings.schema import MACHINE, PLACE, RunSettings, affecting
from muscle_plugin.settings.sources import Layer
from muscle_plugin.text import out_of_memory
from muscle_plugin.training import state
from muscle_plugin.training.host import Host

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
GPU_IS_FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.69 GiB of which 1.20 GiB is free. If"
    " reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
)


def train(folder, *more, **settings):
    """The exit status of ``train.py``, called in this process."""
    words = [str(w) for k, v in {**SHORT, "save_dir": folder, **settings}.items() for w in (f"--{k}", v)]
    return cli.run_command("train", [*words, *more], "train.py")


def one_error(capsys):
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mps", "xpu", "gpu", "CUDA", "cuda:x", "cuda:-1", "cuda:", "cuda:1.5", ""])
def test_another_device_is_one_line_before_torch_is_loaded(name, tmp_path):
    commands = [
        ["train", "muscle_digits_10"],
        ["sweep", "muscle_digits_10", "--save_dir", str(tmp_path)],
        ["predict", "--checkpoint", "a", "--images", "b", "--out", str(tmp_path / "c")],
    ]
    script = (
        "import sys, json; from muscle_plugin import cli\n"
        f"codes = [cli.main([*words, '--device', {name!r}]) for words in json.loads(sys.argv[1])]\n"
        "assert codes == [2, 2, 2], codes\nassert not {'torch', 'semilearn'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = f"error: .*--device: .*auto, cpu, cuda or cuda:N.*{re.escape(repr(name))}"
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert all(re.match(said, line) for line in lines)


@pytest.mark.parametrize("name", ["mps", "cuda:x", "cuda:-1"])
def test_a_library_call_refuses_it_too_and_takes_no_gpu_instead(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match=f"^device: .*auto, cpu, cuda or cuda:N.*'{name}'"):
        choose_device(name)
    assert choose_device("cuda:1") == torch.device("cuda", 1)


def test_a_gpu_that_is_not_there_changes_no_run(short_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    short_run(save_name="r", algorithm="fixmatch", net="small_cnn")
    before = {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()}
    capsys.readouterr()
    for name, *more in (("r", "--resume"), ("new",)):
        assert train(tmp_path, *more, save_name=name, device="cuda", algorithm="fixmatch", net="small_cnn") == 2
        assert re.search(r"\bdevice: cuda .*\b0\b", one_error(capsys))
    assert {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()} == before
    assert not (tmp_path / "new").exists()


# -------------------------------------------------------------------------------------------------------------- resume


def stopped(short_run, monkeypatch, **settings):
    """Train to step 3 of a run, which goes on with ``resume``."""
    from muscle_plugin.errors import Interrupted

    save = Host._save_if_due
    with monkeypatch.context() as patch:
        patch.setattr(Host, "_save_if_due", lambda self: (self.it == 3 and self.request_stop(), save(self)))
        with pytest.raises(Interrupted):
            short_run(save_name="r", **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("there", "here", "note"),
    [
        ({"device": "cpu"}, {"device": "auto"}, None),
        ({"num_threads": 2}, {"num_threads": 1}, r"threads 1\b.*\b2\b"),
        ({}, {"deterministic": False}, "deterministic False.*True"),
        ({"compile": "default"}, {"compile": "no"}, "compile no .*default"),
    ],
)
def test_settings_of_the_machine_may_change_on_resume(short_run, tmp_path, monkeypatch, capsys, there, here, note):
    stopped(short_run, monkeypatch, **there)
    assert train(tmp_path, "--resume", save_name="r", **here) == 0
    out = capsys.readouterr().out
    assert json.loads((tmp_path / "r" / "result.json").read_text())["steps"] == 6
    if note is None:
        assert torch.cuda.is_available() or "bit-identical" not in out
    else:
        assert re.search(f"note: .*{note}.*bit-identical", out)


def test_a_run_directory_and_its_checkpoint_agree_on_what_may_change(short_run, tmp_path):
    """Refused on resume by ``config.yaml`` or by the checkpoint is whatever changes results, and nothing else."""
    short_run(save_name="r")
    kept = load_tensors(tmp_path / "r" / "latest_model.pth")["settings"].keys()
    moves = affecting(MACHINE, PLACE)
    assert not kept & moves
    spelled_otherwise = {"amp"}  # precision
    assert RunSettings.model_fields.keys() - moves - spelled_otherwise <= kept
    machine = {"device", "gpu", "num_threads", "compile", "deterministic", "num_workers", "data_on", "dist_timeout"}
    assert machine <= moves
    assert not {"precision", "sync_bn", "seed", "lr", "epoch"} & moves


def test_the_precision_that_auto_was_does_not_change_on_resume(short_run, monkeypatch):
    from muscle_plugin.training import host

    with monkeypatch.context() as patch:
        patch.setattr(host, "choose_precision", lambda *_: "bf16")  # as on a GPU that has it
        stopped(short_run, monkeypatch, algorithm="fixmatch", precision="auto", device="cpu")
    with pytest.raises(InputError, match=r"latest_model\.pth: .*: precision 'bf16'.*'fp32'$"):
        short_run(algorithm="fixmatch", save_name="r", precision="auto", device="cpu", resume="yes")


def test_a_sweep_takes_runs_of_another_device_for_its_own(tmp_path):
    from muscle_plugin.studies.jobs import jobs_of
    from muscle_plugin.studies.pool import execute

    def job(**settings):
        given = {**SHORT, "save_dir": str(tmp_path), "img_size": None, **settings}
        (found,) = jobs_of(["supervised_digits_10"], 1, Layer("command line", given))
        return found

    begun = job(device="cpu")
    assert execute(begun.config, begun.overrides, [])[0] == "finished"
    others = [
        {"device": "auto"},
        {"device": "cuda"},
        {"num_threads": 2},
        {"compile": "default"},
        {"deterministic": False},
    ]
    assert [job(**x).state for x in others] == ["finished"] * len(others)
    assert [job(**x).state for x in ({"lr": 0.5}, {"precision": "bf16"})] == ["of other settings"] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm", ["comatch", "freematch", "softmatch", "labelprop", "muscle_flexmatch", "remixmatch"]
)
def test_what_a_run_on_a_cpu_remembers_goes_to_another_device(build_short, algorithm):
    """The device ``meta`` stands for a GPU: tensors that come into being while training follow the run; those that the class
    has made when it is built are brought where the class has them now."""
    settings = {"algorithm": algorithm, "device": "cpu"}
    settings |= {"lp_start": 0.5, "lp_k": 5} if algorithm == "labelprop" else {}
    trained, fresh = build_short(**settings, save_name="a"), build_short(**settings, save_name="b")
    trained.train()
    built = state.capture(fresh)
    captured = state.capture(trained)
    state.restore(fresh, captured, torch.device("meta"))
    seen = {"cpu": 0, "meta": 0}
    for owner, before, after in (
        (fresh, built["algorithm"], captured["algorithm"]),
        *((h, built["hooks"][n], captured["hooks"][n]) for n, h in fresh.hooks_dict.items()),
    ):
        for name, value in after.items():
            if isinstance(value, torch.Tensor):
                where = "cpu" if isinstance(before.get(name), torch.Tensor) else "meta"
                assert getattr(owner, name).device.type == where, name
                seen[where] += 1
    assert seen["meta"] or algorithm not in ("softmatch", "labelprop", "remixmatch")
    assert sum(seen.values())


def test_a_restored_tensor_is_where_the_class_keeps_it():
    owner = Namespace(here=torch.zeros(2), there=torch.zeros(2, device="meta"), absent=None, several=[torch.zeros(1)])
    saved = state.capture_object(
        Namespace(**{k: torch.ones(2) for k in ("here", "there", "absent")}, several=[torch.ones(1)])
    )
    state.restore_object(owner, saved, torch.device("meta"))
    kept = (owner.here, owner.there, owner.absent, *owner.several)
    assert [x.device.type for x in kept] == ["cpu", "meta", "meta", "meta"]
    state.restore_object(owner, saved, None)
    assert all(x.device.type == "cpu" for x in (owner.here, owner.there, owner.absent, *owner.several))


def test_a_run_on_a_cpu_asks_nothing_of_a_gpu(short_run, monkeypatch):
    """A checkpoint would else begin a context on the GPU, of hundreds of megabytes, and fail where it is full."""

    def refuse(*_, **__):
        raise torch.cuda.OutOfMemoryError(GPU_IS_FULL)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", refuse)
    monkeypatch.setattr(torch.cuda, "set_rng_state", refuse)
    settings = {"algorithm": "muscle", "device": "cpu", "save_name": "r"}
    assert short_run(**settings)["complete"]
    assert short_run(**settings, resume="yes")["complete"]


@pytest.mark.slow
@pytest.mark.parametrize("again", ["as printed", "as printed, of a file", "as at first", "as at first, auto"])
def test_a_run_from_a_checkpoint_of_another_is_interrupted_twice_and_neither_rewinds_nor_drops_lines(
    short_run, tmp_path, monkeypatch, capsys, again
):
    """Each time the printed command is followed, or the first one is given again, as a scheduler does."""
    sizes = {"num_train_iter": 12, "num_save_iter": 3, "num_log_iter": 1, "keep_checkpoints": 4}
    short_run(save_name="whole", **sizes)
    start = tmp_path / "whole" / "previous_model_3.pth"
    assert load_tensors(start)["it"] == 3
    (tmp_path / "c.yaml").write_text(f"load_path: {start}\n")
    named = ["--c", str(tmp_path / "c.yaml")] if again.endswith("file") else ["--load_path", str(start)]
    named += ["--resume", "auto"] if again.endswith("auto") else ["--resume"]
    save = Host._save_if_due
    stops = iter((5, 8))

    def stop(self):
        if self.it == at:
            self.request_stop()
        save(self)

    monkeypatch.setattr(Host, "_save_if_due", stop)
    at = next(stops)
    assert train(tmp_path, *named, save_name="r", **sizes) == 130
    for at in (*stops, None):
        program, script, *words = shlex.split(capsys.readouterr().err.partition("to resume: ")[2])
        assert (program, script) == ("python", "train.py")
        if again.startswith("as printed"):
            assert cli.run_command("train", words, "train.py") == (130 if at else 0)
        else:
            assert train(tmp_path, *named, save_name="r", **sizes) == (130 if at else 0)
    whole, cut = (
        [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("whole", "r")
    )
    assert [row | {"seconds": 0} for row in cut] == [row | {"seconds": 0} for row in whole if row["step"] > 3]
    whole, cut = (load_tensors(tmp_path / n / "latest_model.pth") for n in ("whole", "r"))
    assert all(torch.equal(t, cut["model"][k]) for k, t in whole["model"].items())


@pytest.mark.parametrize("written", [False, True])
def test_the_command_to_resume_names_another_checkpoint_until_the_run_has_written_one(tmp_path, written):
    """Also in a directory that has checkpoints of an earlier attempt."""
    run_dir = tmp_path / "r"
    save_tensors(run_dir / "latest_model.pth", {"it": 40})
    resolved = replace(load_settings(None, load_path="x.pth"), sources={"load_path": "command line"})
    with (
        pytest.raises(RunError, match="^log: .*No space left") as caught,
        saying_how_to_resume(run_dir, resolved, ["train.py", "--load_path", "x.pth"]),
    ):
        if written:
            save_tensors(run_dir / "latest_model.pth", {"it": 12})
        raise WriteError(28, "No space left", "log")
    assert ("--load_path x.pth" in str(caught.value)) == (not written)


# -------------------------------------------------------------------------------------------------------------- memory


#: A net that finds no memory when the environment says so.
HUNGRY = f"""
import os, torch
from torch import nn
from muscle_plugin.extend import net

class Hungry(nn.Conv2d):
    steps = 0
    def forward(self, x):
        when, _, step = os.environ.get("HUNGRY", "").partition(" ")
        self.steps += self.training
        if {{"layout": not self.weight.is_contiguous(), "training": self.training and self.steps > int(step or 0),
            "evaluation": not self.training and len(x) > 2}}.get(when):
            raise torch.cuda.OutOfMemoryError({GPU_IS_FULL!r})
        return super().forward(x)

@net("hungry")
def hungry(num_classes, channels):
    layers = nn.Conv2d(channels, 8, 3), nn.ReLU(), Hungry(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8, num_classes))
"""


@pytest.fixture
def hungry(tmp_path, plugins_forgotten):  # noqa: F811
    (tmp_path / "hungry.py").write_text(HUNGRY)
    return {"plugins": tmp_path / "hungry.py", "net": "hungry", "algorithm": "fixmatch", "save_name": "r"}


def test_a_gpu_without_room_for_the_net_is_one_line(hungry, tmp_path, monkeypatch, capsys):
    """Not taken for a net that cannot compute channels last, nor for one that cannot take the images."""
    monkeypatch.setenv("HUNGRY", "layout")
    assert train(tmp_path, **hungry) == 2
    line = one_error(capsys)
    assert re.match(r"error: out of memory .*nets \(CUDA out of memory\. Tried to allocate 2\.00 GiB\.", line)
    assert re.search(r"\): .*--data_on host.*--net .*--img_size", line)
    assert json.loads((tmp_path / "r" / "failure.json").read_text())["error"].startswith("DeviceError: out of memory")


def test_memory_that_runs_out_in_training_leaves_the_last_checkpoint_to_go_on_from(
    hungry, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HUNGRY", "training 5")
    assert train(tmp_path, num_save_iter=2, **hungry) == 2
    line = one_error(capsys)
    assert re.match(r"error: out of memory .*step \(CUDA out of memory\. Tried to allocate 2\.00 GiB\.", line)
    assert re.search(r"--total_batch .*\b16\b.* --net\b.* --precision bf16 .*--data_on host .*; ", line)
    assert re.search(r" python train\.py .* --resume .*--device, --data_on .*--eval_batch_size", line)
    failure = json.loads((tmp_path / "r" / "failure.json").read_text())
    assert failure["after_step"] == 5
    assert "OutOfMemoryError" in failure["traceback"]
    read_whole(tmp_path / "r" / "latest_model.pth")
    assert load_tensors(tmp_path / "r" / "latest_model.pth")["it"] == 4
    monkeypatch.delenv("HUNGRY")
    assert train(tmp_path, "--resume", num_save_iter=2, data_on="host", num_workers=0, **hungry) == 0
    assert not (tmp_path / "r" / "failure.json").exists()


def test_memory_that_runs_out_in_an_evaluation_names_its_batch(hungry, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HUNGRY", "evaluation")
    assert train(tmp_path, **hungry) == 2
    line = one_error(capsys)
    assert re.match(r"error: out of memory .*evaluation \(CUDA out of memory\.", line)
    assert re.search(r"--eval_batch_size .*\b256\b.*no checkpoint", line)


#: What a plugin can do to leave a process no more memory than it has, and 200 MB.
LIMITED = """
import resource
from torch import nn
from muscle_plugin.extend import net

@net("limited")
def limited(num_classes, channels):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20,) * 2)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 64 * 64, num_classes))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_machine_whose_memory_runs_out_says_so(tmp_path):
    """PyTorch's own refusal, of the first batch: 2^18 images of 64 x 64."""
    (tmp_path / "limited.py").write_text(LIMITED)
    settings = {**SHORT, "save_dir": tmp_path, "save_name": "r", "plugins": tmp_path / "limited.py", "net": "limited",
                "algorithm": "supervised", "img_size": 64, "total_batch": 2**18, "device": "cpu"}  # fmt: skip
    words = [str(w) for k, v in settings.items() for w in (f"--{k}", v)]
    done = subprocess.run(
        [sys.executable, "train.py", *words], capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert re.match(r"error: out of memory .*step \(.*--total_batch .*\b262144\b", line)


def full(*_, **__):
    raise torch.cuda.OutOfMemoryError(GPU_IS_FULL)


def test_a_checkpoint_for_which_there_is_no_memory_is_not_called_damaged(short_run, tmp_path, monkeypatch):
    short_run(save_name="r")
    files = {p.name: p.read_bytes() for p in (tmp_path / "r").glob("*.pth")}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", full)
        with pytest.raises(InputError, match=r"latest_model\.pth: (?!.*damaged).*CUDA out of memory\. Tried"):
            short_run(save_name="r", resume="yes")
    with monkeypatch.context() as patch:
        patch.setattr(state, "restore", full)
        with pytest.raises(DeviceError, match=r"^out of memory .*nets .CUDA out of memory\. Tried"):
            short_run(save_name="r", resume="yes")
    assert {p.name: p.read_bytes() for p in (tmp_path / "r").glob("*.pth*")} == files
    assert short_run(save_name="r", resume="yes")["complete"]


def test_an_exchange_and_a_compiler_without_memory_do_not_blame_others(monkeypatch):
    from muscle_plugin import distributed
    from muscle_plugin.training import nets

    with pytest.raises(torch.cuda.OutOfMemoryError), distributed._exchange():
        full()
    with pytest.raises(distributed.ExchangeError), distributed._exchange():
        raise RuntimeError("Connection closed by peer")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        nets.check_compiler("default", CPU)
    net = torch.nn.Linear(2, 2)
    net.forward = nets.CompiledForward(net, "default")

    def failing(*_):  # Inductor wraps what its compiler meets
        raise torch._dynamo.exc.TorchDynamoException(f"backend='inductor' raised:\nOutOfMemoryError: {GPU_IS_FULL}")

    net.forward.compiled = failing
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        net(torch.zeros(1, 2))


def test_predict_and_dry_run_say_that_memory_ran_out(hungry, short_run, tmp_path, monkeypatch, capsys):
    from PIL import Image

    short_run(**{k: str(v) for k, v in hungry.items()})
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("L", (16, 16), 80 * i).save(tmp_path / "images" / f"{i}.png")
    monkeypatch.setenv("HUNGRY", "evaluation")
    words = ["--checkpoint", tmp_path / "r", "--images", tmp_path / "images", "--out", tmp_path / "o.csv"]
    capsys.readouterr()
    assert cli.main(["predict", *map(str, words), "--plugins", str(hungry["plugins"])]) == 2
    assert one_error(capsys).startswith("error: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert not (tmp_path / "o.csv").exists()
    monkeypatch.setenv("HUNGRY", "training 1")
    more = [
        "--plugins",
        str(hungry["plugins"]),
        "--net",
        "hungry",
        "--save_dir",
        str(tmp_path / "runs"),
        "--seeds",
        "1",
    ]
    assert cli.main(["sweep", "fixmatch_digits_10", *more, "--dry-run"]) == 2
    assert re.search("out of memory .*step", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (MemoryError(), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("view size is not compatible with input tensor's size and stride"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_ran_out(error, memory):
    assert out_of_memory(error) == memory


# -------------------------------------------------------------------------------------------------------------- layout


#: A net that cannot compute channels last: images of three channels, or its feature maps, are flattened by ``view``.
FLAT = """
from torch import nn
from muscle_plugin.extend import net

class View(nn.Module):
    def forward(self, x):
        return x.view(len(x), -1)

@net("flat_maps")
def flat_maps(num_classes, channels, img_size):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), View(), nn.Linear(4 * (img_size - 2) ** 2, num_classes))

@net("flat_images")
def flat_images(num_classes, channels, img_size):
    return nn.Sequential(View(), nn.Linear(channels * img_size**2, num_classes))
"""


@pytest.mark.parametrize("net", ["flat_maps", "flat_images", "small_cnn"])
def test_a_net_that_cannot_compute_channels_last_trains_and_is_told_of(net, tmp_path, plugins_forgotten):  # noqa: F811
    from muscle_plugin.data.source import Source
    from muscle_plugin.runs.build import build

    (tmp_path / "flat.py").write_text(FLAT)
    settings = {
        **SHORT,
        "dataset": "cifar10",
        "save_dir": str(tmp_path),
        "plugins": str(tmp_path / "flat.py"),
        "net": net,
    }
    resolved = load_settings(None, **settings)
    classes = tuple(map(str, range(10)))
    images = torch.randint(256, (170, 3, resolved.settings.img_size, resolved.settings.img_size), dtype=torch.uint8)
    source = Source(images, torch.arange(170) % 10, torch.arange(160), torch.arange(160, 170), classes)
    algorithm = build(resolved, source=source)
    notes = [n for n in algorithm.notes if "channels last" in n]
    assert bool(notes) == (net != "small_cnn")
    assert all(re.match(rf"net {net} .*\(view size is not compatible", n) for n in notes)
    algorithm.train()
    assert algorithm.it == 6


# --------------------------------------------------------------------------------------------------------- determinism


def flags():
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    return (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory, cudnn.deterministic, cudnn.benchmark,
        cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled(),
    )  # fmt: skip


def unpooled():
    """An operation that PyTorch computes deterministically on no device, a CPU among them."""
    out, at = torch.nn.functional.max_pool2d(torch.rand(1, 1, 4, 4), 2, return_indices=True)
    return torch.nn.functional.max_unpool2d(out, at, 2)


def test_deterministic_algorithms_are_on_within_and_as_they_were_afterwards():
    before, told = flags(), []
    for asked in (True, False):
        with pytest.raises(KeyError), deterministic_kernels(CUDA, asked, told.append):
            inside = flags()
            raise KeyError
        assert flags() == before
        if asked:
            assert inside == (True, True, False, True, False, False, False, True, False)
        else:
            assert inside == (*before[:3], False, True, *before[5:])
    with deterministic_kernels(CPU, True, told.append):
        assert flags() == before
        unpooled()
    assert told == []


def test_a_user_who_wants_errors_keeps_them():
    torch.use_deterministic_algorithms(True)
    try:
        with deterministic_kernels(CUDA, True, print), pytest.raises(RuntimeError, match="max_unpooling2d_forward_out"):
            unpooled()
        assert flags()[:2] == (True, False)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("action", ["ignore", "error", "once"])
def test_an_operation_that_is_not_deterministic_is_heard_of_whatever_warnings_are_filtered(action):
    told, others = [], []
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        warnings.showwarning = lambda message, *_, **__: others.append(str(message))
        with deterministic_kernels(CUDA, True, told.append):
            unpooled()
            unpooled()
        if action == "once":
            warnings.warn("of something else", stacklevel=1)
    assert told == ["max_unpooling2d_forward_out"] * 2
    assert others == ["of something else"] * (action == "once")


def test_cublas_is_told_before_its_first_use_unless_the_user_has(monkeypatch):
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.delenv(name, raising=False)
    fix_workspaces(CPU, True)
    fix_workspaces(CUDA, False)
    assert name not in os.environ
    fix_workspaces(CUDA, True)
    assert os.environ[name] == ":4096:8"
    monkeypatch.setenv(name, ":16:8")
    fix_workspaces(CUDA, True)
    assert os.environ[name] == ":16:8"


#: A net with an operation that PyTorch computes deterministically on no device.
UNPOOLING = """
import torch.nn.functional as F
from torch import nn
from muscle_plugin.extend import net

class Unpool(nn.Module):
    def forward(self, x):
        out, at = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(out, at, 2)

@net("unpooling")
def unpooling(num_classes, channels):
    layers = nn.Conv2d(channels, 8, 3, padding=1), Unpool(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8, num_classes))
"""


@pytest.mark.parametrize("asked", [True, False])
def test_a_run_tells_its_user_once_of_an_operation_that_is_not_deterministic(
    asked, tmp_path, monkeypatch, capsys, plugins_forgotten  # noqa: F811
):  # fmt: skip
    """A run on this machine's CPU, within what surrounds one on a GPU."""
    from muscle_plugin.training import host

    monkeypatch.setattr(host, "deterministic_kernels", lambda _, *rest: device.deterministic_kernels(CUDA, *rest))
    (tmp_path / "unpooling.py").write_text(UNPOOLING)
    before = flags()
    settings = {"plugins": tmp_path / "unpooling.py", "net": "unpooling", "save_name": "r", "deterministic": asked}
    assert train(tmp_path, algorithm="fixmatch", device="cpu", **settings) == 0
    said = "max_unpooling2d_forward_out "
    found = json.loads((tmp_path / "r" / "result.json").read_text())["warnings"]
    assert [w.startswith(said) for w in found if "deterministic" in w] == [True] * asked
    assert capsys.readouterr().out.count(f"warning: {said}") == asked
    assert flags() == before


def test_a_run_leaves_the_process_as_it_was(short_run):
    threads, before = torch.get_num_threads(), flags()
    torch.set_num_threads(2)
    torch.backends.cudnn.benchmark = True
    try:
        inside = flags()
        short_run(save_name="r")
        assert (torch.get_num_threads(), flags()) == (2, inside)
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = before[4]
