"""The plugin seen from a script or notebook of USB: ``get_config``, ``get_algorithm``, ``Trainer``."""

import logging
from pathlib import Path

import muscle_plugin.register  # noqa: F401  before semilearn: USB's git main cannot be imported with timm 1.0 otherwise

# isort: split
import nbformat
import pytest
import semilearn
import torch
from nbclient import NotebookClient

from muscle_plugin import usb_calls_on

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
    with pytest.raises(RuntimeError, match="lacks its hard views"):
        algorithm.train_step(**algorithm.process_batch(**batch))


def test_a_trainer_that_updates_no_weights_is_noticed(tmp_path):
    _, algorithm = made(tmp_path)
    lb, ulb, _ = algorithm.loaders()
    steps = zip(lb, ulb, strict=True)
    labelled, unlabelled = next(steps)
    with usb_calls_on(algorithm.device):
        algorithm.train_step(**algorithm.process_batch(**labelled, **unlabelled))
    algorithm.it += 1
    with pytest.raises(RuntimeError, match="without updating the weights"):
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
