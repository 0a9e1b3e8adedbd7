"""Label propagation on raw pixels, with nothing trained: the baseline beside trained nets."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable
from typing import Any

import torch

from muscle_plugin.data.load import choose_split, load_data, split_seed
from muscle_plugin.data.source import resize
from muscle_plugin.errors import DataError, UserError
from muscle_plugin.propagation import DiffusionLabelPropagation
from muscle_plugin.settings.checks import IMAGE_FILES
from muscle_plugin.settings.resolve import load_settings, resolve
from muscle_plugin.settings.schema import RunSettings
from muscle_plugin.settings.sources import read_saved
from muscle_plugin.studies.groups import natural_key
from muscle_plugin.studies.runs import Run, mean_and_std, plain, summary
from muscle_plugin.text import first_line

METHODS: dict[str, dict[str, Any]] = {
    "label propagation on pixels, no training": {},
    "Poisson MBO on pixels, equal class sizes, no training": {"method": "poisson_mbo", "class_mass": "equal"},
}
LARGEST = 16  # pixels a side, to which photographs are resized: on CIFAR-10 as accurate as 32 in a quarter of the time


def on_pixels(settings: RunSettings) -> dict[str, tuple[float, float]]:
    """Return by name the accuracy on the test images, in percent, and seconds.

    The graph is of the training images' pixels, (N, channels H W), not centred, at most 16 x 16; the labels are those of the
    settings' split.

    Raises:
        DataError: the images cannot be read, or there are no test images.
    """
    source = load_data(settings)
    if not len(source.test):
        raise DataError("there are no test images")
    labelled = choose_split(settings, source).labelled
    labels = torch.full((len(source.train),), -1)
    labels[labelled] = source.train_labels[labelled]
    pixels = resize(source.images, min(settings.img_size, LARGEST)).flatten(1).float()
    found = {}
    for name, options in METHODS.items():
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of points that are not reached
            fitted = DiffusionLabelPropagation(**options).fit(pixels[source.train], labels)
        found[name] = 100 * fitted.score(pixels[source.test], source.test_labels), time.perf_counter() - began
    return found


def baseline_rows(runs: Iterable[Run]) -> list[dict[str, str]]:
    """Return a row for each method, data set and number of labels among finished runs, over their seeds; or, for a data set
    that cannot be read, a row with the reason."""
    seen: set[tuple[str, int]] = set()
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    faults: dict[str, str] = {}
    for run in runs:
        data = str(run.result.get("dataset"))
        try:
            settings = _settings_of(run)
            data, seed = _data(settings), split_seed(settings)
            if data in faults or (data, seed) in seen:
                continue
            seen.add((data, seed))
            for name, measured in on_pixels(settings).items():
                found.setdefault((data, name), []).append(measured)
        except UserError as e:
            faults.setdefault(data, first_line(e))
    rows = [{"data": d, "method": f"not measured: {why}", "accuracy": "–", "seconds": "–"} for d, why in faults.items()]
    for (data, name), of_seeds in sorted(found.items(), key=lambda item: natural_key(item[0][0])):
        accuracies, seconds = zip(*of_seeds, strict=True)
        words = {"accuracy": summary(accuracies), "seconds": f"{mean_and_std(seconds)[0]:.1f}"}
        rows.append({"data": data, "method": name} | words)
    return rows


def _settings_of(run: Run) -> RunSettings:
    if (saved := run.path / "config.yaml").is_file():
        return resolve(read_saved(saved)).settings
    changed = {name: ours for name, (_, ours) in run.changed.items()}
    return load_settings(run.config, **run.settings, **changed, seed=run.result.get("seed", 0)).settings


def _data(s: RunSettings) -> str:
    """Name the data set and its labels, with what else decides them."""
    deciding = ("lb_imb_ratio", "sequestered", "split_file", "labels_csv")
    others = [
        f"{n} {plain(v)}" for n in deciding if (v := getattr(s, n)) not in (RunSettings.model_fields[n].default, 0)
    ]
    others += [f"in {s.data_dir}"] if s.dataset in IMAGE_FILES else []
    labels = s.num_labels or ("given" if s.split_file or s.dataset in IMAGE_FILES else "all")
    return ", ".join([f"{s.dataset}, {labels} labels", f"{s.img_size} x {s.img_size}", *others])
