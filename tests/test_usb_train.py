"""USB's own train.py, patched as in patches/, trains this package's algorithms from its configurations, to the same result.

USB's program is not part of the release 0.3.2, but what it does is: the tests that need the program itself run where the
environment variable USB names a checkout of USB.
"""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHORT

from muscle_plugin.errors import ConfigError, DeviceError
from muscle_plugin.files import load_tensors
from muscle_plugin.losses import mutual_information
from muscle_plugin.settings.namespace import from_namespace, write_for_usb
from muscle_plugin.settings.resolve import load_settings
from muscle_plugin.settings.schema import MACHINE, PLACE, MuscleSettings, affecting
from muscle_plugin.settings.sources import config_names, find_config, read_yaml

PATCHES = ROOT / "patches"


def complete(args):
    """What the host does with the settings that USB gathered, before it has read the data."""
    resolved = from_namespace(args)
    write_for_usb(args, resolved.settings)
    return resolved


@cache
def given(config):
    """The settings that a file and those that it extends hold, as USB's train.py sees them with patch 0011."""
    merged = {}
    for layer in read_yaml(find_config(config)):
        merged |= layer.values
    return merged


@pytest.fixture(scope="module")
def usb_config():
    """USB's settings for a run: its parser's defaults, overwritten by what is given."""
    from semilearn.lighting import config

    import muscle_plugin.register  # noqa: F401

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "get_port", lambda: 12345)  # USB asks netstat
        yield config.get_config


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """The tree of USB with the whole series of patches: that of the variable USB_TREE, or the installed release."""
    tree = tmp_path_factory.mktemp("usb")
    usb = os.environ.get("USB_TREE")
    source = Path(usb) if usb else Path(next(iter(find_spec("semilearn").submodule_search_locations))).parent
    shutil.copytree(source / "semilearn", tree / "semilearn", ignore=shutil.ignore_patterns("__pycache__"))
    if usb:
        shutil.copy(source / "train.py", tree)
    series = "main" if (tree / "semilearn/algorithms/sequencematch").is_dir() else "0.3.2"
    lines = (PATCHES / f"series.{series}").read_text().splitlines()
    include = [f"--include={p}" for p in (["semilearn/*", "train.py"] if usb else ["semilearn/*"])]
    for line in lines:
        if line and not line.startswith("#"):
            subprocess.run(
                ["git", "apply", "--whitespace=nowarn", *include, str(PATCHES / line)],
                cwd=tree, check=True, env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)},
            )  # fmt: skip
    return tree


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that makes this package's entry point known, as its installation does."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "muscle_plugin_as_installed-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: muscle-plugin-as-installed\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[semilearn.plugins]\nmuscle = muscle_plugin.register\n")
    return folder


def python(arguments, cwd, *path):
    """Run Python without warnings, with these folders and this package on its path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))), "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def module(path):
    spec = spec_from_file_location(f"patched_{path.stem}", path)
    found = module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.slow
def test_every_configuration_means_the_same_to_usbs_parser(usb_config):
    names = config_names()
    assert len(names) > 300
    different = {}
    for name in names:
        here = load_settings(
            name, seed=1, save_dir="./saved_models"
        ).as_dict()  # USB's defaults, which are the user's affair
        args = usb_config(given(name))
        assert (args.num_train_iter or 0) % args.epoch == 0, f"{name}: USB's train.py asks for whole epochs"
        args.amp = args.use_amp if not hasattr(args, "amp") else args.amp
        there = from_namespace(args).as_dict()
        compared = here.keys() - affecting(MACHINE, PLACE)
        found = {k: (there[k], here[k]) for k in compared if there[k] != here[k]}
        if found:
            different[name] = found
    assert not different


def test_the_names_of_usbs_parser_are_known(usb_config):
    """What it gives at its defaults is neither refused nor worth a word."""
    for algorithm in ("muscle", "muscle_fixmatch", "labelprop"):
        args = usb_config({"algorithm": algorithm, "dataset": "cifar10", "epoch": 2})
        before = dict(vars(args))
        assert not complete(args).notices
        assert {k: v for k, v in before.items() if k != "amp" and v not in (getattr(args, k), None)} == {}


def test_a_misspelt_key_is_named_with_its_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"extends: {find_config('muscle_fixmatch_digits_10')}\nlrr: 0.1\nmomentum: 2\n")
    args = Namespace(c=str(file), nest=1)
    for layer in read_yaml(file):
        vars(args).update(layer.values)
    with pytest.raises(ConfigError) as caught:
        complete(args)
    expected = ["nest .*'net'", r"mine\.yaml: lrr .*'lr'", r"mine\.yaml: momentum: .*\b1, .*\b2$"]
    assert all(re.match(e, fault) for e, fault in zip(expected, caught.value.faults, strict=True))


def test_extends_means_the_same_to_the_patched_usb(patched):
    read_config = module(patched / "semilearn/core/utils/misc.py").read_config
    for name in config_names()[::5]:
        assert read_config(str(find_config(name))) == given(name)


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"batch_size": 8, "uratio": 1}, (8, 8)),
        ({"batch_size": 8, "uratio": 1, "total_batch": 128, "ratio": 1}, (64, 64)),
        ({"batch_size": 8, "uratio": 1, "total_batch": 96, "ratio": 3}, (24, 72)),
        ({"batch_size": 8, "uratio": 3, "total_batch": 96}, (24, 72)),
        ({"batch_size": 31, "uratio": 1, "ratio": 3.129032}, (31, 97)),
        ({"batch_size": 16, "uratio": 2, "total_batch": None, "ratio": None}, (16, 32)),
        ({}, (64, 64)),
    ],
)
def test_batches_of_usbs_settings(settings, sizes):
    args = Namespace(dataset="digits", **settings)
    complete(args)
    assert (args.batch_size, round(args.batch_size * args.uratio)) == sizes
    assert (args.total_batch, args.ratio) == (sum(sizes), sizes[1] / sizes[0])
    complete(args)
    assert (args.batch_size, args.total_batch) == (sizes[0], sum(sizes))


@pytest.mark.parametrize(
    "lines",
    [
        "batch_size: 8\nuratio: 1",
        "batch_size: 8",
        "uratio: 1",
        "batch_size: 9",
        "total_batch: 40",
        "ratio: 1",
        "lr: 0.1",
    ],
)
def test_a_file_over_ours_means_the_batch_that_it_means_to_us(tmp_path, lines):
    """Also where it says what USB's parser says when nobody does."""
    file = tmp_path / "mine.yaml"
    file.write_text(f"extends: {find_config('muscle_fixmatch_digits_10')}\n{lines}\n")
    ours = load_settings(file).as_dict()
    args = Namespace(dataset="digits", c=str(file), batch_size=8, uratio=1)
    for layer in read_yaml(file):  # as USB reads it
        vars(args).update(layer.values)
    complete(args)
    assert args.batch_size == ours["batch_size"]
    assert round(args.batch_size * args.uratio) == round(ours["batch_size"] * ours["uratio"])


def test_batches_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match=r"\bbatch_size 16 .*\btotal_batch 96\b"):
        complete(Namespace(dataset="digits", batch_size=16, uratio=1, total_batch=96, ratio=3))
    with pytest.raises(ConfigError, match=r"\bratio 3 .*\buratio 7\b"):
        complete(Namespace(dataset="digits", batch_size=8, uratio=7, total_batch=96, ratio=3))


def test_settings_that_this_package_resolved_are_not_resolved_again():
    resolved = load_settings("muscle_fixmatch_digits_10", seed=3)
    assert from_namespace(Namespace(resolved=resolved, source=None)) is resolved


def test_written_settings_are_read_back_as_they_were():
    """Also where they name the precision that auto came to, or images that make no whole ratio."""
    for settings in ({"precision": "auto"}, {"precision": "bf16"}, {"total_batch": 128, "ratio": 3.129032}):
        args = Namespace(dataset="digits", algorithm="muscle_fixmatch", resume=True, **settings)
        first = from_namespace(args).settings
        write_for_usb(args, first, amp="precision" in settings, gpu=0, num_train_iter=7, rank=1, world_size=2)
        assert (args.resume, args.rank, args.distributed, args.num_train_iter) == (True, 1, True, 7)
        again = from_namespace(args).settings
        assert again.model_copy(update={"num_train_iter": None, "device": "auto"}) == first


def test_a_value_over_the_files_wins_and_is_named_without_it(tmp_path):
    (tmp_path / "mine.yaml").write_text("lr: 0.25\nmomentum: 0.5\n")
    args = Namespace(dataset="digits", c=str(tmp_path / "mine.yaml"), lr=0.25, momentum=2)
    with pytest.raises(ConfigError, match=r"^momentum: .*\b1, .*\b2$"):
        from_namespace(args)
    args.momentum = 0.75
    resolved = from_namespace(args)
    assert (resolved.settings.lr, resolved.settings.momentum) == (0.25, 0.75)
    assert (resolved.sources["lr"], resolved.sources["momentum"]) == ("mine.yaml", "")


def test_another_data_set_on_the_command_line_has_its_own_classes():
    assert load_settings("muscle_fixmatch_cifar10_250").as_dict()["num_classes"] == 10
    other = load_settings("muscle_fixmatch_cifar10_250", dataset="cifar100", num_labels=500)
    assert other.as_dict()["num_classes"] == 100


# -------------------------------------------------------------------------------------------- what USB's program does


def as_usb_calls(usb_config, tmp_path, logger=None, tb_log=None, **changes):
    """What USB's train.py does between its parser and training."""
    import semilearn

    settings = {**SHORT, "algorithm": "muscle_fixmatch", "net": "small_cnn", "use_amp": False, "amp": False, **changes}
    args = usb_config({**settings, "save_dir": str(tmp_path), "save_name": "usb"})
    args.distributed = args.multiprocessing_distributed or args.world_size > 1
    return semilearn.get_algorithm(args, semilearn.get_net_builder(args.net, args.net_from_name), tb_log, logger)


def test_a_run_is_the_same_as_with_this_packages_program(usb_config, tmp_path, short_run):
    ours = short_run(algorithm="muscle_fixmatch", net="small_cnn", seed=1, save_name="ours", net_dropout=0.3)
    algorithm = as_usb_calls(usb_config, tmp_path, net_dropout=0.3, include_lb_to_ulb=False)
    algorithm.warmup()
    algorithm.train()
    assert algorithm.results_dict["last_top1"] == ours["last_top1"]
    there, here = (load_tensors(tmp_path / n / "latest_model.pth") for n in ("usb", "ours"))
    assert there["settings"] == here["settings"]
    assert all(torch.equal(v, there["model"][k]) for k, v in here["model"].items())
    resumed = as_usb_calls(usb_config, tmp_path, net_dropout=0.3, include_lb_to_ulb=False)
    resumed.load_model(tmp_path / "ours" / "latest_model.pth")  # either program goes on from the other's checkpoints
    assert resumed.it == 6


def test_values_go_to_the_log_that_usbs_program_gives(usb_config, tmp_path, caplog):
    seen = []
    tb_log = Namespace(update=lambda values, step: seen.append((step, values)))
    logger = logging.getLogger("usb")
    with caplog.at_level(logging.INFO, "usb"):
        as_usb_calls(usb_config, tmp_path, logger, tb_log).train()
    assert [step for step, _ in seen] == [1, 2, 3, 5]
    assert all({"lr", "train/mi", "train/total_loss"} <= values.keys() for _, values in seen)
    assert "6/6 iterations: lr" in caplog.text
    assert "top-1-acc" in caplog.text


def test_a_builder_of_ones_own_stays(usb_config, tmp_path):
    import semilearn

    from muscle_plugin.nets import build_net

    args = usb_config({**SHORT, "algorithm": "fixmatch", "amp": False, "save_dir": str(tmp_path)})
    args.algorithm, args.distributed = "muscle_fixmatch", False
    vars(args).update({n: f.default for n, f in MuscleSettings.model_fields.items()})
    algorithm = semilearn.get_algorithm(
        args, lambda num_classes, **_: build_net("small_cnn", num_classes, 3, 16, {"width": 0.5}), None, None
    )
    assert sum(p.numel() for p in algorithm.model.parameters()) < 100_000


def test_processes_that_others_start_are_refused(usb_config, tmp_path, monkeypatch):
    with pytest.raises(DeviceError, match="torchrun --standalone"):
        as_usb_calls(usb_config, tmp_path, multiprocessing_distributed=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DeviceError, match=r"torchrun .* -m muscle_plugin\.cli train"):
        as_usb_calls(usb_config, tmp_path)


def test_an_imbalanced_algorithm_is_refused(usb_config, tmp_path):
    with pytest.raises(ConfigError, match="imb_algorithm: abc "):
        as_usb_calls(usb_config, tmp_path, imb_algorithm="abc")


# --------------------------------------------------------------------------------------------------------- patched USB

RUN = """
import sys
import semilearn
from argparse import Namespace
from semilearn.core.utils import over_write_args_from_file
from semilearn.lighting.config import get_config

assert "muscle_plugin" not in sys.modules
read = Namespace()
over_write_args_from_file(read, "run.yaml")
args = get_config({**vars(read), "amp": False, "distributed": False})
algorithm = semilearn.get_algorithm(args, semilearn.get_net_builder(args.net, args.net_from_name), None, None)
algorithm.warmup()
algorithm.train()
"""


@pytest.mark.slow
def test_patched_usb_finds_this_package_by_its_entry_point(patched, installed, tmp_path, short_run):
    lines = {"num_train_iter": 4, "epoch": 2, "num_eval_iter": 4, "total_batch": 16, "ratio": 3, "num_threads": 1}
    extends = {"extends": str(find_config("muscle_fixmatch_digits_10")), **lines, "save_name": "usb", "save_dir": "."}
    (tmp_path / "run.yaml").write_text(json.dumps(extends))
    arguments = [patched / "train.py", "--c", "run.yaml"] if "USB_TREE" in os.environ else ["-c", RUN]
    done = python(arguments, tmp_path, patched, installed)
    assert done.returncode == 0, done.stderr[-2000:]
    short = load_settings("muscle_fixmatch_digits_10", **lines, seed=1, save_name="ours", save_dir=str(tmp_path))
    from muscle_plugin.runs.train import train

    train(short, quiet=True)
    there, here = (load_tensors(tmp_path / n / "latest_model.pth") for n in ("usb", "ours"))
    assert there["settings"] == here["settings"]
    assert all(torch.equal(v, there["model"][k]) for k, v in here["model"].items())


@pytest.mark.slow
def test_a_plugin_that_is_imported_before_semilearn(patched, installed, tmp_path):
    code = """
import muscle_plugin.training
from muscle_plugin.algorithms.compose import algorithm_class
from semilearn.core.utils import ALGORITHMS
assert ALGORITHMS["muscle_fixmatch"] is algorithm_class("muscle_fixmatch")
assert algorithm_class("musclefixmatch").__name__ == "HostedMuscleFixMatch"
assert "muscle_musclefixmatch" not in ALGORITHMS
"""
    done = python(["-c", code], tmp_path, patched, installed)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("precision", [torch.float32, torch.float16, torch.bfloat16])
def test_usbs_mutual_information_is_this_packages(patched, precision):
    theirs = module(patched / "semilearn/algorithms/muscle/utils.py").mutual_information
    generator = torch.Generator().manual_seed(0)
    for views, n, c in ((1, 8, 3), (3, 32, 10), (3, 5, 100)):
        weak = (3 * torch.randn(n, c, generator=generator)).to(precision)
        hard = (3 * torch.randn(views, n, c, generator=generator)).to(precision)
        weak.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != torch.float32):
            there = theirs(weak, hard)
        here = mutual_information(weak.float().softmax(-1), hard.float().softmax(-1))
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)
        slopes = [torch.autograd.grad(x, weak)[0] for x in (there, here)]
        torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-7)


def test_the_project_declares_its_entry_point():
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    start = lines.index('[project.entry-points."semilearn.plugins"]')
    assert lines[start + 1] == 'muscle = "muscle_plugin.register"'
