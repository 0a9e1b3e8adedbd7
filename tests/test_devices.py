"""Devices, as far as a CPU shows: which of them can be named, what a run may go on with, memory that runs out, deterministic
algorithms."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SHORT
from plugin_fixture import plugins_forgotten  # noqa: F401

from muscle_plugin import cli
from muscle_plugin.host.device import DeviceError, choose_device

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
GPU_IS_FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.69 GiB of which 1.20 GiB is free. If"
    " reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
)


def train(folder, *more, **settings):
    """The exit status of ``train.py``, called in this process."""
    words = [str(w) for k, v in {**SHORT, "save_dir": folder, **settings}.items() for w in (f"--{k}", v)]
    return cli.train_command([*words, *more], "train.py")


def one_error(capsys):
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


# --------------------------------------------------------------------------------------------------------------- names


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
    why = "only CPUs and CUDA GPUs can be used (USB's algorithms call CUDA by name): give auto, cpu, cuda or cuda:N"
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: ") and f"--device: {why}" in line and f"got {name!r}" in line for line in lines)


@pytest.mark.parametrize("name", ["mps", "cuda:x", "cuda:-1"])
def test_a_library_call_refuses_it_too_and_takes_no_gpu_instead(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match=f"device: only CPUs and CUDA GPUs can be used.*got '{name}'"):
        choose_device(name)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
