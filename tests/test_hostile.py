"""What SECURITY.md promises of files from strangers: nothing in them runs, leaves its folder, or is larger than it looks."""

import codecs
import functools
import json
import os
import pickle
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import SHORT
from PIL import Image

from muscle_plugin import cli
from muscle_plugin.data.datasets.image_folder import image_folder
from muscle_plugin.data.images import decode, find_images
from muscle_plugin.data.source import SourceOptions
from muscle_plugin.data.splits import read_split
from muscle_plugin.errors import ConfigError, DataError, InputError, RunError
from muscle_plugin.files import load_tensors, save_tensors
from muscle_plugin.nets.foreign import torchvision_net
from muscle_plugin.settings.resolve import load_settings


class Runs:
    """Pickled, it is a call of ``os.system``."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.system, (f"touch '{self.mark}'",))


@pytest.fixture
def mark(tmp_path):
    """A file that appears if code has run; checked at the end of the test."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists()


# ---------------------------------------------------------------------------------------------------------- code in files


def test_yaml_builds_no_objects(tmp_path, mark):
    (tmp_path / "c.yaml").write_text(f"lr: !!python/object/apply:os.system ['touch {mark}']\n")
    with pytest.raises(ConfigError, match=r"c\.yaml line 1: .*constructor"):
        load_settings(tmp_path / "c.yaml")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [("a: &a [x]\nb: &b [*a, *a]\nlr: *b\n", "reference"),
     ("a: &a {lr: 1}\nb: &b {<<: [*a, *a]}\n<<: [*b, *b]\n", "reference"),
     ("lr: " + "[" * 100_000, "nested .*20 "), ("a: " + "{b: " * 50_000, "nested .*20 "),
     ("# " + "x" * 300_000, "256 KB")],
)  # fmt: skip
def test_small_yaml_cannot_become_large(text, message, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_settings(tmp_path / "c.yaml")


def test_extends_brings_in_a_bounded_number_of_files(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.yaml").write_text(f"extends: [{i + 1}.yaml, {i + 1}.yaml]\n")
    (tmp_path / "12.yaml").write_text("lr: 1\n")
    with pytest.raises(ConfigError, match=r"\b64 files"):
        load_settings(tmp_path / "0.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    with pytest.raises(ConfigError, match=r"loop\.yaml: "):
        load_settings(tmp_path / "loop.yaml")


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no such device")
def test_endless_files_are_refused():
    with pytest.raises(ConfigError, match="/dev/zero: .*256 KB"):
        load_settings("/dev/zero")


@pytest.mark.parametrize("where", ["load_tensors", "torchvision", "timm", "usb", "init_from"])
def test_no_checkpoint_runs_code(where, tmp_path, mark, build_short):
    from muscle_plugin.nets import build_net
    from muscle_plugin.nets.build import net_builder

    usb = net_builder("vit_tiny_patch2_32", False, 3, 32, {})
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": {"x": Runs(mark)}}, path)
    calls = {
        "load_tensors": lambda: load_tensors(path), "torchvision": lambda: torchvision_net("resnet18", 3, True, path),
        "timm": lambda: build_net("timm:resnet18", 3, 3, 32, pretrained=True, pretrained_path=path),
        "usb": lambda: usb(num_classes=3, pretrained=True, pretrained_path=path),
        "init_from": lambda: build_short(init_from=str(path)),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"evil\.pth: "):
        calls[where]()


def test_nobody_is_advised_to_load_what_could_run_code(tmp_path, mark):
    torch.save({"x": Runs(mark)}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth: .*plain data") as caught:
        load_tensors(tmp_path / "evil.pth")
    assert "weights_only" not in str(caught.value)


def test_weights_that_usb_fetches_are_read_without_code_too(monkeypatch, mark, tmp_path):
    from muscle_plugin.nets.build import net_builder
    from muscle_plugin.usb.names import nets

    def fetch(num_classes, pretrained, pretrained_path):
        return torch.load(tmp_path / "fetched.pth")  # as USB does, which leaves `weights_only` to torch

    torch.save(Runs(mark), tmp_path / "fetched.pth")
    monkeypatch.setattr(nets, "vit_tiny_patch2_32", fetch)
    build = net_builder("vit_tiny_patch2_32", False, 3, 32, {})
    with pytest.raises(ValueError, match=r"w\.pth: .*vit_tiny_patch2_32"):
        build(num_classes=3, pretrained=True, pretrained_path="https://example.org/w.pth")


def test_a_split_file_runs_no_code(tmp_path, mark):
    np.save(tmp_path / "i.npy", np.array([Runs(mark)], dtype=object), allow_pickle=True)
    with (tmp_path / "j.npy").open("wb") as f:
        pickle.dump(Runs(mark), f)
    for name in ("i.npy", "j.npy"):
        with pytest.raises(DataError, match=f"{name}: .*split"):
            read_split(tmp_path / name, None, False)


def test_a_compressed_checkpoint_is_refused_before_it_is_expanded(tmp_path):
    save_tensors(tmp_path / "c.pth", {"x": torch.zeros(50_000_000, dtype=torch.uint8)})
    with (
        zipfile.ZipFile(tmp_path / "c.pth") as whole,
        zipfile.ZipFile(tmp_path / "z.pth", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in whole.namelist():
            small.writestr(name, whole.read(name))
    assert (tmp_path / "z.pth").stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"z\.pth: .*compressed"):
        load_tensors(tmp_path / "z.pth")


class Doubled:
    """Pickled, it is a call that makes twice as many bytes of what it is given."""

    def __init__(self, content):
        self.content = content

    def __reduce__(self):
        return (codecs.encode, (self.content, "hex_codec"))


def references(depth):
    found = [0.5, 0.5]
    for _ in range(depth):
        found = [found, found]
    return found


def itself():
    found = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    ("content", "message"),
    [(functools.reduce(lambda content, _: Doubled(content), range(18), "a"), "encoded"),
     (torch.zeros(1).expand(10**10), "40,000,000,000 bytes"),
     (references(60), "[0-9,]{20,} objects"), (itself(), "itself")],
    ids=["codecs", "one number as a tensor", "lists of lists", "a list of itself"],
)  # fmt: skip
def test_a_small_checkpoint_cannot_become_large(content, message, tmp_path):
    torch.save({"x": content}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=rf"c\.pth: .*{message}"):
        load_tensors(tmp_path / "c.pth")
    torch.save({"x": [torch.zeros(40).expand(3, 40)] * 4, "y": references(3)}, tmp_path / "c.pth")
    assert load_tensors(tmp_path / "c.pth").keys() == {"x", "y"}


def test_a_checkpoint_whose_numbers_are_none_is_refused(build_short, tmp_path):
    algorithm = build_short(algorithm="supervised")
    algorithm.epoch = 0
    algorithm.save_model("c.pth", tmp_path)
    whole = load_tensors(tmp_path / "c.pth")
    monitor, process = whole["monitor"], whole["processes"][0]
    for name, value in [
        ("evaluations", ["a"]), ("evaluations", [float("nan")]), ("last_metrics", {"eval/x": "y"}), ("it", 1.5),
        ("train_seconds", float("inf")), ("monitor", {**monitor, "run": torch.zeros(7)}),
        ("monitor", {**monitor, "has_varied": "a"}), ("monitor", {**monitor, "last_line": {"step": "x"}}),
        ("processes", [{**process, "sums": {"x": "y"}}]), ("processes", [{**process, "sums": {"x": torch.zeros(2)}}]),
    ]:  # fmt: skip
        save_tensors(tmp_path / "c.pth", {**whole, name: value})
        with pytest.raises(InputError, match=r"c\.pth: .*(this run|whole)"):
            algorithm.load_model(tmp_path / "c.pth")
    save_tensors(tmp_path / "c.pth", whole)
    algorithm.load_model(tmp_path / "c.pth")


def test_links_in_a_run_lead_to_nothing_that_is_written(short_run, tmp_path):
    short_run(algorithm="supervised", save_name="r")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    for name in ("log.txt", "metrics.jsonl", "tensorboard", "../.r.lock"):
        link = tmp_path / "r" / name
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / ("folder" if name == "tensorboard" else "file"))
        with pytest.raises(RunError, match="is a link|cannot be created"):
            short_run(algorithm="supervised", save_name="r", resume="yes")
        link.unlink()
        assert (tmp_path / "file").read_text() == "kept"
        assert not list((tmp_path / "folder").iterdir())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_pipes_among_files_hold_nothing_up(make_run, tmp_path, capsys):
    for seed, name in enumerate(("config.yaml", "metrics.jsonl", "environment.json")):
        pipe = make_run("muscle_digits_10", seed) / name
        pipe.unlink()
        os.mkfifo(pipe)
    assert cli.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert "environment.json: " in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text(f"extends: '{pipe}'\n")
    with pytest.raises(ConfigError, match=r"environment\.json: "):
        load_settings(tmp_path / "c.yaml")


def test_a_checkpoint_cannot_put_other_paths_or_methods_in_place(short_run, tmp_path):
    short_run(algorithm="supervised", save_name="r")
    path = tmp_path / "r" / "latest_model.pth"
    content = torch.load(path, weights_only=True)
    for name, value in {
        "run_dir": "/tmp",
        "save_dir": "/tmp",
        "train_step": 1,
        "__class__": 1,
        "it": 1,
        "evaluations": 1,
        "args": {"dict": []},
    }.items():
        save_tensors(path, {**content, "algorithm": {**content["algorithm"], name: value}})
        with pytest.raises(InputError, match=rf"latest_model\.pth: .*\b\w+\.{name}\b"):
            short_run(algorithm="supervised", save_name="r", resume="yes")


@pytest.mark.parametrize("net", ["bert_base_uncased", "timm:hf-hub:nobody/nothing", "resnet", "__builtins__", "os"])
def test_a_checkpoint_names_no_net_that_would_be_fetched(net, short_run, tmp_path, capsys):
    path = tmp_path / "c.pth"
    about = {"classes": ["a", "b"], "img_size": 16, "channels": 1, "net_options": {}, "mean": [0.5], "std": [0.5]}
    torch.save({"images": about, "it": 1, "net": net, "net_from_name": False, "ema_model": {}}, path)
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    words = ["--checkpoint", path, "--images", tmp_path / "a.png", "--out", tmp_path / "o.csv", "--device", "cpu"]
    assert cli.main(["predict", *map(str, words)]) == 2
    assert f"{path}: its net" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------- images


def huge_png(side):
    """A PNG of side x side pixels in a few hundred bytes: its head says so, its pixels are missing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def folder_of(root, files):
    for kind in ("cat", "dog"):
        for i in range(3):
            path = root / "labelled" / kind / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i, 9, 9)).save(path)
    for name, content in files.items():
        path = root / "unlabelled" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


@pytest.mark.parametrize("side", [10_000, 50_000])  # Pillow warns of the one and refuses the other
def test_decompression_bombs_are_named_and_left_out_when_asked(side, tmp_path):
    root = folder_of(tmp_path, {"bomb.png": huge_png(side)})
    options = SourceOptions(root, 8, cache_dirs=[tmp_path / "cache"])
    with pytest.raises(DataError, match=r"bomb\.png: .*89,478,485 pixels.*--skip-bad-images"):
        image_folder(options)
    kept = image_folder(SourceOptions(root, 8, cache_dirs=[tmp_path / "cache"], skip_bad_images=True))
    assert len(kept.train) == 6


def test_postscript_and_what_is_no_file_are_not_opened(tmp_path):
    root = tmp_path
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n"
    (root / "x.eps").write_bytes(postscript)
    (root / "x.png").write_bytes(postscript)
    os.mkfifo(root / "pipe.png")
    (root / "device.png").symlink_to("/dev/zero")
    (root / "gone.png").symlink_to("nowhere.png")
    assert [p.name for p in find_images(root)] == ["device.png", "gone.png", "pipe.png", "x.png"]
    refused = {
        "x.png": "not an image",
        "pipe.png": "not a file",
        "device.png": "not a file",
        "gone.png": "No such file",
    }
    for name, message in refused.items():
        with pytest.raises(DataError, match=message):
            decode(root / name, 8)


@pytest.mark.parametrize("kind", ["file", "folder", "part"])
def test_links_out_of_the_folder_are_followed_only_when_allowed(kind, tmp_path):
    secret = tmp_path / "home" / "secret"
    secret.mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(secret / "s.png")
    root = folder_of(tmp_path / "data", {})
    places = {
        "file": ("labelled/cat/s.png", secret / "s.png"),
        "folder": ("labelled/eel", secret),
        "part": ("unlabelled", secret),
    }
    name, target = places[kind]
    (root / name).symlink_to(target)
    with pytest.raises(DataError, match=r"s\.png: a link .*--allow_outside true"):
        image_folder(SourceOptions(root, 8, cache_dirs=[tmp_path / "cache"]))
    source = image_folder(SourceOptions(root, 8, cache_dirs=[tmp_path / "cache"], allow_outside=True))
    assert len(source.train) == 7


@pytest.mark.parametrize("how", ["../home/s.png", "absolute"])
def test_a_table_names_files_outside_only_when_allowed(how, tmp_path):
    (tmp_path / "home").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "home" / "s.png")
    root = folder_of(tmp_path / "data", {})
    name = str(tmp_path / "home" / "s.png") if how == "absolute" else how
    (tmp_path / "t.csv").write_text(f"labelled/cat/0.png,cat\n{name},dog\n")
    with pytest.raises(DataError, match=r"line 2: .*s\.png.*--allow_outside true"):
        image_folder(SourceOptions(root, 8, labels_csv=tmp_path / "t.csv", cache_dirs=[tmp_path / "cache"]))
    source = image_folder(
        SourceOptions(root, 8, labels_csv=tmp_path / "t.csv", cache_dirs=[tmp_path / "cache"], allow_outside=True)
    )
    assert sorted(source.train_labels.tolist()) == [-1] * 5 + [0, 1]


# -------------------------------------------------------------------------------------------------------- what is written


def test_terminals_obey_no_name(tmp_path, capsys):
    assert cli.main(["train", "--dataset", "\x1b[2J\nerror: all is well", "--net\x07", "1"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 2
    assert all(line.isprintable() for line in said.splitlines())


def test_spreadsheets_compute_no_name(tmp_path, monkeypatch):
    from muscle_plugin.inference import predict

    names = ["=1+1.png", "-2.png", "ok.png", "@x.png", "caf\udce9.png"]
    (tmp_path / "in").mkdir()
    for n in names:
        (tmp_path / "in" / n).touch()

    class Fake:
        step, info = 1, SimpleNamespace(weights="averaged")

        def __init__(self, *_):
            pass

    monkeypatch.setattr(predict, "Predictor", Fake)
    monkeypatch.setattr(
        predict,
        "label_images",
        lambda _, files, *__: ((f, c, 0.5) for f, c in zip(files, ["=A1", "-1", "cat", "+", "@x"], strict=True)),
    )
    predict.write_predictions(tmp_path / "c.pth", tmp_path / "in", tmp_path / "o.csv")
    lines = (tmp_path / "o.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert lines == ["./-2.png,'=A1,0.500000", "./=1+1.png,-1,0.500000", "./@x.png,cat,0.500000", "caf\\udce9.png,+,0.500000",
                     "ok.png,'@x,0.500000"]  # fmt: skip
    assert (tmp_path / "in" / "./-2.png").exists()


def test_a_report_shows_names_and_obeys_none(make_run, tmp_path):
    evil = "![x](http://127.0.0.1/) <img src=http://127.0.0.1/> `code` | $\\frac{$ </td><script>1</script>"
    for folder in ("a", "b"):
        path = make_run("muscle_digits_10", 0, 0.5, where=folder)
        for name, key in (
            ("environment.json", "git_revision"),
            ("environment.json", "started"),
            ("result.json", "algorithm"),
        ):
            content = json.loads((path / name).read_text()) | {key: evil}
            content |= {"config": "../../" + evil} if name == "environment.json" else {}
            (path / name).write_text(json.dumps(content))
    assert (
        cli.main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out"), "--title", evil])
        == 0
    )
    html = (tmp_path / "out" / "report.html").read_text()
    markdown = (tmp_path / "out" / "report.md").read_text()
    body = "\n".join(
        line for line in markdown.splitlines() if "muscle-plugin report" not in line
    )  # that is in a code span
    assert "<script" not in html + body
    assert "<img src=http" not in html + body
    assert "![x](" not in body


def test_files_of_runs_that_are_damaged_are_named_and_left_out(make_run, tmp_path, capsys):
    make_run("muscle_digits_10", 0)
    bad = make_run("muscle_digits_10", 1)
    for name, text in [("result.json", "[" * 100_000), ("result.json", '{"last_top1": "x"}'), ("metrics.jsonl", "3\n"),
                       ("metrics.jsonl", '{"step": NaN}\n'), ("environment.json", "[]"),
                       ("result.json", "\udcff")]:  # fmt: skip
        kept = (bad / name).read_bytes()
        (bad / name).write_bytes(text.encode(errors="surrogateescape"))
        assert cli.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
        said = capsys.readouterr().err
        assert said.startswith(f"note: left out: {bad}: ")
        assert len(said.splitlines()) == 1
        (bad / name).write_bytes(kept)


# ---------------------------------------------------------------------------------------------------------------- network


def listening(process):
    """Ports that a process and its children listen on."""
    found = set()
    for p in [process, *process.children(recursive=True)]:
        try:
            found |= {c.laddr for c in p.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN}
        except psutil.Error:  # it has ended
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "sweep"])
def test_nothing_listens_on_a_port(command, tmp_path):
    settings = [
        w
        for k, v in {**SHORT, "num_train_iter": 30, "data_on": "host", "num_workers": 1}.items()
        for w in (f"--{k}", str(v))
    ]
    words = ["muscle_digits_10", "--seeds", "1", "--jobs", "1"] if command == "sweep" else ["--algorithm", "muscle"]
    argv = [sys.executable, "-m", "muscle_plugin.cli", command, *words, *settings, "--save_dir", str(tmp_path)]
    before, seen, samples = listening(psutil.Process()), set(), 0
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        said = []
        reader = threading.Thread(target=lambda: said.append(process.stdout.read()))
        reader.start()
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            seen |= listening(watched)
            samples += 1
            time.sleep(0.05)
        reader.join()
    assert process.returncode == 0, said
    assert samples > 10
    assert seen - before == set()
