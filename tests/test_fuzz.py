"""Bad input of all kinds, by hypothesis: it is read, or refused by one clear line. The examples are the same at every call.

``benchmarks/fuzz_readers.py`` searches further; what it starts from lies in ``tests/corpus`` and is replayed here.
"""

import copy
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from muscle_plugin import cli
from muscle_plugin.data.datasets import load_source
from muscle_plugin.data.images import decode_all
from muscle_plugin.data.source import SourceOptions
from muscle_plugin.data.splits import draw_split, read_split, write_split
from muscle_plugin.errors import ConfigError, DataError
from muscle_plugin.files import load_tensors
from muscle_plugin.settings.resolve import Resolved, load_settings, resolve
from muscle_plugin.settings.schema import RunSettings
from muscle_plugin.settings.sources import Layer

sys.path.insert(0, str(ROOT / "benchmarks"))
from fuzz_readers import READERS, SEEDS


def fuzz(examples):
    """Fixed examples, nothing kept on disk, fixtures shared by all examples."""
    shared = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=shared)


def is_line(text):
    return bool(text) and text.isprintable()


def says(error, call):
    """The words of the error that a call raises; None if it raises none."""
    try:
        call()
    except error as e:
        return str(e)
    return None


# --------------------------------------------------------------------------------------------------------------- settings

NAMES = st.sampled_from([*RunSettings.model_fields, "mi_weight", "p_cutoff", "lp_start", "clip", "lrr", "extends"])
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 300), st.floats(), st.text(max_size=12),
    st.sampled_from(["16.0", "1e3", "nan", "inf", "None", "true", "muscle_fixmatch", "folder", "digits", "cifar20", "~nobody/x",
                     "/", "..", "x" * 5000, "9" * 5000, "cuda:1", "auto", "cosine", "\x1b[2J", "a\0b", "\udcff", "\ud800"]),
    st.sampled_from([10**400, -(2**70), 2**53 + 1, 1e300, 1e-300, 5e-324]),
)  # fmt: skip
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=2), st.dictionaries(st.text(max_size=3), SCALARS, max_size=2))
SETTINGS = st.dictionaries(st.one_of(NAMES, NAMES, NAMES, st.text(max_size=8)), VALUES, max_size=5)


def resolves_or_says_why(layers):
    try:
        found = resolve(layers)
    except ConfigError as e:
        lines = e.faults
    else:
        assert isinstance(found, Resolved)
        return found
    assert lines
    assert all(map(is_line, lines)), lines
    return None


@fuzz(400)
@given(SETTINGS, SETTINGS)
@example({"batch_size": "16.0"}, {})
@example({"total_batch": "many"}, {"total_batch": 32})  # what a later layer hides
@example({"ratio": float("inf")}, {})
@example({"batch_size": 1, "ratio": 1e300}, {})
@example({"num_threads": 10**12, "dist_timeout": 1e300}, {})
def test_settings_resolve_or_are_refused_by_lines(below, above):
    found = resolves_or_says_why([Layer("c.yaml", copy.copy(below)), Layer("command line", copy.copy(above))])
    if found is not None:
        resolves_or_says_why([Layer("again", found.as_dict())])
        found.to_yaml()


YAML_PARTS = st.sampled_from(
    ["lr: ", "0.1", "\n", "  ", "- ", "? ", ": ", "&a ", "*a", "<<: ", "{", "}", "[", "]", "!!python/name:os.system ", "!!int ",
     "!!binary ", "!!timestamp ", "!!set ", "!!omap ", "!!null ", "2001-99-99", "0x", "1_0", "'", '"', "|", ">", "%YAML 1.2\n",
     "%TAG ! x\n", "---\n", "...\n", "#", "\t", "\\x", "@", "`", "~", "\ufeff", "\u2028", "extends: ", "algorithm: muscle\n",
     "epoch: 2\n", "1:30", ".inf", "-.nan", "=", "yes"]
)  # fmt: skip


@fuzz(400)
@given(st.one_of(st.lists(YAML_PARTS, max_size=14).map(lambda x: "".join(x).encode()), st.binary(max_size=60)))
@example(b"lr: !!python/object/apply:os.system [id]")
@example(b"[" * 50_000)
@example(b"x: " + b"{a: " * 20_000)
@example(b"? " * 20_000)
@example(b"day: 2001-99-99")
@example(b"x: " + b"9" * 5000)
@example(b"x: 0x" + b"f" * 5000)
@example(b"a: " + b"x" * 300_000)
def test_configuration_files_are_read_or_refused_by_lines(tmp_path, content):
    READERS["config"](tmp_path)(content)


@pytest.mark.parametrize("path", sorted(SEEDS.rglob("*.*")), ids=lambda p: p.name)
def test_the_corpus_holds(path, tmp_path):
    READERS[path.parent.name](tmp_path)(path.read_bytes())


WORDS = st.one_of(
    st.sampled_from([f"--{n}" for n in RunSettings.model_fields]), st.sampled_from(["-o", "-nl", "--c", "--", "-", "-1"]),
    st.sampled_from(["muscle_digits_10", "digits", "10", "1e9", "x" * 5000, "/", "--lr=", "--=", "--c=", "\udcff", "\x1b["]),
    st.text(max_size=10),
)  # fmt: skip
REQUIRED = {
    "predict": ["--checkpoint", "absent.pth", "--images", "absent", "--out", "out.csv"],
    "report": ["absent"], "usb-export": ["absent"], "sweep": ["--dry-run", "absent"], "data": ["show", "--print-config"],
    "train": ["--print-config"],
}  # fmt: skip


@pytest.mark.slow
@fuzz(250)
@given(st.sampled_from([*REQUIRED, "", "no-such"]), st.booleans(), st.lists(WORDS, max_size=5))
@example("train", True, ["--c", "x" * 5000])
@example("train", True, ["--c", "a\0b"])
@example("train", True, ["--net", "\x1b[2J", "--lr\n", "1"])
@example("predict", False, ["--checkpoint", "/", "--images", "/", "--out", "x" * 5000])
@example("report", False, ["x" * 5000])
@example("sweep", True, ["--save_dir", "~nobody-of-this-name/x"])
def test_command_lines_end_with_status_0_or_2_and_lines(capsys, command, needed, words):
    argv = [
        command,
        *(REQUIRED.get(command, []) if needed or command in ("train", "sweep", "data") else []),
        *words,
    ]
    try:
        status = cli.main([w for w in argv if w])
    except SystemExit as e:  # argparse's
        status = e.code
    said = capsys.readouterr()
    assert status in (0, 2)
    assert "Traceback" not in said.err
    if status == 2 and "usage:" not in said.err + said.out:
        assert said.err.splitlines()
        assert all(x.startswith(("error: ", "note: ")) for x in said.err.split("\n") if x), said.err


# ------------------------------------------------------------------------------------------------------ tables and splits

CELLS = st.one_of(
    st.sampled_from(["a.png", "b.png", "sub/c d.jpg", "./a.png", "../x.png", "/etc/passwd", "", "cat", "dog", "test", "train",
                     '"', '""', "a\0", "\x1b", "x" * 300_000, "..", ".", "sub/../a.png", "file", "=1+1"]),
    st.text(max_size=6),
)  # fmt: skip


@pytest.fixture
def read_table(tmp_path):
    return READERS["csv"](tmp_path)


TABLES = st.lists(st.lists(CELLS, max_size=4), max_size=6)


@fuzz(250)
@given(
    TABLES,
    st.sampled_from(",;\t"),
    st.sampled_from(["\n", "\r\n", "\r", "\u2028"]),
    st.sampled_from(["utf-8", "utf-16", "utf-8-sig"]),
)
def test_tables_are_read_or_refused_by_one_line(read_table, rows, separator, end, encoding):
    read_table(end.join(separator.join(row) for row in rows).encode(encoding, "surrogatepass"))


@pytest.fixture(scope="module")
def digits():
    return load_source("digits", SourceOptions(Path(), 8))


INDICES = st.one_of(
    st.lists(st.integers(-2, 1500), max_size=20), st.lists(st.integers(), max_size=3), st.lists(st.floats(), max_size=3),
    st.text(), st.none(), st.lists(st.lists(st.integers(0, 9), max_size=2), max_size=2), st.just(list(range(100))),
)  # fmt: skip


@fuzz(250)
@given(
    st.sampled_from(["labelled", "sequestered", "fingerprint", "labels_per_class", "format", "training_images", ""]),
    INDICES,
)
@example("labelled", [10**30])
@example("fingerprint", "\x1b[2J")
def test_split_files_are_read_or_refused_by_one_line(tmp_path, digits, key, value):
    path = tmp_path / "s.json"
    write_split(path, draw_split(digits, 20, 0), digits, seed=0)
    content = json.loads(path.read_text()) | ({key: value} if key else {})
    path.write_text(json.dumps(content if key else value))
    split_or_line(path, digits)


def split_or_line(path, source):
    said = says(DataError, lambda: read_split(path, source, False))
    assert said is None or is_line(said), said


@fuzz(250)
@given(st.one_of(st.binary(max_size=150), st.tuples(st.integers(0, 200), st.integers(0, 255))))
@example(b"")
@example(b"PK\x03\x04" + bytes(40))
def test_index_files_are_read_or_refused_by_one_line(tmp_path, digits, damage):
    path = tmp_path / "i.npy"
    np.save(path, np.arange(60))
    whole = bytearray(path.read_bytes())
    if isinstance(damage, tuple):
        whole[damage[0]] = damage[1]
    path.write_bytes(damage if isinstance(damage, bytes) else whole)
    split_or_line(path, digits)


@pytest.mark.parametrize("write", [
    lambda f: np.save(f, np.array([{"a": 1}], dtype=object), allow_pickle=True), lambda f: np.savez(f, a=[1]),
    lambda f: np.save(f, np.zeros(3)), lambda f: np.save(f, np.arange(10_000)), lambda f: np.save(f, np.int64(3)),
    lambda f: f.write(b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<i8', 'fortran_order': False, 'shape': (1099511627776,), }"
                      .ljust(117) + b"\n"),
])  # fmt: skip
def test_other_files_of_numpy_are_refused_by_one_line(write, tmp_path, digits):
    with (tmp_path / "i.npy").open("wb") as f:
        write(f)
    with pytest.raises(DataError, match=r"i\.npy: ") as caught:
        read_split(tmp_path / "i.npy", digits, False)
    assert is_line(str(caught.value))


# ----------------------------------------------------------------------------------------------------------------- images


def saved(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def seeds_of_images():
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    palette = rgb.quantize(8)
    frames = {"save_all": True, "append_images": [rgb.transpose(Image.Transpose.ROTATE_180)]}
    deep = Image.fromarray(np.arange(0, 60000, 300, dtype=np.uint16).reshape(10, 20))
    return {
        "png": saved(rgb, "PNG"), "png16": saved(deep, "PNG"),
        "palette": saved(palette, "PNG", transparency=3), "interlaced": saved(rgb.convert("LA"), "PNG"),
        "apng": saved(rgb, "PNG", **frames),
        "jpeg": saved(rgb, "JPEG", exif=turned), "cmyk": saved(rgb.convert("CMYK"), "JPEG"),
        "progressive": saved(rgb, "JPEG", progressive=True), "gif": saved(palette, "GIF", **frames),
        "webp": saved(rgb, "WEBP", **frames),
        "tiff": saved(rgb.convert("CMYK"), "TIFF", compression="tiff_lzw"), "float": saved(rgb.convert("F"), "TIFF"),
        "bmp": saved(rgb, "BMP"), "ico": saved(rgb, "ICO"), "ppm": saved(rgb, "PPM"), "tga": saved(rgb, "TGA"),
        "jp2": saved(rgb, "JPEG2000"), "dds": saved(rgb, "DDS"), "one": saved(Image.new("RGB", (1, 1)), "PNG"),
        "tall": saved(Image.new("L", (1, 5000)), "PNG"), "wide": saved(Image.new("1", (5000, 1)), "TIFF"),
        "pcx": saved(rgb, "PCX"),
        "sgi": saved(rgb, "SGI"), "icns": saved(rgb.resize((16, 16)), "ICNS"), "im": saved(rgb, "IM"),
    }  # fmt: skip


IMAGES = seeds_of_images()


def reasons(path, size=8):
    """Why it was not read: 0 or 1 lines."""
    out = np.empty((1, 3, size, size), np.uint8)
    found = list(decode_all([path], size, out).values())
    assert all(x.startswith(str(path)) and is_line(x) for x in found), found
    return found


@pytest.mark.parametrize("name", [n for n in IMAGES if n != "float"])
def test_images_of_every_kind_are_read_whatever_their_names_say(name, tmp_path):
    (tmp_path / "x.jpg").write_bytes(IMAGES[name])
    assert reasons(tmp_path / "x.jpg") == []


@fuzz(500)
@given(
    st.sampled_from(list(IMAGES)),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
    st.floats(0, 1.2),
)
def test_damaged_images_are_read_or_named_in_one_line(tmp_path, name, changes, length):
    content = bytearray(IMAGES[name])
    for where, value in changes:
        # heads are where it matters
        content[int(where * (min(len(content), 64) - 1)) if value % 2 else int(where * (len(content) - 1))] = value
    (tmp_path / "x.png").write_bytes(content[: int(length * len(content))])
    reasons(tmp_path / "x.png")


# ------------------------------------------------------------------------------------------------------------ checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of six steps, its settings, and a picture."""
    from muscle_plugin.runs.train import train

    root = tmp_path_factory.mktemp("run")
    resolved = load_settings(None, **{**SHORT, "algorithm": "muscle_fixmatch", "save_dir": str(root), "save_name": "r"})
    train(resolved, quiet=True)
    Image.new("L", (8, 8), 99).save(root / "a.png")
    return root


@fuzz(100)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4), st.floats(0, 1.3))
@example([], 0.0)
def test_damaged_checkpoints_are_read_or_refused_by_one_line(run, tmp_path, changes, length):
    content = bytearray((run / "r" / "latest_model.pth").read_bytes())
    for where, value in changes:
        content[int(where * (len(content) - 1))] = value
    (tmp_path / "c.pth").write_bytes(content[: int(length * len(content))])
    said = says(ValueError, lambda: load_tensors(tmp_path / "c.pth"))
    assert said is None or is_line(said), said


OTHERS = st.one_of(
    SCALARS.filter(lambda x: not isinstance(x, str) or "\ud800" not in x), st.lists(st.integers(0, 5), max_size=2),
    st.dictionaries(st.sampled_from(["a", "state", "dict", "list"]), st.integers(0, 3), max_size=2),
    st.just(torch.zeros(3)), st.just(torch.zeros(1).expand(10**6, 10**6)), st.just("absent"),
)  # fmt: skip


def places(content, depth):
    """Paths of keys to what a checkpoint holds."""
    found = []
    for key, value in content.items():
        found.append((key,))
        if isinstance(value, dict) and depth > 1:
            found += [(key, *rest) for rest in places(value, depth - 1)]
    return found


def altered(content, path, value):
    copied = copy.copy(content)
    if len(path) > 1:
        copied[path[0]] = altered(content[path[0]], path[1:], value)
    elif isinstance(value, str) and value == "absent":
        del copied[path[0]]
    else:
        copied[path[0]] = value
    return copied


@fuzz(40)
@given(st.data())
def test_checkpoints_of_other_content_predict_or_are_refused_by_one_line(run, tmp_path, capsys, data):
    content = torch.load(run / "r" / "latest_model.pth", weights_only=True)
    wanted = ("it", "net", "net_from_name", "ema_model", "images")
    path = data.draw(st.sampled_from([p for p in places(content, 2) if p[0] in wanted]))
    torch.save(altered(content, path, data.draw(OTHERS)), tmp_path / "c.pth")
    words = ["--checkpoint", tmp_path / "c.pth", "--images", run / "a.png", "--out", tmp_path / "o.csv", "--overwrite"]
    status = cli.main(["predict", "--device", "cpu", *map(str, words)])
    said = capsys.readouterr().err
    assert (status, said.count("\n")) in ((0, 0), (2, 1)), said


@pytest.fixture(scope="module")
def algorithm(run):
    """The run's algorithm before its first step."""
    from muscle_plugin.runs.build import build

    settings = {**SHORT, "algorithm": "muscle_fixmatch", "save_dir": str(run)}
    return build(load_settings(None, **settings))


@fuzz(60)
@given(st.data())
def test_checkpoints_of_other_content_are_gone_on_from_or_refused_by_one_line(run, algorithm, tmp_path, data):
    content = torch.load(run / "r" / "latest_model.pth", weights_only=True)
    path = data.draw(st.sampled_from(places(content, 4)))
    torch.save(altered(content, path, data.draw(OTHERS)), tmp_path / "c.pth")
    before = (algorithm.run_dir, algorithm.args.save_dir)
    said = says(ValueError, lambda: algorithm.load_model(tmp_path / "c.pth"))
    assert said is None or is_line(said), said
    assert (algorithm.run_dir, algorithm.args.save_dir) == before


# ------------------------------------------------------------------------------------------------- files of run directories

JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["<b>", "$\\frac{$", "../x"])
    ),
    lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text(max_size=4), x, max_size=2), max_leaves=4,
)  # fmt: skip


@pytest.mark.slow
@fuzz(15)
@given(st.sampled_from(["result.json", "environment.json", "metrics.jsonl", "failure.json", "config.yaml"]), st.data())
@example("result.json", None)
def test_reports_of_damaged_runs_are_made_or_refused_by_one_line(make_run, tmp_path, capsys, name, data):
    folder = tmp_path / "runs" / "muscle_digits_10_0"
    if not folder.exists():
        make_run("muscle_digits_10", 0)
        make_run("fixmatch_digits_10", 0)
    file = folder / name
    kept = file.read_text() if file.exists() else None
    if data is None:
        text = "[" * 100_000
    elif name == "config.yaml" or data.draw(st.booleans()):
        text = json.dumps(data.draw(JSON))
    else:
        content = json.loads((kept or "{}").splitlines()[0])
        text = json.dumps(content | {data.draw(st.sampled_from([*content, "error", "gpu"])): data.draw(JSON)})
    file.write_text(text)
    try:
        status = cli.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
        assert status == 0
        assert cli.main(["report", str(tmp_path / "out" / "runs.jsonl"), "--out", str(tmp_path / "again")]) == 0
        assert cli.main(["usb-export", str(tmp_path / "runs"), "--out", str(tmp_path / "usb")]) == 2
        assert "Traceback" not in capsys.readouterr().err
    finally:
        file.unlink()
        if kept is not None:
            file.write_text(kept)
