"""The plugin seen from a script or notebook of USB: ``get_config``, ``get_algorithm``, ``Trainer``."""

import logging
import re
import warnings
from pathlib import Path

import muscle_plugin.register  # noqa: F401  before semilearn: USB's git main cannot be imported with timm 1.0 otherwise

# isort: split
import nbformat
import numpy as np
import pytest
import semilearn
import torch
from nbclient import NotebookClient

from muscle_plugin import Host, usb_calls_on
from muscle_plugin.errors import ConfigError
from muscle_plugin.settings.resolve import load_settings
from muscle_plugin.training.checkpoint import settings_to_compare

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "quickstart.ipynb"


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


def made(tmp_path, **settings):
    config = semilearn.get_config(
        {
            "algorithm": "muscle_fixmatch", "dataset": "digits", "num_classes": 10, "num_labels": 20, "img_size": 16,
            "net": "small_cnn", "lr": 0.05, "epoch": 2, "num_train_iter": 8, "num_eval_iter": 8, "batch_size": 12,
            "uratio": 2, "include_lb_to_ulb": False, "save_dir": str(tmp_path), "save_name": "run", "seed": 0, **settings,
        }
    )  # fmt: skip
    return config, semilearn.get_algorithm(config, semilearn.get_net_builder(config.net, False), None, None)


def calls_hooks() -> bool:
    from inspect import getsource

    return "call_hook" in getsource(semilearn.Trainer.fit)


needs_hooks = pytest.mark.skipif(
    not calls_hooks(), reason="the Trainer of this semilearn calls no hooks (git main): it trains nothing"
)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lrr": 0.1}, "lrr .*'lr'"),
        ({"mi_weigth": 0.1}, "mi_weigth .*'mi_weight'"),
        ({"hard_view": 2}, "hard_view .*'hard_views'"),
        ({"p_cutof": 0.5}, "p_cutof .*'p_cutoff'"),
        ({"mi_weight": "big"}, "mi_weight: .*'big'"),
        ({"p_cutoff": "high"}, "p_cutoff: .*'high'"),
        ({"momentum": 2}, r"momentum: .*\b1, .*\b2$"),
        ({"lr": [0.1]}, "lr: .*list"),
        ({"dataset": "digit"}, "dataset: .*'digit'.* 'digits'.*--plugins FILE"),
        ({"num_labels": 15}, r"num_labels: 15 .*\bdigits\b.*\b10\b"),
        ({"lr_zero_at": 2}, "lr_zero_at: .*--lr_schedule cosine"),
        ({"ulb_imb_ratio": 10}, r"ulb_imb_ratio: 10 .*USB's own"),
        ({"extends": "base.yaml"}, r"extends: .*\b0011\b"),
        ({"lrr": 0.1, "momentum": 2, "hard_views": 0}, "lrr "),
    ],
)
def test_what_train_would_refuse_is_refused(tmp_path, settings, words):
    with pytest.raises(ConfigError) as caught:
        made(tmp_path, **settings)
    said = caught.value.faults
    assert re.match(words, said[0])
    assert len(said) == len(settings)  # all faults at once
    if not settings.keys() & {"ulb_imb_ratio", "extends"}:  # no keys of the command line
        with pytest.raises(ConfigError) as there:
            load_settings(None, algorithm="muscle_fixmatch", **{"dataset": "digits", **settings})
        assert sorted(f.removeprefix("--") for f in there.value.faults) == sorted(said)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"wandb_group": "a", "learning_speed": 1}, "wandb_group, learning_speed: "),
        ({"crop_ratio": 0.95}, "crop_ratio .*weak_augment"),
        ({"rot_loss_ratio": 3}, "rot_loss_ratio .*'muscle_fixmatch'"),
    ],
)
def test_what_has_no_effect_is_said(tmp_path, settings, words):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        config, algorithm = made(tmp_path, **settings)
    (line,) = (w for w in said if re.match(words, str(w.message)))
    assert line.filename == __file__  # where get_algorithm is called
    assert all(getattr(config, k) == v for k, v in settings.items())  # for whoever has a use for it
    assert isinstance(algorithm, Host)


def test_values_come_in_the_type_of_their_setting(tmp_path):
    """USB writes None as a word; texts and NumPy's numbers are what a notebook's cells and files hold."""
    settings = {
        "lr": "5e-2",
        "seed": np.int64(3),
        "epoch": 2.0,
        "gpu": "None",
        "save_dir": tmp_path,
        "use_cat": "false",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config, first = made(tmp_path, **settings)
        again = semilearn.get_algorithm(config, first.net_builder, None, None)  # of settings that are complete already
    assert (config.lr, config.seed, config.gpu, config.use_cat) == (0.05, 3, None, False)
    assert (type(config.seed), type(config.epoch), config.save_dir) == (int, int, str(tmp_path))
    assert settings_to_compare(again) == settings_to_compare(first)
    assert config.resume is False  # USB's hooks ask for its truth value


def test_a_class_of_usb_takes_what_it_took(monkeypatch):
    seen = []
    monkeypatch.setattr(semilearn.core.AlgorithmBase, "__init__", lambda self, args, *_, **__: seen.append(vars(args)))
    monkeypatch.setattr(semilearn.algorithms.fixmatch.FixMatch, "init", lambda self, **_: None)
    config = semilearn.get_config({"algorithm": "fixmatch", "lrr": 0.1, "lr": "fast"})
    algorithm = semilearn.get_algorithm(config, None, None, None)
    assert not isinstance(algorithm, Host)
    assert (seen[0]["lrr"], seen[0]["lr"]) == (0.1, "fast")


@pytest.mark.slow
@needs_hooks
@pytest.mark.parametrize("name", ["muscle_fixmatch", "muscle", "muscle_softmatch"])
def test_usbs_trainer_takes_the_steps_of_train(tmp_path, name):
    config, algorithm = made(tmp_path / "a", algorithm=name)
    with usb_calls_on(algorithm.device):
        trainer = semilearn.Trainer(config, algorithm)
        trainer.fit(*algorithm.loaders())
        scores = trainer.evaluate(algorithm.loader_dict["eval"])
        classes, probabilities = trainer.predict(algorithm.loader_dict["eval"])
    _, other = made(tmp_path / "b", algorithm=name)
    other.train()
    assert algorithm.it == other.it == 8
    for ours, theirs in zip(algorithm.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert probabilities.shape == (360, 10)
    truth = algorithm.source.test_labels.numpy()
    assert scores["acc"] == pytest.approx((classes == truth).mean())
    assert (tmp_path / "a" / "run" / "latest_model.pth").is_file()


def test_loaders_without_muscles_views_are_refused(tmp_path):
    _, algorithm = made(tmp_path)
    lb, ulb, _ = algorithm.loaders()
    batch = {**next(iter(lb)), **next(iter(ulb))}
    algorithm.plan = None  # as with loaders that know nothing of it
    with pytest.raises(RuntimeError, match=r"trainer\.fit\(\*algorithm\.loaders\(\)\)"):
        algorithm.train_step(**algorithm.process_batch(**batch))
    _, algorithm = made(tmp_path)
    lb, ulb, _ = algorithm.loaders()
    batch = {k: v for k, v in {**next(iter(lb)), **next(iter(ulb))}.items() if not k.endswith("_h")}
    with pytest.raises(RuntimeError, match="strong views"):
        algorithm.train_step(**algorithm.process_batch(**batch))


def test_a_trainer_that_updates_no_weights_is_noticed(tmp_path):
    _, algorithm = made(tmp_path)
    lb, ulb, _ = algorithm.loaders()
    steps = zip(lb, ulb, strict=True)
    labelled, unlabelled = next(steps)
    with usb_calls_on(algorithm.device):
        algorithm.train_step(**algorithm.process_batch(**labelled, **unlabelled))
    algorithm.it += 1
    with pytest.raises(RuntimeError, match="weights"):
        next(steps)


def test_labelled_and_unlabelled_loaders_share_no_entry(tmp_path):
    _, algorithm = made(tmp_path)
    lb, ulb, test = algorithm.loaders()
    assert len(lb) == len(ulb) == 4
    labelled, unlabelled = next(iter(lb)), next(iter(ulb))
    assert {"x_lb", "y_lb"} <= labelled.keys()
    assert {"x_ulb_w", "x_ulb_s", "x_ulb_h"} <= unlabelled.keys()
    assert not labelled.keys() & unlabelled.keys()
    assert len(labelled["x_lb"]) == 12
    assert len(unlabelled["x_ulb_w"]) == 24
    assert sum(len(batch["y_lb"]) for batch in test) == 360


@pytest.mark.slow
@needs_hooks
def test_the_notebook_runs_as_shown(tmp_path):
    book = nbformat.read(NOTEBOOK, as_version=4)
    shown = [len(c.outputs) for c in book.cells if c.cell_type == "code"]
    assert all(c.execution_count for c in book.cells if c.cell_type == "code"), "committed without its outputs"
    NotebookClient(book, timeout=500, kernel_name="python3").execute(cwd=str(tmp_path))
    cells = [c for c in book.cells if c.cell_type == "code"]
    assert [bool(len(c.outputs)) for c in cells] == [bool(n) for n in shown]
    printed = "".join(o.text for c in cells for o in c.outputs if o.output_type == "stream" and o.name == "stdout")
    accuracies = [float(line.split()[-1].rstrip("%")) for line in printed.splitlines() if line.endswith("%")]
    assert len(accuracies) == 2  # FixMatch, MUSCLE + FixMatch
    assert min(accuracies) > 50
