"""The patches to USB: each fails without itself, passes with itself, on the release and (USB_TREE) on git main."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PATCHES = Path(__file__).parents[1] / "patches"
CHECK = PATCHES / "check.py"

spec = importlib.util.spec_from_file_location("usb_patches_check", CHECK)
check = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = check
spec.loader.exec_module(check)

CASE = "from semilearn import VALUE\nassert VALUE == {}, f'VALUE is {{VALUE}}'\n"


def diff(old: int, new: int) -> str:
    return (
        "diff --git a/semilearn/__init__.py b/semilearn/__init__.py\n--- a/semilearn/__init__.py\n"
        f"+++ b/semilearn/__init__.py\n@@ -1 +1 @@\n-VALUE = {old}\n+VALUE = {new}\n"
    )


@pytest.fixture
def small(tmp_path):
    """A tree of one line and a series of one patch for it."""
    tree, patches = tmp_path / "usb", tmp_path / "patches"
    (tree / "semilearn").mkdir(parents=True)
    (tree / "semilearn" / "__init__.py").write_text("VALUE = 1\n")
    (patches / "main").mkdir(parents=True)
    (patches / "cases").mkdir()
    (patches / "main" / "0001-two.patch").write_text(diff(1, 2))
    (patches / "cases" / "0001_two.py").write_text(CASE.format(2))
    (patches / "series.main").write_text(f"# tree: {check.fingerprint(tree)}\nmain/0001-two.patch  # a comment\n")
    return tree, patches


def run(tree, patches, *more):
    command = [sys.executable, str(CHECK), str(tree), "--patches", str(patches), "--fresh", *more]
    return subprocess.run(command, capture_output=True, text=True)


def assert_refused(done, message):
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.fullmatch(rf"check\.py: .*{message}.*\n", done.stderr), done.stderr


def test_a_patch_with_its_case_is_proven_and_the_tree_is_left_alone(small):
    tree, patches = small
    done = run(tree, patches)
    assert done.returncode == 0, done.stderr
    assert "| 0001-two | fails: AssertionError: VALUE is 1 | passes |" in done.stdout
    assert (tree / "semilearn" / "__init__.py").read_text() == "VALUE = 1\n"
    assert [entry.name for entry in tree.rglob("*")] == ["semilearn", "__init__.py"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("cases/0001_two.py", "import semilearn\n", r"0001_two\.py .*without the patch"),
        ("cases/0001_two.py", CASE.format(3), r"0001_two\.py .*with the patch.*VALUE is 2"),
        ("main/0001-two.patch", diff(5, 2), r"0001-two\.patch .*apply.* semilearn/__init__\.py:1"),
    ],
    ids=["passes without", "fails with", "does not apply"],
)
def test_a_patch_that_is_not_proven_is_named(small, file, text, message):
    tree, patches = small
    (patches / file).write_text(text)
    done = run(tree, patches)
    assert done.returncode == 1
    assert re.search(rf"check\.py: {message}", done.stderr)


def test_a_later_patch_that_breaks_an_earlier_one_is_found(small):
    tree, patches = small
    (patches / "main" / "0002-three.patch").write_text(diff(2, 3))
    (patches / "cases" / "0002_three.py").write_text(CASE.format(3))
    with (patches / "series.main").open("a") as series:
        series.write("main/0002-three.patch\n")
    done = run(tree, patches)
    assert done.returncode == 1
    assert re.search(r"check\.py: 0001_two\.py .*complete tree.*VALUE is 3", done.stderr)
    assert "1 of 2 patches" in done.stdout


def test_a_case_that_wants_what_is_absent_is_skipped(small):
    tree, patches = small
    (patches / "cases" / "0001_two.py").write_text("# needs: train.py\n" + CASE.format(2))
    done = run(tree, patches)
    assert done.returncode == 0
    assert "needs train.py" in done.stdout
    assert re.search(r"\b0 of 1 .*\b1 skipped", done.stdout)


def test_a_tree_of_another_version_is_refused_unless_the_series_is_given(small):
    tree, patches = small
    (tree / "semilearn" / "more.py").write_text("")
    assert_refused(run(tree, patches), r"1ef4cbe .*\b0\.3\.2\b.*--series main")
    assert run(tree, patches, "--series", "main").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--series", "master"], r"series\.master\b.*: main"),
        (["--only", "0007"], r"--only 0007: .*series\.main"),
        (["--installed"], "TREE .*--installed"),
    ],
)
def test_wrong_arguments_are_one_line(small, arguments, message):
    assert_refused(run(*small, *arguments), message)


def test_a_folder_that_is_not_usb_is_one_line(small, tmp_path):
    assert_refused(run(tmp_path / "patches", small[1]), "tree of USB")


def test_a_series_that_names_no_file_is_one_line(small):
    tree, patches = small
    (patches / "cases" / "0001_two.py").unlink()
    assert_refused(run(tree, patches), r"series\.main: cases/0001_two\.py ")


@pytest.mark.parametrize("name", ["main", "0.3.2"])
def test_every_patch_is_for_a_maintainer_to_read(name):
    """As `git am` takes it: an author, no sign-off, few lines of context, and a message that says what was wrong."""
    patches, made_for = check.read_series(PATCHES, name)
    readme = (PATCHES / "README.md").read_text(encoding="utf-8")
    pull_requests = " ".join(readme.split())
    assert made_for
    assert [patch.number for patch in patches] == sorted({patch.number for patch in patches})
    for patch in patches:
        text = patch.path.read_text(encoding="utf-8")
        assert "From: MUSCLE for USB contributors <muscle-plugin@users.noreply.github.com>" in text, patch.path
        assert "Signed-off-by" not in text, patch.path
        for part in ("Symptom:", "Cause:", "Fix:", "Test:"):
            assert f"\n{part} " in text, (patch.path, part)
        hunks = re.split(r"^@@.*\n", text, flags=re.MULTILINE)[1:]
        for hunk in hunks:
            leading = re.match(r"(?: .*\n)*", hunk)
            assert leading[0].count("\n") <= 1, f"{patch.path}: more than one line of context"
        assert patch.number in readme
        if patch.path.parent.name == "main":
            message = text.partition("\nSymptom: ")[2].partition("\n---\n")[0]
            said = re.sub(r"\n\n(Answers|Relates)[^\n]*\s*\Z", "", message)
            assert " ".join(f"Symptom: {said}".split()) in pull_requests, f"{patch.path}: README.md says something else"


def assert_all_proven(*arguments):
    done = subprocess.run([sys.executable, str(CHECK), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (counts := re.search(r"(\d+) of (\d+) patches proven", done.stdout)), done.stdout
    assert int(counts[1]) + done.stdout.count("| skipped: ") // 2 == int(counts[2]) > 0, done.stdout


@pytest.mark.slow
def test_the_patches_for_the_release_are_proven_on_the_installed_one():
    assert_all_proven("--installed")


@pytest.mark.skipif(not os.environ.get("USB_TREE"), reason="USB_TREE names no checkout of USB's git main")
def test_the_patches_for_main_are_proven_on_a_checkout():
    assert_all_proven(os.environ["USB_TREE"])
