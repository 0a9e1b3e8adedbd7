"""Training where packages that USB imports, and some that this package can do without, are not installed."""

import builtins
import json
import re
import subprocess
import sys
from unittest.mock import Mock

import pytest
from conftest import ROOT, SHORT
from PIL import Image

from muscle_plugin.usb.names import NOT_NEEDED, imported_when_used

#: Hides packages from a process as if they had never been installed: find_spec is None, import is ModuleNotFoundError.
HIDE = """
import json, sys
HIDDEN = set(json.loads(sys.argv[1]))
class Hiding:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Hiding, sys.meta_path)
settings = json.loads(sys.argv[2])
"""


def without(packages, code, **settings):
    """What ``code``, which puts it in ``out``, finds in a process without ``packages``."""
    command = [sys.executable, "-c", f"{HIDE}\n{code}\nprint('OUT', json.dumps(out))", json.dumps(list(packages))]
    made = subprocess.run([*command, json.dumps(settings)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr
    return json.loads(made.stdout.rpartition("OUT ")[2])


@pytest.mark.slow
def test_images_train_without_them(tmp_path):
    code = """
import importlib.util, io, contextlib
from muscle_plugin import cli
from muscle_plugin.settings.resolve import load_settings
from muscle_plugin.errors import InputError
from muscle_plugin.runs.train import train
def run(algorithm):
    return train(load_settings(None, **settings, algorithm=algorithm, save_name=algorithm), quiet=True)["complete"]
out = {a: run(a) for a in ("fixmatch", "muscle_fixmatch")}
try:
    run("contrastive")
except InputError as e:
    out["contrastive"] = str(e)
out["seen"] = [n for n in HIDDEN if importlib.util.find_spec(n) or n in sys.modules]
try:
    import wandb
except ModuleNotFoundError as e:
    out["wandb"] = e.name
import semilearn.core.hooks as hooks
try:
    hooks.wandb.wandb.init(name="run")
except ImportError as e:
    out["init"] = str(e)
"""
    hidden = (*NOT_NEEDED, "faiss", "pytorch_metric_learning", "scikit_posthocs")
    out = without(hidden, code, **{**SHORT, "save_dir": str(tmp_path)})
    assert re.match("contrastive .*pip install pytorch_metric_learning", out.pop("contrastive"))
    assert "pip install wandb" in out.pop("init")
    assert out == {"fixmatch": True, "muscle_fixmatch": True, "seen": [], "wandb": "wandb"}


NETS = {
    "small_cnn": {"net": "small_cnn"},
    "cnn13": {"net": "cnn13", "net_width": 0.1},
    "timm": {"net": "timm:test_vit", "img_size": 32},
    "torchvision": {"net": "mobilenet_v3_small", "net_from_name": True, "img_size": 32},
    "usb": {"net": "wrn_28_2"},
}


@pytest.mark.slow
def test_prediction_and_export_do_without_usb_but_for_its_own_nets(short_run, tmp_path):
    for name, settings in NETS.items():
        short_run(algorithm="supervised", save_name=name, num_train_iter=2, epoch=1, **settings)
    Image.new("RGB", (9, 9), (90, 10, 10)).save(tmp_path / "a.png")
    code = """
import contextlib, io
from muscle_plugin import Predictor, cli, export_model, load_exported
from muscle_plugin.inference.export import read_images
from pathlib import Path
out = {"lines": []}
image = settings["image"]
for run in map(Path, settings["runs"]):
    words = {
        "predict": ["--checkpoint", run, "--images", image, "--out", run / "p.csv", "--device", "cpu"],
        "export": ["--checkpoint", run, "--out", run / "exported", "--format", "safetensors"],
    }
    status = []
    for command, arguments in words.items():
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
            status.append(cli.main([command, *map(str, arguments)]))
        out["lines"] += said.getvalue().splitlines()
    if status == [0, 0]:
        exported, predictor = load_exported(run / "exported", "cpu"), Predictor(run / "latest_model.pth", "cpu")
        images = read_images(Path(image), predictor.img_size)
        status.append(bool((exported.logits(images) == predictor.logits(images)).all()))
    out[run.name] = status
"""
    out = without(["semilearn"], code, image=str(tmp_path / "a.png"), runs=[str(tmp_path / n) for n in NETS])
    lines = out.pop("lines")
    assert out == {n: [2, 2] if n == "usb" else [0, 0, True] for n in NETS}
    assert len(lines) == 2
    assert all(x.startswith("error: ") and "wrn_28_2" in x and "pip install semilearn" in x for x in lines)


def test_usb_is_imported_in_one_place():
    names = [
        p
        for p in (ROOT / "muscle_plugin").rglob("*.py")
        if re.search(r"^\s*(import|from) semilearn", p.read_text(), re.M)
    ]
    assert [p.relative_to(ROOT).as_posix() for p in names] == ["muscle_plugin/usb/names.py"]


@pytest.mark.slow
def test_inference_loads_no_more_than_it_needs():
    code = """
import muscle_plugin.inference.export, muscle_plugin.inference.predict
heavy = ("semilearn", "timm", "torchvision", "sklearn", "scipy", "faiss", "matplotlib", "pandas", "onnx")
own = ("training", "algorithms", "runs", "studies")
out = [n for n in (*heavy, *(f"muscle_plugin.{n}" for n in own)) if n in sys.modules]
"""
    assert without([], code) == []


@pytest.mark.slow
def test_labels_propagate_without_faiss():
    code = """
import torch
from muscle_plugin.propagation import propagate
truth = torch.arange(600) % 3
x = torch.eye(3)[truth] + 0.1 * torch.randn(600, 3, generator=torch.Generator().manual_seed(0))
y = torch.where(torch.arange(600) < 9, truth, -1)
made = [propagate(x, y, 3, k=10, neighbours=n) for n in ("exact", "approximate")]
out = [[m.stats.backend, bool((m.labels == truth).all())] for m in made]
"""
    assert without(["faiss"], code) == [["torch", True], ["torch", True]]


def test_a_logger_that_is_absent_is_refused_before_anything_is_written(monkeypatch, tmp_path, capsys):
    from muscle_plugin import cli

    monkeypatch.setattr("muscle_plugin.runs.train.find_spec", lambda name: None)
    settings = {**SHORT, "algorithm": "fixmatch", "save_dir": tmp_path / "runs", "use_wandb": True, "use_aim": True}
    argv = [word for k, v in settings.items() for word in (f"--{k}", str(v))]
    assert cli.run_command("train", argv, "train.py") == 2
    for line, name in zip(capsys.readouterr().err.splitlines(), ("wandb", "aim"), strict=True):
        assert re.match(f"error: --use_{name}: .*pip install {name}", line)
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that writes a package of one module and makes it importable."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, code):
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)

    yield write
    for name in ("asks", "broken", "other", "whole"):
        sys.modules.pop(name, None)


def test_what_the_importer_alone_imports_is_not_looked_for_until_it_is_used(package):
    package("asks", "import nowhere\nimport nowhere.inner\nfrom nowhere.inner import Base, Other")
    package("other", "import nowhere")
    real = builtins.__import__
    with imported_when_used("asks", ("nowhere",)):
        import asks

        with pytest.raises(ModuleNotFoundError, match="nowhere"):
            import other  # noqa: F401
    assert builtins.__import__ is real
    assert not [name for name in sys.modules if name.startswith("nowhere")]

    for use in (asks.Other, lambda *a, **k: asks.nowhere.call, lambda *a, **k: asks.Base.from_pretrained):
        with pytest.raises(ImportError, match="pip install nowhere"):
            use(1, two=2)


def test_what_is_installed_is_the_real_one_once_it_is_used(package):
    package("whole", "class Base:\n    kind = 'real'\n    @classmethod\n    def new(cls): return cls()\nnumber = 3")
    package(
        "asks", "import whole\nfrom whole import Base, number as taken\nfrom typing import Union\nX = Union[str, Base]"
    )
    with imported_when_used("asks", ("whole",)):
        import asks
    assert "whole" not in sys.modules
    assert asks.Base.kind == "real"
    whole = sys.modules["whole"]
    assert asks.whole.number == 3
    assert asks.whole.Base is whole.Base
    assert isinstance(asks.Base(), whole.Base)
    assert isinstance(asks.Base.new(), whole.Base)
    with pytest.raises(AttributeError, match="nothing"):
        asks.whole.nothing  # noqa: B018


def test_a_package_whose_library_cannot_be_loaded_is_said_when_it_is_used(package):
    package("broken", "raise OSError('undefined symbol: x')")
    package("asks", "import broken")
    with imported_when_used("asks", ("broken",)):
        import asks
    with pytest.raises(ImportError, match="broken .*undefined symbol: x"):
        asks.broken.call()


def test_what_is_imported_already_or_not_listed_is_left_alone(package):
    for imports, missing in (("json.nothing", "json.nothing"), ("elsewhere", "elsewhere")):
        package("asks", f"import {imports}")
        with imported_when_used("asks", ("nowhere",)), pytest.raises(ModuleNotFoundError) as e:
            import asks
        assert e.value.name == missing
    package("asks", "import json\nfrom json import loads")
    with imported_when_used("asks", ("json",)):
        import asks
    assert asks.json is json
    assert asks.loads is json.loads


@pytest.mark.parametrize("kind", [RuntimeError, ModuleNotFoundError])
def test_a_logger_that_refuses_is_one_line(kind, tmp_path, monkeypatch, capsys):
    from muscle_plugin import cli

    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "init", Mock(side_effect=kind("No API key configured.")))
    settings = {**SHORT, "algorithm": "fixmatch", "save_dir": tmp_path, "save_name": "r", "use_wandb": True}
    assert cli.run_command("train", [f"--{k}={v}" for k, v in settings.items()], "train.py") == 2
    assert capsys.readouterr().err == "error: --use_wandb: No API key configured.\n"


def test_a_net_of_a_plugin_needs_no_usb(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nfrom muscle_plugin.extend import net\n\n@net('mine')\n"
        "def mine(num_classes, channels, img_size):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * img_size**2, num_classes))\n"
    )
    code = """
from muscle_plugin.extend import load
from muscle_plugin.nets.build import net_builder
load(settings["file"])
out = net_builder("mine", False, 1, 8, {})(num_classes=3).num_features
"""
    assert without(["semilearn"], code, file=str(tmp_path / "mine.py")) == 64
