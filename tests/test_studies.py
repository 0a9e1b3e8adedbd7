"""Studies: the paper's numbers, configurations of every cell, and that each of them can be built."""

import gc
import json

import pytest
import torch

from muscle_plugin.data.datasets import READERS
from muscle_plugin.data.source import Source
from muscle_plugin.errors import ConfigError
from muscle_plugin.registry.names import DATASETS
from muscle_plugin.settings.resolve import load_settings
from muscle_plugin.settings.sources import config_names
from muscle_plugin.studies.definitions import expand, figures, study_configs, study_names, tables


def table(name):
    return next(t for t in tables() if t.name == name)


# read off the paper by eye: table, row, column, what it prints, the configuration's name
PRINTED = [
    ("table1", "Supervised", "1000 labels", (59.97, 0.87), "supervised_cifar10_1000"),
    ("table1", "MUSCLE+MT", "250 labels", (75.86, 3.2), "muscle_meanteacher_original_cifar10_250"),
    ("table1", "MUSCLE+MT+LP", "100 labels", (59.03, 3.17), "muscle_meanteacher_labelprop_cifar10_100"),
    ("table2", "LP", "4000 labels", (53.8, 0.76), "labelprop_cifar100_4000"),
    ("table2", "LP+MT", "500 labels", (21.40, 0.68), "meanteacher_labelprop_cifar100_500"),
    ("table2", "MUSCLE+MT", "100 labels", (11.01, 0.85), "muscle_meanteacher_original_cifar100_100"),
    ("table3", "MT", "top 1, 4000 labels", (28.23, 0.23), "meanteacher_original_miniimagenet_4000"),
    ("table3", "MUSCLE", "top 5, 10000 labels", (71.26, 0.10), "muscle_miniimagenet_10000"),
    ("table3", "MUSCLE+MT+LP", "top 1, 2500 labels", (30.86, 0.53), "muscle_meanteacher_labelprop_miniimagenet_2500"),
    ("table4", "FixMatch, setting 1", "CIFAR-10, 100 labels", (73.98, 1.46), "fixmatch_cifar10_100_hp1"),
    ("table4", "MUSCLE+FixMatch, setting 2", "CIFAR-10, 250 labels", (90.25, 0.39), "muscle_fixmatch_cifar10_250"),
    (
        "table4",
        "MUSCLE+FixMatch, setting 1",
        "CIFAR-100, 500 labels",
        (23.73, 1.67),
        "muscle_fixmatch_cifar100_500_hp1",
    ),
    ("table5", "FixMatch, setting 1", "top 5, 2500 labels", (32.52, 1.29), "fixmatch_miniimagenet_2500_hp1"),
    ("table5", "MUSCLE+FixMatch, setting 2", "top 1, 2500 labels", (24.73, 0.68), "muscle_fixmatch_miniimagenet_2500"),
    ("table5", "FixMatch, setting 2", "top 5, 10000 labels", (59.26, 1.03), "fixmatch_miniimagenet_10000"),
]


@pytest.mark.parametrize(("name", "row", "column", "printed", "config"), PRINTED)
def test_cells_are_those_of_the_paper(name, row, column, printed, config):
    t = table(name)
    cell = t.cells[t.rows.index(row)][t.columns.index(column)]
    assert (cell.paper, cell.config) == (printed, config)
    assert cell.metric == ("top5" if "top 5" in column else "top1")


def test_tables_have_as_many_cells_as_the_paper():
    assert {t.name: sum(map(len, t.cells)) for t in tables() if t.of_paper} == {
        "table1": 28, "table2": 30, "table3": 42, "table4": 28, "table5": 24,
    }  # fmt: skip
    assert all(c.paper for t in tables() if t.of_paper for row in t.cells for c in row)


def test_every_study_has_its_configurations_and_every_configuration_a_study():
    known = set(config_names())
    used = {c for name in study_names() for c in study_configs(name)}
    assert used <= known
    beside = {
        "muscle_fixmatch_folder",
        "muscle_fixmatch_folder_pretrained",
        "muscle_labelprop_cifar10_250",
        *(n for n in known if "meanteacher_digits" in n or n.startswith("vpet/")),
    }
    assert known - used == beside


def test_figures_vary_what_they_say():
    r = {f.name: f for f in figures()}
    for x, config in r["figure2a"].series["MUSCLE+MT"].items():
        s = load_settings(config).settings
        assert s.ratio == pytest.approx(float(x), rel=0.02)
        assert s.total_batch == 128
    for points in r["figure2b"].series.values():
        assert load_settings(points["without"]).settings.net_dropout == 0
    for points in r["figure3"].series.values():
        assert all(load_settings(c).settings.num_labels == int(x) for x, c in points.items())
    pretrained = [load_settings(c).settings.init_from for p in r["figure2d"].series.values() for c in p.values()]
    runs = {f"runs/{c}_0/latest_model.pth" for c in r["figure2d"].before}
    assert {p.removeprefix("./") for p in pretrained} == runs


def test_settings_1_and_2_are_those_of_section_5_2():
    one, two = (load_settings(n).settings for n in ("muscle_fixmatch_cifar10_250_hp1", "muscle_fixmatch_cifar10_250"))
    assert (one.epoch, one.lr, one.lr_schedule, round(one.lr_zero_at * one.epoch)) == (180, 0.05, "cosine", 210)
    assert (two.epoch, two.lr, two.lr_schedule) == (300, 0.03, "usb")
    assert one.batch_size == two.batch_size == 64 == one.total_batch - one.batch_size
    base = load_settings("labelprop_cifar100_500").settings
    assert (base.batch_size, base.total_batch, base.lr) == (31, 128, 0.2)


def test_words_stand_for_studies_configurations_patterns_and_files(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("dataset: digits\n")
    assert len(expand(["table1"])) == 28
    assert {p.stem for p in expand(["figure2"])} == {n for p in "abcd" for n in study_configs(f"figure2{p}")}
    assert [p.stem for p in expand(["muscle_digits_10", str(own), "muscle_digits_10"])] == ["muscle_digits_10", "own"]
    assert all(p.stem.endswith("_digits_20") for p in expand(["*_digits_20"]))
    with pytest.raises(ConfigError) as caught:
        expand(["tabel1", "muscl_digits_10", "*_nothing"])
    assert len(caught.value.faults) == 3
    assert "'table1'" in caught.value.faults[0]
    assert "'muscle_digits_10'" in caught.value.faults[1]


def _small_source(dataset):
    """A source with the data set's classes, subclasses and channels, of a few random images."""
    info = DATASETS[dataset]
    kinds = info.num_classes * info.subclasses

    def load(_):
        fine = torch.arange(4 * kinds) % kinds
        images = torch.randint(0, 256, (len(fine), info.channels, 32, 32), dtype=torch.uint8)
        names = tuple(map(str, range(info.num_classes)))
        first, last = torch.arange(len(fine)).split([2 * kinds, 2 * kinds])
        if info.subclasses == 1:
            return Source(images, fine, first, last, names)
        return Source(images, fine // info.subclasses, first, last, names, fine, tuple(map(str, range(kinds))))

    return load


def _kinds_of_configurations():
    """One configuration of each kind: those that differ in the number of labels alone are one kind."""
    kinds = {}
    for name in config_names():
        settings = load_settings(name).as_dict()
        if settings["dataset"] != "folder":
            key = {k: v for k, v in settings.items() if k not in ("num_labels", "save_name", "init_from")}
            kinds.setdefault(json.dumps(key, sort_keys=True), name)
    return sorted(kinds.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", _kinds_of_configurations())
def test_every_configuration_can_be_built(name, monkeypatch, tmp_path):
    from muscle_plugin.runs.build import build

    settings = load_settings(name).settings
    info = DATASETS[settings.dataset]
    monkeypatch.setitem(READERS, settings.dataset, _small_source(settings.dataset))
    labels = info.label_groups(settings.sequestered)
    of_head = settings.tune == "head"
    less = {"num_labels": labels, "init_from": None, "num_threads": 1, "save_dir": str(tmp_path)}
    less |= {"use_pretrain": of_head, "cache_dir": str(tmp_path)}
    algorithm = build(load_settings(name, **less))
    batch = algorithm.batches.batch(0)
    image = (algorithm.encoder.num_features,) if of_head else (info.channels, settings.img_size, settings.img_size)
    assert all(x.shape == (settings.batch_size, *image) for n, x in batch.items() if n == "x_lb")
    assert len(batch["y_lb"]) == settings.batch_size
    assert len(algorithm.split.labelled) == labels
    assert algorithm.num_classes == info.num_classes
    del algorithm, batch
    gc.collect()  # its parts refer to one another: several GB, otherwise
