"""The Triton kernel for views: equal to PyTorch's operations under Triton's interpreter, and compiled for GPUs without one."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

triton = pytest.importorskip("triton", reason="Triton is not installed")

from kernel_worker import SIZES  # noqa: E402
from test_augment import VALUES  # noqa: E402
from test_data import batches  # noqa: E402

from muscle_plugin.data import kernel  # noqa: E402
from muscle_plugin.data.augment import AUGMENTATIONS  # noqa: E402
from muscle_plugin.data.batch_random import BatchRandom  # noqa: E402
from muscle_plugin.data.operations import OPERATIONS  # noqa: E402

BATCHES = [f"batches {where}" for where in ("device", "host", "device channels last", "host channels last")]
BATCHES += ["batches of a process", "batches rotated", "batches rotated weakly"]


@pytest.fixture(scope="module")
def interpreted():
    """case -> whether it was equal, of tests/kernel_worker.py."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    command = [sys.executable, ROOT / "tests" / "kernel_worker.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "what", [*VALUES, *(f"drawn {n}" for n in ("crop", "crop_flip", "randaugment", "randaugment_usb"))]
)
def test_views_are_those_of_pytorch_to_the_bit(interpreted, what, channels, size):
    assert interpreted[f"{what} {channels} {size[0]}x{size[1]}"]


SAYS = [
    "it says that it works",
    "it says that it works for grey images",
    "it notices wrong views",
    "hue is left to PyTorch",
]


@pytest.mark.slow
@pytest.mark.parametrize("what", [*BATCHES, *SAYS])
def test_batches_are_those_without_it(interpreted, what):
    assert interpreted[what]


@pytest.mark.parametrize(
    ("shape", "fits"), {(3, 32, 32): True, (1, 84, 84): True, (4, 8, 8): False, (3, 96, 96): False}.items()
)
def test_what_fits(shape, fits):
    assert kernel.fits(shape) == fits


@pytest.mark.parametrize(("weak", "wanted"), [("crop_flip", True), ("crop_flip", False), ("digits_weak", True)])
def test_where_triton_finds_no_gpu_views_are_made_by_pytorch_and_the_user_told(monkeypatch, weak, wanted):
    plain = batches(weak=weak)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which is too late for a kernel that has been loaded: it wants a GPU
    monkeypatch.setenv("MUSCLE_VIEW_KERNEL", str(int(wanted)))
    made = batches(weak=weak)
    assert made._kernel is None
    missed = wanted and weak == "crop_flip"  # no view of digits is for the kernel
    assert ["without Triton" in note for note in made.notes] == [True] * missed
    there, here = made.batch(3), plain.batch(3)
    assert all(torch.equal(there[k], here[k]) for k in here)


@pytest.mark.parametrize("name", ["randaugment", "randaugment_usb"])
def test_it_has_all_operations_that_randaugment_draws(name):
    plan = AUGMENTATIONS[name].draw(BatchRandom.of(torch.Generator().manual_seed(0), 5000), (3, 8, 8))
    assert len(plan.operations.unique()) == 14
    assert kernel.takes(plan)
    plan.operations[0, 7] = OPERATIONS.index("hue")
    assert not kernel.takes(plan)


@pytest.mark.parametrize(
    ("capability", "channels", "side"), [(75, 3, 32), (80, 3, 32), (90, 3, 32), (90, 1, 32), (90, 3, 84)]
)
def test_it_compiles_for_a_gpu_and_rounds_as_pytorch_does(capability, channels, side):
    """No GPU is needed. A fused multiply-add or an approximate division would round otherwise."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants, options = kernel.constants_of((channels, side, side), 3, 2, (4, 4), 128, (125, 123, 114))
    pointers = {"pool": "*u8", "plan": "*i32", "out": "*fp32", "scale": "*fp32", "shift": "*fp32"}
    numbers = {"stride_channel": "i32", "stride_pixel": "i32"}
    signature = {**pointers, **numbers, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel._views, signature=signature, constexprs=constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
    assert "st.global" in ptx
    assert re.findall(r"\b(fma\.\w+\.f\w+|div\.full\S*|div\.approx\S*|rcp\.\S+|ld\.global\.nc)", ptx) == []
