"""Settings: layering, checking, the command line, and that none of it loads torch or semilearn."""

import inspect
import json
import math
import re
import subprocess
import sys
from argparse import Namespace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIGS, ROOT

from muscle_plugin.cli import main
from muscle_plugin.data.views import STRONG, views_of
from muscle_plugin.errors import ConfigError
from muscle_plugin.files import load_tensors
from muscle_plugin.registry.catalogue import (
    NOT_HOSTED,
    all_algorithms,
    base_algorithms,
    muscle_algorithms,
    usb_algorithms,
)
from muscle_plugin.settings.effects import IDLE, NO_SHARPENING, NO_STRONG_VIEW, NO_ULB_LOSS_RATIO, NO_USE_CAT
from muscle_plugin.settings.namespace import from_namespace
from muscle_plugin.settings.resolve import batch_composition, load_settings, resolve
from muscle_plugin.settings.schema import (
    MACHINE,
    PLACE,
    RESULT,
    SEED,
    STEP,
    Affects,
    MuscleSettings,
    RunSettings,
    affecting,
    owners,
    settings_model,
)
from muscle_plugin.settings.sources import Layer, config_directory, config_names, read_yaml


def command(*words):
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )


def faults(**settings):
    with pytest.raises(ConfigError) as caught:
        load_settings(None, **settings)
    return caught.value.faults


@pytest.mark.slow
@pytest.mark.parametrize("name", config_names())
def test_every_config_resolves_to_what_its_name_says(name):
    resolved = load_settings(name)
    settings = resolved.settings
    labels = "" if settings.num_labels is None else f"_{settings.num_labels}"
    stem = f"{settings.algorithm}_{settings.dataset}{labels}"
    folder, _, leaf = name.rpartition("/")
    assert resolved.name == name
    assert leaf == stem or (leaf.startswith(f"{stem}_") and folder in ("", "vpet"))
    assert settings.save_name == (f"{name.replace('/', '-')}_0" if labels else f"{stem}_all_0")


@pytest.mark.parametrize(
    ("config", "given", "called"),
    [
        ("fixmatch_digits_100", {"num_labels": 10}, "fixmatch_digits_10_0"),
        ("classic_cv/fixmatch_cifar10_4000", {"num_labels": "40"}, "fixmatch_cifar10_40_0"),
        ("fixmatch_cifar100_10000", {"num_labels": 1000}, "fixmatch_cifar100_1000_0"),
        ("muscle_fixmatch_digits_10", {"algorithm": "muscle_flexmatch"}, "muscle_flexmatch_digits_10_0"),
        ("fixmatch_digits_100", {"dataset": "cifar10"}, "fixmatch_cifar10_100_0"),
        ("fixmatch_digits_100", {"split_file": "mine/split.json"}, "fixmatch_digits_split_0"),
        ("fixmatch_digits_100", {"num_labels": "100", "seed": 3, "lr": 0.1}, "fixmatch_digits_100_3"),
        ("classic_cv/fixmatch_cifar10_4000", {"epoch": 2}, "classic_cv-fixmatch_cifar10_4000_0"),
        ("classic_cv/fixmatch_cifar10_4000", {"num_labels": 4000.0}, "classic_cv-fixmatch_cifar10_4000_0"),
    ],
)
def test_a_run_has_its_configurations_name_only_with_its_labels(config, given, called):
    assert load_settings(config, **given).settings.save_name == called


def test_values_of_python_and_its_libraries(tmp_path):
    given = {
        "save_dir": tmp_path, "seed": np.int64(3), "lr": np.float64(0.5), "ratio": Fraction(7, 2),
        "momentum": torch.tensor(0.5), "use_cat": np.bool_(False), "epoch": np.array(2), "total_batch": torch.tensor(9),
        "weight_decay": np.float32(0.25), "clip_grad": np.longdouble(2), "overwrite": torch.tensor(True),
        "net": np.str_("cnn13"),
    }  # fmt: skip
    s = load_settings(None, **given).settings
    assert (s.weight_decay, s.clip_grad, s.overwrite, s.net) == (0.25, 2.0, True, "cnn13")
    assert (s.save_dir, s.seed, s.lr, s.ratio) == (str(tmp_path), 3, 0.5, 3.5)
    assert (s.momentum, s.use_cat, s.epoch, s.total_batch) == (0.5, False, 2, 9)
    assert [type(v) for v in (s.seed, s.use_cat, s.epoch)] == [int, bool, int]
    (fault,) = faults(seed=np.array([1, 2]))
    assert re.match("--seed: .*ndarray", fault)


def test_what_settings_affect():
    everything = affecting(*Affects)
    assert everything == {*RunSettings.model_fields, *MuscleSettings.model_fields}
    assert sum(len(affecting(a)) for a in Affects) == len(everything)
    assert affecting(SEED) == {"seed", "split_seed"}
    assert {"keep_checkpoints", "num_save_iter", "save_dir", "plugins"} <= affecting(PLACE)  # steps are alike
    assert {"device", "gpu", "num_threads", "compile", "deterministic", "data_on", "num_workers"} <= affecting(MACHINE)
    assert {"lr", "epoch", "num_labels", "split_file", "init_from"} <= affecting(RESULT)
    assert {"algorithm", "net", "total_batch", "img_size", "precision", "mi_weight", "hard_views"} <= affecting(STEP)


def test_command_line_over_yaml_over_base_over_default(tmp_path):
    (tmp_path / "base.yaml").write_text("lr: 0.5\nmomentum: 0.5\nseed: 7\n")
    (tmp_path / "leaf.yaml").write_text("extends: base.yaml\nlr: 0.25\nmomentum: 0.6\n")
    resolved = load_settings(tmp_path / "leaf.yaml", lr="0.125")
    s = resolved.settings
    assert (s.lr, s.momentum, s.seed, s.weight_decay) == (0.125, 0.6, 7, 5e-4)
    assert resolved.sources["momentum"] == "leaf.yaml"
    assert resolved.sources["seed"] == "base.yaml"
    assert resolved.sources["lr"] == "command line"


@pytest.mark.parametrize("base", ["muscle_fixmatch_digits_10", "muscle_fixmatch_digits_10.yaml", "_base/digits_muscle"])
def test_a_file_anywhere_may_extend_one_of_ours_by_name(tmp_path, base):
    (tmp_path / "my.yaml").write_text(f"extends: {base}\nalgorithm: muscle_fixmatch\nlr: 0.01\n")
    found = load_settings(tmp_path / "my.yaml").as_dict()
    assert (found["lr"], found["mi_labelled"], found["net"]) == (0.01, False, "small_cnn")
    (tmp_path / "_base").mkdir()
    (tmp_path / "_base" / "digits_muscle.yaml").write_text("momentum: 0.5\n")  # its own folder's comes first
    (tmp_path / "my.yaml").write_text("extends: _base/digits_muscle.yaml\n")
    assert load_settings(tmp_path / "my.yaml").as_dict()["momentum"] == 0.5
    (tmp_path / "my.yaml").write_text("extends: nowhere.yaml\n")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: .*my\.yaml"):
        load_settings(tmp_path / "my.yaml")


def test_resolved_settings_resolve_to_themselves(tmp_path):
    first = load_settings(CONFIGS / "muscle_fixmatch_digits_10.yaml", ratio="3", total_batch="50")
    (tmp_path / "again.yaml").write_text(first.to_yaml())
    assert load_settings(tmp_path / "again.yaml").as_dict() == first.as_dict()


def test_all_faults_at_once_each_with_its_place(tmp_path):
    (tmp_path / "c.yaml").write_text("algorithm: muscle_fixmatch\nlrr: 1\nmomentum: 2\nnum_labels: 15\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(tmp_path / "c.yaml", p_cutof="0.9", epoch="many", dataset="digit")
    text = "\n".join(caught.value.faults)
    assert re.search(r"c\.yaml: lrr .*'lr'", text)
    assert re.search("--p_cutof .*'p_cutoff'", text)
    assert re.search(r"c\.yaml: momentum: .*\b1\b.*\b2\b", text)
    assert re.search("--epoch: .*integer", text)
    assert re.search("--dataset: .*'digit'.*'digits'", text)
    assert len(caught.value.faults) == 5


def test_a_setting_of_another_algorithm_is_refused_with_its_owners():
    (fault,) = faults(algorithm="supervised", p_cutoff="0.9")
    assert re.match("--p_cutoff .*'supervised'.* adamatch", fault)
    (fault,) = faults(algorithm="fixmatch", mi_weight="1")
    assert "muscle" in fault


@pytest.mark.parametrize("name", NOT_HOSTED)
def test_an_algorithm_that_is_not_hosted_says_why(name):
    for algorithm in (name, f"muscle_{name}"):
        with pytest.raises(ConfigError) as e:
            load_settings(None, algorithm=algorithm)
        assert str(e.value) == f"--algorithm: {NOT_HOSTED[name]}"


def test_unknown_algorithm_names_the_nearest():
    (fault,) = faults(algorithm="muscle_fixmach")
    assert "'muscle_fixmatch'" in fault
    (fault,) = faults(algorithm="muscle_supervised")
    assert "'muscle'" in fault


@pytest.mark.parametrize(
    ("word", "offered"),
    [
        ("fixmatch_muscle_digits_10", ["muscle_fixmatch_digits_10"]),
        ("MUSCLE_digits_10", ["muscle_digits_10"]),
        ("digits-10-muscle.yaml", ["muscle_digits_10"]),
        ("cifar10-250", ["muscle_cifar10_250", "fixmatch_cifar10_250"]),
        ("fixmatch_cifar10_40", ["classic_cv/fixmatch_cifar10_40"]),
    ],
)
def test_configurations_nearest_to_a_name_that_is_none(word, offered, capsys):
    """In all commands that take one; capitals, the order of parts and folders do not count."""
    for command_line in (["train", word], ["train", "--c", word], ["data", "show", word], ["sweep", word]):
        assert main(command_line) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {word}: ")
        assert re.findall("'(.*?)'", line)[: len(offered)] == offered
        assert ("study" in line) == (command_line[0] == "sweep")


def test_a_name_unlike_any_is_told_which_there_are(capsys):
    there = rf"{config_directory()} .*\b{len(config_names())} .*\bmuscle_fixmatch_digits_10\b"
    for command_line in (["train", "nonsense"], ["train", "--c", "nonsense"], ["data", "show", "nonsense"]):
        assert main(command_line) == 2
        assert re.fullmatch(f"error: nonsense: .*{there}.*\n", capsys.readouterr().err)
    assert main(["sweep", "nonsense"]) == 2
    assert re.fullmatch(f"error: nonsense: .*: table1, table2, .*{there}.*\n", capsys.readouterr().err)
    assert main(["train", "digits"]) == 2  # a name of sweep's
    assert re.fullmatch(r"error: digits: .*\d+ .*\(\w+\).*`muscle-plugin sweep digits`.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("program", ["train", "sweep"])
def test_a_fault_names_its_file_once(program, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([program, "absent.yaml"]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(f"error: {tmp_path / 'absent.yaml'}: .*\n", said)
    assert said.count("absent.yaml") == 1
    (tmp_path / "c.yaml").write_text("lrr: 1\n")
    assert main([program, "c.yaml"]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: c\.yaml: lrr .*'lr'.*\n", said)
    assert said.count("c.yaml") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n- 2", "`name: value`"),
        ("# lr: 1\n", "no settings"),
        ("lr: 1\nlr: 2", "duplicate key"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("extends: [1]", "extends must"),
        ("extends: nothing.yaml", "nothing.yaml: "),
        ("extends: c.yaml", "itself"),
    ],
)
def test_bad_files_are_one_line(tmp_path, text, words):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="c.yaml|nothing.yaml") as caught:
        read_yaml(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([{}], (64, 64)),
        ([{"total_batch": 128, "ratio": 3}], (32, 96)),
        ([{"total_batch": 100, "ratio": 0.5}], (67, 33)),
        ([{"batch_size": 64, "uratio": 7}], (64, 448)),
        ([{"total_batch": 128, "ratio": 1}, {"batch_size": 8}], (8, 8)),
        ([{"batch_size": 64, "uratio": 7}, {"total_batch": 64}], (8, 56)),
        ([{"batch_size": 10, "uratio": 1.5}], (10, 15)),
    ],
)
def test_batch_composition(layers, expected):
    assert batch_composition([Layer(str(i), v) for i, v in enumerate(layers)]) == expected


def test_a_run_is_deleted_or_gone_on_with():
    with pytest.raises(ConfigError, match="overwrite: .*--resume"):
        load_settings(None, overwrite=True, resume="yes")
    assert not load_settings(None, overwrite=True, resume="auto").settings.overwrite  # as in USB


def test_contradicting_batch_settings_are_refused():
    with pytest.raises(ConfigError, match=r"batch_size 10\b.*total_batch 128\b"):
        batch_composition([Layer("f", {"batch_size": 10, "total_batch": 128})])
    with pytest.raises(ConfigError, match=r"\bratio 1\b.*uratio 2\b"):
        batch_composition([Layer("f", {"ratio": 1, "uratio": 2})])
    with pytest.raises(ConfigError, match=r"\b0 labelled.*\b4 unlabelled"):
        batch_composition([Layer("f", {"total_batch": 4, "ratio": 100})])


def test_usb_files_keep_working(tmp_path):
    (tmp_path / "usb.yaml").write_text(
        "algorithm: fixmatch\nresume: True\noverwrite: True\nuratio: 7\nbatch_size: 64\nclip: 0.0\nworld_size: 1\n"
        "num_labels: 40\ndataset: cifar10\ngpu: None\namp: False\nnum_train_iter: 1048576\nepoch: 1024\n"
    )
    resolved = load_settings(tmp_path / "usb.yaml")
    s = resolved.settings
    assert (s.batch_size, s.total_batch, s.resume, s.overwrite, s.device) == (64, 512, "auto", False, "auto")
    assert any(re.search(r"\bclip\b", n) for n in resolved.notices)


NUMBERS = [(a.name, x) for a in base_algorithms().values() for x in a.arguments if x.type is not bool]


def test_every_number_of_an_algorithm_has_bounds_that_its_default_keeps():
    assert [(name, x.name) for name, x in NUMBERS if not x.bounds] == []
    for name in base_algorithms():
        assert settings_model(name).model_validate({"algorithm": name})  # defaults are validated


@pytest.mark.parametrize(
    ("algorithm", "setting", "values"),
    [
        ("fixmatch", "p_cutoff", ("95", "-1", "1.01", "nan", "inf")),
        ("muscle_fixmatch", "p_cutoff", ("95",)),
        ("freematch", "ema_p", ("1.5", "1", "-0.1")),
        ("freematch", "T", ("0", "-1", "nan", "inf")),
        ("softmatch", "n_sigma", ("0", "-2", "1.5")),
        ("comatch", "proj_size", ("0", "-1", "9007199254740992")),
        ("comatch", "queue_batch", ("0", "-1")),
        ("simmatch", "da_len", ("0", "-1")),
        ("dash", "gamma", ("0", "0.5")),
        ("dash", "num_wu_eval_iter", ("0",)),
        ("dash", "num_wu_iter", ("-1",)),
        ("pimodel", "unsup_warm_up", ("0", "40", "-0.4")),
        ("uda", "tsa_schedule", ("quadratic",)),
        ("labelprop", "lp_start", ("1.5", "-0.5", "nan")),
        ("labelprop", "lp_k", ("-1",)),
        ("labelprop", "lp_method", ("mbo",)),
        ("muscle_labelprop", "lp_affinity", ("knn",)),
        (
            "labelprop",
            "lp_class_mass",
            ("even", "0.5,0.5", "0,0,0,0,0,0,0,0,0,0", "nan,1,1,1,1,1,1,1,1,1", "1,-1,1,1,1,1,1,1,1,1"),
        ),
        ("labelprop", "lp_alpha", ("0", "1")),
        ("meanteacher_original", "consistency_rampup", ("-1",)),
        ("contrastive", "temperature", ("0",)),
        ("softmatch", "per_class", ("true",)),
        ("vat", "vat_embed", ("true",)),
        ("fixmatch", "momentum", ("0",)),
        ("fixmatch", "num_warmup_iter", ("5 --lr_schedule cosine",)),
    ],
)
def test_values_with_which_no_algorithm_can_train_are_one_line(algorithm, setting, values, capsys):
    for value in values:
        words = f"train fixmatch_digits_10 --algorithm {algorithm} --{setting} {value}".split()
        assert main(words) == 2
        assert re.fullmatch(rf"error: --{setting}: .*\n", capsys.readouterr().err), value


@pytest.mark.parametrize(("algorithm", "argument"), [(n, x) for n, x in NUMBERS if x.type is float])
def test_no_number_of_an_algorithm_is_infinite_or_none(algorithm, argument):
    for value in (math.nan, math.inf, -math.inf, "nan"):
        (fault,) = faults(algorithm=algorithm, epoch=10, **{argument.name: value})
        assert re.match(f"--{argument.name}: input should be .*, got ", fault)


def test_the_catalogue_is_what_usb_registers():
    from semilearn.core.utils import ALGORITHMS

    import muscle_plugin.register  # noqa: F401

    assert set(all_algorithms()) == set(ALGORITHMS.keys()) - set(NOT_HOSTED)
    for name, entry in (usb_algorithms() | muscle_algorithms()).items():
        live = {a.name.lstrip("-"): a.default for a in ALGORITHMS[name].get_argument()}
        ours = {a.name: a.default for a in entry.arguments}
        assert ours.items() <= live.items()
        settings = settings_model(name)()
        assert all(getattr(settings, n) == v for n, v in live.items())


def test_usb_classes_without_an_unlabelled_weak_view_have_no_muscle_form():
    assert set(usb_algorithms()) - {n.removeprefix("muscle_") for n in muscle_algorithms()} == {
        "supervised",
        "fullysupervised",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["--help"], ["--lrr", "1"], ["--c", "benchmark_configs/muscle_digits_10.yaml", "--print-config"]]
)
def test_answers_without_loading_torch(words):
    code = (
        "import sys; from muscle_plugin.cli import run_command\n"
        "try: run_command('train', sys.argv[1:], 'train.py')\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'semilearn', 'numpy'} & set(sys.modules), 'a heavy module was loaded'"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_what_is_there_already_is_refused_without_loading_torch(tmp_path):
    run = tmp_path / "runs" / "r"
    run.mkdir(parents=True)
    settings = {"save_dir": str(run.parent), "save_name": "r", "num_train_iter": 6}
    (run / "config.yaml").write_text(load_settings("muscle_digits_10", epoch=1, **settings).to_yaml())
    (run / "result.json").write_text('{"steps": 6, "num_train_iter": 6, "complete": true}')
    (run / "latest_model.pth").write_bytes(b"")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "picture.png").write_bytes(b"")
    train = ["train", "muscle_digits_10", "--epoch", 1, *(w for k, v in settings.items() for w in (f"--{k}", v))]
    of_net = ["--checkpoint", run, "--out", tmp_path / "other"]
    expected = {
        rf"{run} .*\b6 of 6\b.*--overwrite": train,
        rf"{run}: .*\blr .*0\.05, .*0\.5\b": [*train, "--lr", 0.5, "--resume"],
        f"{tmp_path / 'other'} .*files.*--overwrite": [*train, "--save_dir", tmp_path, "-sn", "other"],
        f"{tmp_path / 'other'} .*run directory": [*train, "--save_dir", tmp_path, "-sn", "other", "-o"],
        f"{tmp_path / 'no' / 'latest_model.pth'}: .*no checkpoint": [
            *train, "--save_dir", tmp_path, "-sn", "no", "--resume",
        ],
        f"{tmp_path / 'other'}: .*--overwrite": ["predict", *of_net, "--images", tmp_path],
        f"{tmp_path / 'other'}: (?!.*--overwrite)": ["export", *of_net],
    }  # fmt: skip
    code = (
        "import json, sys; from muscle_plugin.cli import main\n"
        "assert [main(words) for words in json.loads(sys.argv[1])] == [2] * 7\n"
        "assert not {'torch', 'semilearn', 'numpy'} & set(sys.modules), 'a heavy module was loaded'"
    )
    words = json.dumps([list(map(str, x)) for x in expected.values()])
    done = subprocess.run([sys.executable, "-c", code, words], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    for said, wanted in zip(done.stderr.splitlines(), expected, strict=True):
        assert re.match(f"error: {wanted}", said)


def test_exit_status_and_stderr():
    done = command("--lrr", 1, "--epoch", -1)
    assert done.returncode == 2
    first, second = done.stderr.splitlines()
    assert re.match("error: --lrr .*'lr'", first)
    assert re.match(r"error: --epoch: .*\b1, .*'-1'", second)
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", "5"], r"fixmatch .*digits .*small_cnn \(.*: algorithm, dataset, net\)"),
        (["--net", "cnn13", "-alg", "muscle"], r"muscle .*digits .*cnn13 \([^,]*: dataset\)"),
        (["-alg", "muscle", "-ds", "digits"], None),
        (["muscle_digits_10"], None),
    ],
)
def test_what_trains_where_no_configuration_is_named(words, said, capsys):
    assert main(["train", *words, "--print-config"]) == 0
    assert re.fullmatch(f"note: .*{said}.*\n" if said else "", capsys.readouterr().err)


def test_print_config_prints_yaml_that_reads_back(tmp_path):
    done = command("--c", "benchmark_configs/muscle_fixmatch_digits_10.yaml", "--print-config", "--seed", 5)
    (tmp_path / "c.yaml").write_text(done.stdout)
    assert load_settings(tmp_path / "c.yaml").settings.seed == 5


def test_notices_for_what_was_not_taken_as_given():
    assert any(re.search(r"ratio 2\.5 .*2\.556", n) for n in load_settings(None, ratio="2.5", total_batch=96).notices)
    assert any("load_path" in n for n in load_settings(None, load_path="x").notices)
    assert load_settings(None, ratio=3, total_batch=96).notices == ()


#: Settings that change nothing as the others stand.
IDLE_CASES = [
    ({"optim": "AdamW", "lr": 0.001}, {"momentum": 0.5}),
    ({"weight_decay": 0}, {"decay_all": True}),
    ({}, {"init_head": True}),
    ({}, {"load_path": "x"}),
    ({}, {"head": "mlp", "view_pool": "none"}),
    ({}, {"normalise": "data"}),
    ({}, {"net_size": 16}),
    ({"data_on": "device"}, {"num_workers": 0}),
    ({}, {"cache_dir": "x"}),
    ({"device": "cpu"}, {"deterministic": False}),
    ({"split_file": "split.npy", "num_labels": None}, {"split_seed": 5}),
    ({"algorithm": "supervised"}, {"hard_augment": "crop"}),
    ({"algorithm": "labelprop", "epoch": 2}, {"use_cat": False}),
    ({"algorithm": "contrastive"}, {"ulb_loss_ratio": 0.5}),
    (
        {"algorithm": "muscle_fixmatch", "mi_weight": 0},
        {"hard_views": 2, "mi_labelled": False, "mi_batch_norm": "separate"},
    ),
    ({"algorithm": "fixmatch", "hard_label": False}, {"T": 0.1}),
    ({"algorithm": "softmatch"}, {"T": 0.1}),
    ({"algorithm": "freematch"}, {"T": 0.1}),
    ({"algorithm": "comatch"}, {"hard_label": False, "smoothing_alpha": 0.5}),
    ({"algorithm": "simmatch"}, {"K": 7, "in_loss_ratio": 0.5, "smoothing_alpha": 0.5}),
    ({"algorithm": "softmatch"}, {"dist_align": False}),
    ({"algorithm": "pseudolabel", "ulb_loss_ratio": 0}, {"unsup_warm_up": 0.1}),
    ({"algorithm": "comatch", "contrast_loss_ratio": 0}, {"contrast_p_cutoff": 0.1}),
    ({"algorithm": "contrastive", "contrastive_weight": 0}, {"temperature": 0.1}),
    ({"algorithm": "meanteacher_original", "consistency": 0}, {"consistency_rampup": 1, "logit_distance": 1.0}),
    (
        {"algorithm": "labelprop", "lp_start": 1},
        {
            "lp_method": "poisson_mbo",
            "lp_class_mass": "none",
            "lp_k": 2,
            "lp_affinity": "local_scaling",
            "lp_alpha": 0.5,
            "lp_max_iter": 2,
            "lp_tol": 0.1,
        },
    ),
    ({"algorithm": "labelprop", "lp_start": 1}, {"lp_gamma": 1}),
    ({"algorithm": "labelprop", "lp_affinity": "local_scaling", "epoch": 2}, {"lp_gamma": 1}),
]


@pytest.mark.parametrize(("others", "idle"), IDLE_CASES)
def test_a_setting_without_effect_brings_a_notice(others, idle):
    found = load_settings(None, **others, **idle).notices
    assert [n.partition(" has no effect: ")[0] for n in found] == [f"--{k}" for k in sorted(idle, key=place_in_table)]
    assert load_settings(None, **others).notices == ()


def test_features_kept_in_files_make_use_of_a_folder_for_them():
    assert load_settings(None, tune="head", init_from="r", cache_dir="x").notices == ()
    assert len(load_settings(None, tune="head", init_from="r", cache_dir="x", view_pool="none").notices) == 1


def test_a_net_that_does_not_say_how_it_was_trained_is_refused_before_loading():
    with pytest.raises(ConfigError, match="--normalise: .*timm and torchvision.* wrn_28_2 needs data"):
        load_settings(None, net="wrn_28_2", normalise="net")


def place_in_table(setting):
    return " ".join(names for names, *_ in IDLE).split().index(setting)


@pytest.mark.slow
@pytest.mark.parametrize(("others", "idle"), [*IDLE_CASES, ({"algorithm": "fixmatch"}, {"hard_label": False})])
def test_a_setting_with_that_notice_changes_no_weight(others, idle, short_run, tmp_path):
    """The last case has an effect, which these runs show: every image passes the threshold."""
    np.save(tmp_path / "split.npy", np.array([int(np.flatnonzero(digits_labels() == c)[0]) for c in range(10)]))
    if "split_file" in others:
        others = others | {"split_file": str(tmp_path / "split.npy")}
    short = {"num_train_iter": 3, "epoch": 1, **others}
    if others.get("algorithm") in owners("p_cutoff"):
        short["p_cutoff"] = 0
    short_run(save_name="a", **short)
    short_run(save_name="b", **short, **idle)
    nets = [load_tensors(tmp_path / name / "latest_model.pth")["ema_model"] for name in "ab"]
    has_effect = idle == {"hard_label": False}
    assert all(torch.equal(v, nets[1][k]) for k, v in nets[0].items()) != has_effect


def digits_labels():
    from muscle_plugin.data.load import load_data

    return load_data(load_settings(None).settings).train_labels.numpy()


def test_notices_are_for_what_the_user_gave(tmp_path, capsys):
    """Not for a configuration of this package, nor for a default that is spelled out."""
    assert load_settings("fixmatch_digits_10", optim="AdamW", data_on="device").notices == ()
    assert load_settings("usb_cv/fixmatch_cifar100_200", use_pretrain=False).notices == ()
    assert load_settings(None, optim="AdamW", momentum=0.9, num_workers=2, data_on="device").notices == ()
    assert load_settings(None, algorithm="supervised", hard_augment="digits_hard").notices == ()
    of_usb_alone = Namespace(algorithm="elsewhere", dataset="digits", ulb_loss_ratio=0.5, use_cat=False)
    assert from_namespace(of_usb_alone).notices == ()
    (tmp_path / "mine.yaml").write_text("optim: AdamW\nmomentum: 0.5\n")
    assert main(["train", str(tmp_path / "mine.yaml"), "-alg", "fixmatch", "-ds", "digits", "--print-config"]) == 0
    assert capsys.readouterr().err == "note: mine.yaml: momentum has no effect: only optim SGD uses it\n"


def test_a_path_of_pretrained_weights_means_to_use_them(tmp_path, capsys):
    words = ["train", "fixmatch_digits_10", "--net", "wrn_28_2", "--pretrain_path", "mine.pth"]
    assert main([*words, "--print-config"]) == 0
    assert "use_pretrain: true\n" in capsys.readouterr().out
    assert main([*words, "--use_pretrain", "false", "--print-config"]) == 0
    assert "note: --pretrain_path has no effect: use_pretrain is false\n" in capsys.readouterr().err
    (tmp_path / "off.yaml").write_text("use_pretrain: false\n")
    (tmp_path / "both.yaml").write_text(
        "use_pretrain: false\npretrain_path: other.pth\n"
    )  # USB's way to leave them out
    assert load_settings(tmp_path / "off.yaml", pretrain_path="mine.pth").settings.use_pretrain
    assert not load_settings("usb_cv/fixmatch_cifar100_200", use_pretrain="false").settings.use_pretrain
    both = load_settings(tmp_path / "both.yaml")
    assert not both.settings.use_pretrain
    assert both.notices == ("both.yaml: pretrain_path has no effect: use_pretrain is false",)


def test_the_table_of_settings_without_effect_is_what_the_classes_do():
    from muscle_plugin.algorithms.compose import algorithm_class

    modules = ("semilearn.algorithms", "muscle_plugin.algorithms.")
    for name, entry in base_algorithms().items():
        classes = [c for c in algorithm_class(name).__mro__[1:] if c.__module__.startswith(modules)]
        source = "".join(map(inspect.getsource, classes))
        assert ("self.lambda_u" not in source) == (name in NO_ULB_LOSS_RATIO), name
        assert ("self.use_cat" not in source) == (name in NO_USE_CAT), name
        strengths = {v.strength for v in views_of(entry.views, name).values()}
        assert (STRONG not in strengths) == (name in NO_STRONG_VIEW), name
        # of pseudo-labels made of probabilities (softmax=False) PseudoLabelingHook does not use T
        sharpened = source.count("T=self.T") - len(re.findall(r"T=self\.T,\s+softmax=False", source))
        otherwise = re.search(r"/ self\.T|T=self\.T\)", source)
        has_t = any(a.name == "T" for a in entry.arguments)
        assert (has_t and not sharpened and not otherwise) == (name in NO_SHARPENING), name


def test_no_arguments_ask_for_some():
    done = command()
    assert done.returncode == 2
    assert "train.py muscle_fixmatch_digits_10" in done.stderr


def test_values_from_a_namespace_with_none_are_kept():
    assert resolve([Layer("file", {"gpu": "None", "algorithm": "fixmatch"})]).settings.gpu is None


def test_the_ratio_that_was_given_last_is_the_one_compared(tmp_path):
    (tmp_path / "a.yaml").write_text("total_batch: 96\nratio: 3\n")
    assert not load_settings(tmp_path / "a.yaml", batch_size=4, uratio=1).notices
    (notice,) = load_settings(tmp_path / "a.yaml", total_batch=10, uratio=2).notices
    assert re.match(r"ratio 2 .*2\.333", notice)


def test_a_home_directory_is_the_same_for_every_command():
    resolved = load_settings(save_dir="~/runs", data_dir="~/data")
    assert resolved.run_dir.parent == Path.home() / "runs"
    assert resolved.settings.data_dir == str(Path.home() / "data")
    (fault,) = faults(save_dir="~no_such_user/runs")
    assert fault == "--save_dir: there is no such user, got '~no_such_user/runs'"
