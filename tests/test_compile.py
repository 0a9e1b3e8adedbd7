"""``--compile`` on a CPU: the same training within rounding, the same checkpoints, one line where it cannot be had."""

import copy
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import CONFIGS, ROOT

from muscle_plugin.errors import ConfigError, InputError
from muscle_plugin.files import load_tensors
from muscle_plugin.training.nets import CompiledForward

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("algorithm", ["fixmatch", "meanteacher", "muscle_fixmatch"])
def test_a_compiled_net_trains_as_one_that_is_not(short_run, tmp_path, algorithm):
    from muscle_plugin.inference.predict import Predictor

    for name in ("no", "default"):
        short_run(algorithm=algorithm, compile=name, save_name=name)
    plain, compiled = (load_tensors(tmp_path / n / "latest_model.pth") for n in ("no", "default"))
    for net in ("model", "ema_model"):
        assert plain[net].keys() == compiled[net].keys()
        for k, v in plain[net].items():
            torch.testing.assert_close(compiled[net][k], v, rtol=1e-4, atol=1e-5)
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    both = [Predictor(tmp_path / n / "latest_model.pth", "cpu").probabilities(images) for n in ("no", "default")]
    torch.testing.assert_close(*both, rtol=1e-3, atol=1e-4)


class Net(torch.nn.Module):
    """A net in the manner of USB's."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)

    def forward(self, x, only_fc=False, only_feat=False):
        feat = x if only_fc else self.body(x).relu()
        return feat if only_feat else {"logits": self.fc(feat), "feat": feat}


def test_what_is_around_the_compiled_forward_stays(monkeypatch):
    compiled = []

    def stand_in(function, mode):
        def call(*args, **kwargs):
            compiled.append((function.__self__, mode))
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", stand_in)
    net, x = Net(), torch.randn(5, 3)
    names, expected = list(net.state_dict()), net(x)["logits"]
    net.forward = CompiledForward(net, "default")
    assert torch.equal(net(x)["logits"], expected)
    assert compiled == [(net, "default")]
    assert list(net.state_dict()) == names
    assert torch.equal(net(net(x, only_feat=True), only_fc=True)["logits"], expected)
    handle = net.register_forward_pre_hook(lambda _, args: (args[0] * 0,))
    assert torch.equal(net(x)["logits"][0], net(x)["logits"][1])
    handle.remove()
    compiled.clear()
    net.eval()(x)
    assert not compiled  # as written
    other = copy.deepcopy(net).train()
    with torch.no_grad():
        other.fc.weight.zero_()
    other(x)
    assert compiled == [(other, "default")]
    assert isinstance(vars(other)["forward"], CompiledForward)
    assert torch.equal(net(x)["logits"], expected)


def test_a_net_that_cannot_be_compiled_is_one_line(monkeypatch):
    def stand_in(function, mode):
        def call(*_, **__):
            raise torch._dynamo.exc.TorchDynamoException("no\nsuch\nthing")

        return call

    import torch._dynamo

    monkeypatch.setattr(torch, "compile", stand_in)
    net = Net()
    net.forward = CompiledForward(net, "default")
    with pytest.raises(InputError, match=r"^compile: Net .*\bno\b.*--compile no$") as caught:
        net(torch.zeros(1, 3))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_without_a_compiler_it_is_one_line(tmp_path):
    """A process of its own, since PyTorch remembers which compiler it found."""
    words = [
        "--c", str(CONFIGS / "fixmatch_digits_10.yaml"), "--compile", "default", "--save_dir", str(tmp_path),
        "--device", "cpu", "--img_size", "16", "--num_train_iter", "2", "--epoch", "1",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC")}
    environment |= {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert re.match(r"error: compile: .*g\+\+.*--compile no", line)
    assert "Traceback" not in done.stderr
    assert done.returncode


@needs_compiler
@pytest.mark.slow
def test_one_image_for_batch_norm_is_not_blamed_on_the_compiler(short_run):
    with pytest.raises(ConfigError, match="^net: .*two or more images"):
        short_run(algorithm="supervised", compile="default", total_batch=2)
