"""Algorithms, data sets and nets of one's own: what they may be, how faults are said, and when their code runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT
from PIL import Image
from plugin_fixture import plugins_forgotten  # noqa: F401
from torch import nn

from muscle_plugin.cli import main
from muscle_plugin.data import views
from muscle_plugin.data.datasets import load_source
from muscle_plugin.data.source import SourceOptions
from muscle_plugin.errors import ConfigError, DataError
from muscle_plugin.extend import Images, PluginError, USBNet, dataset, load, net
from muscle_plugin.nets.foreign import plugged_net
from muscle_plugin.registry.names import STEP_PARAMETERS
from muscle_plugin.registry.plugins import located
from muscle_plugin.settings.resolve import load_settings, resolve
from muscle_plugin.settings.sources import read_yaml

pytestmark = pytest.mark.usefixtures("plugins_forgotten")

ALGORITHM = """
import torch
from semilearn.algorithms.utils import SSL_Argument, str2bool
from semilearn.core import AlgorithmBase
from semilearn.core.utils import ALGORITHMS


@ALGORITHMS.register("{name}")
class Own(AlgorithmBase):
    def __init__(self, args, net_builder, tb_log=None, logger=None):
        super().__init__(args, net_builder, tb_log, logger)
        self.strength = args.strength
        self.seen = torch.zeros(3)  # state of its own
        self.losses = []

    def train_step(self, {views}):
        out = self.model(torch.cat([x_lb, x_ulb_s]))
        sup = self.ce_loss(out["logits"][: len(y_lb)], y_lb, reduction="mean")
        hard = out["logits"][len(y_lb) :]
        loss = sup + self.strength * (hard.softmax(1) ** 2).sum(1).mean() * self.seen.mean()
        self.seen = 0.9 * self.seen + sup.detach()
        self.losses = [*self.losses, float(sup)][-2:]
        feat = {{"x_lb": out["feat"][: len(y_lb)]}}
        log = self.process_log_dict(sup_loss=sum(self.losses), total_loss=loss.item())
        return self.process_out_dict(loss=loss, feat=feat), log

    @staticmethod
    def get_argument():
        return [{argument}]
"""
VIEWS, ARGUMENT = "x_lb, y_lb, x_ulb_w, x_ulb_s", 'SSL_Argument("--strength", float, 1, "its weight")'


def own_algorithm(path, name="own", views=VIEWS, argument=ARGUMENT, more=""):
    path.write_text(ALGORITHM.format(name=name, views=views, argument=argument) + more)
    return str(path)


def fault(call):
    """The one line of the error that a call raises."""
    with pytest.raises((PluginError, ConfigError, DataError, ValueError)) as e:
        call()
    (line,) = str(e.value).splitlines()
    assert line.isprintable()
    return line


# ------------------------------------------------------------------------------------------------------------ algorithms


@pytest.mark.parametrize("name", ["own", "muscle_own"])
def test_an_algorithm_with_state_of_its_own_resumes_bit_for_bit(whole_and_resumed, tmp_path, name):
    plugin = own_algorithm(tmp_path / "own.py")
    whole, resumed = whole_and_resumed(algorithm=name, plugins=plugin, num_train_iter=4, num_eval_iter=2, strength=0.5)
    saved = whole["algorithm"]
    assert saved["seen"].sum() > 0
    assert saved["losses"] == resumed["algorithm"]["losses"]
    about = json.loads((tmp_path / "resumed" / "environment.json").read_text())
    assert list(about["plugins"]) == [plugin]


def test_labelled_images_of_a_step_that_asks_for_none_are_paired_with_their_own_views(build_short, tmp_path):
    step = """
class Unlabelled(Own):
    def train_step(self, x_ulb_w, x_ulb_s):
        p, q = (self.model(x)["logits"].softmax(1) for x in (x_ulb_w, x_ulb_s))
        return self.process_out_dict(loss=((p - q) ** 2).mean()), {}

ALGORITHMS["unlabelled"] = Unlabelled
"""
    plugin = own_algorithm(tmp_path / "own.py", more=step)
    algorithm = build_short(algorithm="muscle_unlabelled", plugins=plugin, total_batch=12, ratio=2.0, strength=1.0)
    algorithm.epoch = 0
    algorithm.model.train()
    algorithm.call_hook("before_run")
    algorithm.prepare_steps()
    batch, seen = algorithm.batches.batch(0), []
    algorithm.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    _, log = algorithm.train_step(**algorithm.process_batch(**batch))
    assert algorithm.plan.weak == {"labelled": "x_lb", "unlabelled": "x_ulb_w"}
    riders = torch.cat([batch[n] for n in ("x_lb", "x_lb_h", "x_ulb_h")])
    assert torch.equal(seen[-1], riders)
    assert log["train/mi"].isfinite()


def test_its_arguments_are_settings(tmp_path, capsys):
    plugin = own_algorithm(tmp_path / "own.py")
    words = ["train", "--plugins", plugin, "--algorithm", "muscle_own", "--print-config"]
    assert main([*words, "--strength", "0.25"]) == 0
    assert "strength: 0.25" in capsys.readouterr().out
    assert main([*words, "--strenght", "2"]) == 2
    assert "'strength'" in capsys.readouterr().err
    assert main([*words, "--strength", "much"]) == 2
    assert "error: --strength: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--plugins", plugin, "--help"])
    said = capsys.readouterr().out
    assert re.search(r"--strength X +its weight \(own\)", said)
    assert "--plugins" in said
    (tmp_path / "c.yaml").write_text("algorithm: own\nplugins: [own.py]\nstrength: 3\n")
    settings = load_settings(tmp_path / "c.yaml", plugins=True).settings
    assert (settings.strength, settings.plugins) == (3.0, (plugin,))


def test_the_registry_knows_every_view():
    assert views.VIEWS.keys() < set(STEP_PARAMETERS)


def test_an_algorithm_that_is_hosted_already_is_refused(tmp_path):
    more = "\nfrom muscle_plugin import Host\n\n\n@ALGORITHMS.register('twice')\nclass Twice(Host, Own):\n    pass\n"
    line = fault(lambda: load(own_algorithm(tmp_path / "own.py", more=more)))
    assert re.search("algorithm 'twice': .*Host", line)


def test_a_plugin_that_was_mended_has_the_settings_of_its_new_class(tmp_path):
    plugin = own_algorithm(tmp_path / "own.py", more="\n1 / 0\n")
    assert "ZeroDivisionError" in fault(lambda: load(plugin))
    load(own_algorithm(tmp_path / "own.py", argument='SSL_Argument("--force", int, 2)'))
    assert load_settings(algorithm="own").settings.force == 2


def test_usb_itself_knows_both_forms(tmp_path):
    from muscle_plugin.usb.names import ALGORITHMS

    load(own_algorithm(tmp_path / "own.py"))
    assert issubclass(ALGORITHMS["muscle_own"], ALGORITHMS["own"])


@pytest.mark.parametrize(
    ("given", "message"),
    [({"name": "fixmatch"}, "algorithm 'fixmatch': .*name"),
     ({"name": "labelprop"}, "algorithm 'labelprop': .*name"),
     ({"name": "muscle_own"}, "algorithm 'muscle_own': .*muscle_<name>"),
     ({"name": "my own"}, "algorithm 'my own': .*letters, digits and _"),
     ({"views": "x_lb, y_lb, x_ulb_s, x_wild"}, "algorithm 'own': .*train_step .*x_wild"),
     ({"views": "x_lb, y_lb, x_ulb_s, **kw"}, r"algorithm 'own': .*train_step .*\*\*kw.* view"),
     ({"views": "x_lb, y_lb, x_ulb_s, /"}, "algorithm 'own': .*train_step .*x_lb.* one by one"),
     ({"views": "*x_lb"}, r"algorithm 'own': .*train_step .*\*x_lb.* one by one"),
     ({"argument": 'SSL_Argument("--mi_weight", float, 1.0)'}, "algorithm 'own': .*--mi_weight .*MUSCLE"),
     ({"argument": 'SSL_Argument("--strength", list, [])'}, "algorithm 'own': .*--strength: .*int, float, str or str2bool"),
     ({"argument": 'SSL_Argument("--strength", int, 0.5)'}, r"--strength: .*default .*'int'.*0\.5"),
     ({"argument": '"--strength"'}, "get_argument .*SSL_Argument.*'--strength'"),
     ({"more": "\nALGORITHMS['thing'] = print\n"}, "algorithm 'thing': .*AlgorithmBase"),
     ({"more": "\n@ALGORITHMS.register('bare')\nclass Bare(AlgorithmBase):\n    pass\n"}, "algorithm 'bare': .*train_step")],
)  # fmt: skip
def test_an_algorithm_that_cannot_be_hosted_is_one_line(tmp_path, given, message):
    from muscle_plugin.usb.names import ALGORITHMS

    stock = ALGORITHMS["fixmatch"]
    line = fault(lambda: load(own_algorithm(tmp_path / "own.py", **given)))
    assert re.search(message, line)
    assert "own.py" in line or "print" in line
    assert ALGORITHMS["fixmatch"] is stock
    load_settings(algorithm="muscle_fixmatch")


# --------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    ("text", "message"),
    [("import no_such_thing", r"p\.py line 1: ModuleNotFoundError: No module named 'no_such_thing'"),
     ("x = 1\nraise RuntimeError('two\\nlines')", r"p\.py line 2: RuntimeError: two$"),
     ("x = (\n", r"p\.py line 1: SyntaxError: '\(' was never closed"),
     ("import sys\nsys.exit(3)", r"p\.py line 2: SystemExit: 3")],
)  # fmt: skip
def test_a_plugin_that_fails_is_one_line_with_its_place(tmp_path, capsys, text, message):
    (tmp_path / "p.py").write_text(text)
    assert main(["train", "--plugins", str(tmp_path / "p.py"), "--algorithm", "fixmatch"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


def test_what_a_failing_plugin_registered_is_forgotten_and_may_come_again(tmp_path):
    text = own_dataset("twice")
    (tmp_path / "p.py").write_text(text + "\n1 / 0\n")
    assert "ZeroDivisionError" in fault(lambda: load(tmp_path / "p.py"))
    assert "'twice'" in fault(lambda: load_settings(dataset="twice"))
    (tmp_path / "p.py").write_text(text)
    load(tmp_path / "p.py")
    assert load_settings(dataset="twice").settings.img_size == 16


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--plugins", "none.py"], "--plugins: {}/none.py: "),
     (["--plugins", "no_such_module"], "--plugins: no_such_module: .*module"),
     (["--plugins", "no_such.module"], "--plugins: no_such.module: .*module"),
     (["--plugins", "here"], "--plugins: here: .*module.* [.]py"),
     (["--plugins", "a-b"], "--plugins: a-b .*[.]py.* module"),
     (["--plugins", "c.txt/"], "c.txt/ .*[.]py.* module"),
     (["--algorithm", "mine"], "--algorithm: .*'mine' .*--plugins FILE"),
     (["--dataset", "xyz"], "--dataset: .*'xyz' .*--plugins FILE")],
)  # fmt: skip
def test_a_plugin_that_is_not_there_is_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.py").write_text("")
    assert main(["train", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message.format(tmp_path), line)


def test_a_module_that_can_be_imported_will_do(tmp_path, monkeypatch):
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text(own_dataset("packaged"))
    monkeypatch.syspath_prepend(tmp_path)
    assert load_settings(plugins="own_package", dataset="packaged").settings.plugins == ("own_package",)


def test_where_names_are_looked_up(tmp_path):
    assert located("a.py, b.c ,", "/x") == ("/x/a.py", "b.c")
    assert located(["a,b.py", "/y/a.py", "/y/../y/a.py"], "/x") == ("/x/a,b.py", "/y/a.py")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "base.yaml").write_text("plugins: p.py\n")
    (tmp_path / "c.yaml").write_text("extends: below/base.yaml\n")
    assert read_yaml(tmp_path / "c.yaml")[0].values["plugins"] == (str(tmp_path / "below" / "p.py"),)
    (tmp_path / "d.yaml").write_text("plugins: {a: b}\n")
    assert "d.yaml: plugins: " in fault(lambda: load_settings(tmp_path / "d.yaml"))


def test_a_plugin_that_changed_is_said_on_resuming(short_run, tmp_path, capsys):
    from muscle_plugin.runs.environment import changes

    (tmp_path / "p.py").write_text(own_dataset("changing"))
    settings = {"save_name": "r", "plugins": str(tmp_path / "p.py"), "num_train_iter": 4, "algorithm": "supervised"}
    short_run(**settings)
    now = json.loads((tmp_path / "r" / "environment.json").read_text())
    (name,) = now["plugins"]
    assert changes(now, now) == []
    (said,) = changes(now, now | {"plugins": {name: "0"}})
    assert said.startswith(f"plugin {name} ")


# -------------------------------------------------------------------------------------------------------------- security


@pytest.fixture
def mark(tmp_path):
    """A plugin whose import leaves a file; the test says whether it may."""
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n")
    return tmp_path / "evil.ran"


def test_a_configuration_runs_no_code_by_itself(tmp_path, mark, capsys):
    (tmp_path / "stranger.yaml").write_text("plugins: evil.py\nnum_train_iter: 1\n")
    (tmp_path / "more.yaml").write_text("extends: stranger.yaml\n")
    for command in (["train", "--c"], ["data", "show", "--c"], ["sweep"]):
        for file in ("stranger.yaml", "more.yaml"):
            for more in (
                [],
                ["--print-config"] if command[0] == "train" else [],
                ["--c", str(tmp_path / file), "--help"],
            ):
                if more[-1:] == ["--help"]:
                    with pytest.raises(SystemExit):
                        main([*command, str(tmp_path / file), *more])
                    continue
                assert main([*command, str(tmp_path / file), *more]) == 2
                assert re.search(r"plugins: .*evil\.py.*--plugins", capsys.readouterr().err)
    assert not mark.exists()
    assert main(["train", "--c", str(tmp_path / "stranger.yaml"), "--print-config", "--plugins"]) == 0
    assert mark.exists()


def test_only_what_the_command_line_names_is_run(tmp_path, mark):
    (tmp_path / "good.py").write_text(own_dataset("good"))
    (tmp_path / "stranger.yaml").write_text("plugins: evil.py\n")
    settings = load_settings(tmp_path / "stranger.yaml", plugins=str(tmp_path / "good.py")).settings
    assert settings.plugins == (str(tmp_path / "good.py"),)
    assert not mark.exists()


def test_a_run_folder_runs_no_code(short_run, tmp_path, mark, capsys):
    """``predict``, ``report``, ``--resume``, ``--init_from`` and a sweep's look at what is there."""
    short_run(save_name="r", algorithm="supervised")
    run = tmp_path / "r"
    text = (run / "config.yaml").read_text()
    assert "plugins: []" in text
    (run / "config.yaml").write_text(text.replace("plugins: []", f"plugins: [{tmp_path}/evil.py]"))
    environment = json.loads((run / "environment.json").read_text()) | {"plugins": {f"{tmp_path}/evil.py": "0"}}
    (run / "environment.json").write_text(json.dumps(environment))
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    words = ["--checkpoint", run, "--images", tmp_path / "a.png", "--out", tmp_path / "o.csv"]
    assert main(["predict", *map(str, words)]) == 0
    assert main(["report", str(run), "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000
    short_run(save_name="r", algorithm="supervised", resume="yes")
    short_run(save_name="s", algorithm="supervised", init_from=str(run))
    resolve(read_yaml(run / "config.yaml"))
    assert not mark.exists()
    capsys.readouterr()
    (run / "config.yaml").write_text(text.replace("plugins: []", f"plugins: [{tmp_path}/evil.py]"))
    assert main(["train", "--c", str(run / "config.yaml"), "--resume"]) == 2
    assert "config.yaml: plugins: " in capsys.readouterr().err
    assert not mark.exists()


def test_what_is_not_asked_for_costs_nothing():
    code = (
        "import sys, muscle_plugin.extend\n"
        "from muscle_plugin.settings.resolve import load_settings\n"
        "load_settings('muscle_digits_10')\n"
        "assert not {'torch', 'semilearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


# ------------------------------------------------------------------------------------------------------------- data sets


def own_dataset(name, body="Images(np.zeros((40, 1, 8, 8), 'uint8'), [0, 1] * 20, range(20, 40), ['a', 'b'])"):
    return (
        "import numpy as np\nfrom muscle_plugin.extend import Images, dataset\n\n\n"
        f"@dataset({name!r}, img_size=16, channels=1, num_labels=4)\ndef read(options):\n    return {body}\n"
    )


def returning(found, **settings):
    """What is made of a data set whose function returns ``found``."""
    dataset("mine", **{"img_size": 8, "channels": 1, **settings})(lambda options: found)
    return load_source("mine", SourceOptions(Path("."), 8))


IMAGES, LABELS, TEST, CLASSES = (
    np.full((6, 1, 8, 8), 7, np.uint8),
    [0, 1, 2, 0, -1, 1],
    [False] * 4 + [False, True],
    "abc",
)


def test_a_data_set_is_what_its_function_returned():
    for images, test in ((IMAGES, TEST), (torch.from_numpy(IMAGES), [5]), (IMAGES[:, :, ::-1], torch.tensor(TEST))):
        source = returning(Images(images, torch.tensor(LABELS), test, list(CLASSES)))
        assert torch.equal(source.images, torch.from_numpy(IMAGES))
        assert (source.labels.tolist(), source.train.tolist(), source.test.tolist()) == (LABELS, [0, 1, 2, 3, 4], [5])
        assert source.classes == ("a", "b", "c")
        from muscle_plugin.registry.names import DATASETS, PLUGIN_DATASETS

        del DATASETS["mine"], PLUGIN_DATASETS["mine"]


def test_a_data_set_may_be_a_list_of_files(tmp_path):
    for i in range(6):
        Image.new("RGB", (9 + i, 12), (i, 0, 0)).save(tmp_path / f"{i}.png")
    files = [f"{i}.png" for i in range(5)] + [tmp_path / "5.png"]
    dataset("files", img_size=8)(lambda options: Images(files, LABELS, TEST, list(CLASSES)))
    options = SourceOptions(tmp_path, 8, cache_dirs=[tmp_path / "cache"])
    source = load_source("files", options)
    assert source.images[:, 0, 4, 4].tolist() == [0, 1, 2, 3, 4, 5]
    assert source.name_of(5) == "5.png"
    (tmp_path / "3.png").write_text("x")
    (tmp_path / "4.png").unlink()
    line = fault(lambda: load_source("files", options))
    assert "data set 'files': 2 image" in line
    assert "3.png: " in line


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"images": IMAGES / 255.0}, r"images .*float64 \(6, 1, 8, 8\).*\(255 \* images\)\.round\(\)"),
     ({"images": IMAGES[:, 0]}, r"images .*uint8 .*\(N, 1, H, W\).*uint8 \(6, 8, 8\)"),
     ({"images": IMAGES.transpose(0, 2, 3, 1)}, r"images\.transpose\(0, 3, 1, 2\)"),
     ({"images": IMAGES.repeat(3, 1)}, r"uint8 \(6, 3, 8, 8\).*channels=3"),
     ({"images": IMAGES.repeat(2, 1)}, r"uint8 \(6, 2, 8, 8\)"), ({"images": IMAGES.astype(int)}, "images .*int64"),
     ({"images": 3}, r"images .*files.* int64 \(\)"), ({"images": ["a.png"]}, "channels=3"),
     ({"images": IMAGES[:0], "labels": [], "test": []}, "no image"),
     ({"labels": [0, 1, 3, 0, -2, 7]}, r"\b2 training .* 2: 3\b"),
     ({"labels": LABELS[:5]}, r"labels .*\b6 .*int64 \(5,\)"),
     ({"labels": [0.0, 1, 2, 0, 1, 1]}, r"labels .*\b6 .*float64 \(6,\)"),
     ({"labels": ["a"] * 6}, r"labels .*\b6 whole"), ({"labels": [[0], [1, 2]]}, "labels .*list"),
     ({"labels": [-1, -1, -1, -1, -1, 1]}, "no image .*label"),
     ({"test": [True] * 6, "labels": [0] * 6}, "no image .*label"),
     ({"test": [4]}, r"\b1 test .* 0: -1\b"),
     ({"test": [6]}, r"positions of the 6 images.*int64 \(1,\): \[6\]"),
     ({"test": [-1]}, r"positions of the 6 images.*: \[-1\]"), ({"test": [[1]]}, r"positions .*int64 \(1, 1\)"),
     ({"test": 3}, r"positions .*int64 \(\): 3"),
     ({"test": np.zeros(0, bool)}, r"positions .*bool \(0,\)"), ({"test": [None, "a"]}, r"positions .*object \(2,\)"),
     ({"test": [0, 0, 0, 0, 0, 1]}, r"\.astype\(bool\).*different positions.*: \[0 0 0 0 0 1\]"),
     ({"test": [False] * 4}, r"test .*\b6 .*bool.*\(4,\)"),
     ({"test": [0.5]}, r"test .*float64 \(1,\)"), ({"classes": "abc"}, "classes .*'abc'"),
     ({"classes": ["a", "a", "b"]}, "classes .*different"),
     ({"classes": ["a", "b"]}, r"\b1 training .* 2: 2\b"),
     ({"classes": [0, 1, 2]}, "classes .*different")],
)  # fmt: skip
def test_what_a_data_set_returns_wrongly_is_one_line_that_names_it(changed, message):
    found = Images(**{"images": IMAGES, "labels": LABELS, "test": TEST, "classes": list(CLASSES), **changed})
    line = fault(lambda: returning(found))
    assert re.search(message, line)
    assert line.startswith(f"{__file__}: data set 'mine': ")


def test_other_faults_of_a_data_set_are_one_line():
    assert re.search(r"\bdict\b.*images, labels, test, classes.*Images\(", fault(lambda: returning({})))

    @dataset("fails", img_size=8, num_classes=2)
    def fails(options):
        return {}["x"]

    line = fault(lambda: load_source("fails", SourceOptions(Path("."), 8)))
    assert re.match(rf"{re.escape(__file__)}: data set 'fails' line \d+: KeyError: 'x'", line)
    line = fault(lambda: load_settings(dataset="fails", num_labels=3))
    assert re.search(r"num_labels: 3 .*\b2 .*\bfails\b", line)
    for name, settings, message in (
        ("digits", {}, "data set 'digits': .*name"),
        ("fails", {}, f"{re.escape(__file__)} .*name"), ("no-name", {}, "data set 'no-name': .*letters, digits and _"),
        ("x", {"img_size": 2}, r"img_size .*\b4 .*\b1024, .*\b2\b"),
        ("x", {"channels": 2}, r"channels .*\b1 .*\b3, .*\b2\b"), ("x", {"num_labels": "4"}, "num_labels .*whole"),
    ):  # fmt: skip
        line = fault(lambda n=name, s=settings: dataset(n, **{"img_size": 8, **s})(lambda options: None))
        assert re.search(message, line)


# ------------------------------------------------------------------------------------------------------------------ nets


class Pair(nn.Module):
    """What ``forward`` returns is up to the test."""

    def __init__(self, out):
        super().__init__()
        self.linear, self.out = nn.Linear(256, 3), out

    def forward(self, x):
        return self.out(self, x.flatten(1))


def built(module, **settings):
    from muscle_plugin.registry.names import PLUGIN_NETS

    PLUGIN_NETS.pop("mine", None)
    net("mine")(lambda num_classes: module)
    return plugged_net("mine", **{"num_classes": 3, "in_channels": 1, "img_size": 16, **settings})


def test_a_plain_classifier_gets_usbs_calling_convention():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(256, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 3))
    images = torch.rand(5, 1, 16, 16)
    plain.eval()
    expected = plain(images)
    plain.train()
    before = torch.get_rng_state()
    whole = built(plain)
    assert torch.equal(torch.get_rng_state(), before)
    assert whole.training
    whole.eval()
    out = whole(images)
    assert torch.equal(out["logits"], expected)
    assert out["feat"].shape == (5, whole.num_features) == (5, 20)
    assert torch.equal(whole(whole(images, only_feat=True), only_fc=True), expected)
    assert len(list(whole.parameters())) == 4


def test_a_wrapped_net_has_layer_decay_and_batch_norm_without_weight_decay():
    from semilearn.core.utils import get_optimizer

    whole = built(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(784, 9), nn.Linear(9, 3))
    )
    groups = get_optimizer(whole, "SGD", 0.1, 0.9, 1e-3, 0.5).param_groups
    scale = {id(p): g["lr_scale"] if "lr_scale" in g else g["lr"] / 0.1 for g in groups for p in g["params"]}
    assert (
        scale[id(whole.backbone[0].weight)] < scale[id(whole.backbone[3].weight)] < scale[id(whole.classifier.weight)]
    )
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert decay[id(whole.backbone[1].weight)] == 0 < decay[id(whole.classifier.weight)]


def test_a_net_of_usbs_form_is_taken_as_it_is():
    class Mine(USBNet):
        def __init__(self):
            super().__init__(1)
            self.set_heads(256, 3)

        def features(self, x):
            return x.flatten(1)

    net = Mine()
    assert built(net) is net


@pytest.mark.parametrize(
    ("out", "message"),
    [(lambda m, x: {"logits": m.linear(x)}, r"forward .*'logits': \(2, 3\)}.*\('feat'\).*\(2, F\)"),
     (lambda m, x: {"feat": x}, r"forward .*'feat': \(2, 256\)}.*\('logits'\)"), (lambda m, x: (x, x), "forward .*tuple"),
     (lambda m, x: {"logits": m.linear(x)[:, :2], "feat": x}, r"'logits': \(2, 2\).*\b2 images.*'logits': \(2, 3\)"),
     (lambda m, x: {"logits": m.linear(x), "feat": x[None]}, r"'feat': \(1, 2, 256\).*\b2 images.*'feat': \(2, F\)"),
     (lambda m, x: {"logits": m.linear(x), "feat": x}, "unexpected .*'only_fc'.*only_feat=True .*only_fc=True"),
     (lambda m, x: m.linear(x)[:, :2], r"\(2, 2\) .*\b2 images.*\(2, 3\)"),
     (lambda m, x: m.linear(x).softmax(1), r"last nn\.Linear, linear\b.*softmax"),
     (lambda m, x: x[:, :3], r"last nn\.Linear"),
     (lambda m, x: m.linear(x[:, :9]), r"images .*\(2, 1, 16, 16\) line")],
)  # fmt: skip
def test_a_net_that_cannot_be_used_is_one_line_that_names_it(out, message):
    line = fault(lambda: built(Pair(out)))
    assert re.search(message, line)
    assert line.startswith(f"{__file__}: net 'mine'")


def test_other_faults_of_a_net_are_one_line(tmp_path, capsys):
    assert re.search(r"\bnn\.Module\b.* int\b", fault(lambda: built(3)))
    flat = nn.Sequential(nn.Flatten(), nn.LazyLinear(7), nn.Conv1d(1, 1, 5))
    line = fault(lambda: built(nn.Sequential(flat[0], nn.AdaptiveAvgPool1d(3))))
    assert re.search(r"expected .*nn\.Linear of 3 outputs", line)
    assert "pretrained" in fault(lambda: built(Pair(None), pretrained=True))
    for name, owner in (("small_cnn", "this package"), ("wrn_28_2", "USB"), ("mine", __file__)):
        assert re.search(f"net '{name}': {re.escape(owner)} .*name", fault(lambda n=name: net(n)(lambda: None)))
    settings = [f"--{k}={v}" for k, v in SHORT.items()]
    assert main(["train", *settings, "--net", "mine2", "--save_dir", str(tmp_path)]) == 2
    assert re.search("error: net: .*'mine2'.* 'mine'.*--plugins FILE", capsys.readouterr().err)


FLAT = """
from torch import nn
from muscle_plugin.extend import net


@net("flat")
def flat(num_classes, channels, img_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * img_size**2, num_classes))
"""


def test_predict_wants_the_net_and_nothing_else(short_run, tmp_path, monkeypatch, capsys):
    from muscle_plugin.registry import plugins
    from muscle_plugin.registry.names import PLUGIN_NETS

    monkeypatch.chdir(tmp_path)
    (tmp_path / "flat.py").write_text(FLAT)
    own_algorithm(tmp_path / "own.py")
    short_run(save_name="r", net="flat", algorithm="own", plugins="flat.py,own.py")
    (tmp_path / "own.py").unlink()
    PLUGIN_NETS.clear()  # as in another process
    plugins._loaded.clear()
    Image.new("L", (9, 9)).save("a.png")
    words = ["predict", "--checkpoint", "r", "--images", "a.png", "--out", "o.csv"]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search("net: .*'flat' .*--plugins FILE", line)
    assert main([*words, "--plugins", "flatt.py"]) == 2
    assert re.fullmatch(rf"error: --plugins: {tmp_path}/flatt\.py: .*\n", capsys.readouterr().err)
    assert main([*words, "--plugins", "flat.py"]) == 0
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize("register", [net("thing"), dataset("thing", img_size=8)])
def test_only_functions_can_be_registered(register):
    assert "a function is expected, got int" in fault(lambda: register(5))


def test_a_module_in_a_package_that_fails_is_one_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "failing_package").mkdir()
    (tmp_path / "failing_package" / "__init__.py").write_text("raise RuntimeError('no')")
    assert fault(lambda: load("failing_package.module")) == "failing_package.module: RuntimeError: no"
