"""What is released: a wheel and a source distribution that hold what they need, and work outside the repository."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile

import pytest
from conftest import CONFIGS, ROOT

from muscle_plugin.version import __version__

pytest.importorskip("build")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with both, built from a copy: building writes beside the sources."""
    copy, out = tmp_path_factory.mktemp("sources") / "copy", tmp_path_factory.mktemp("dist")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in map(os.fsdecode, filter(None, listed.stdout.split(b"\0"))):
        source, target = ROOT / name, copy / name
        if source.is_file():  # not the links to data and environments that a checkout may have
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    # a wheel is built from the source distribution, so that one which lacks something shows here
    made = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The folder that the wheel is installed in."""
    target = tmp_path_factory.mktemp("installed")
    (wheel,) = built.glob("*.whl")
    words = ["install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, timeout=120)
    return target


def names_of_configs():
    return {p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob("*.yaml")}


@pytest.mark.slow
def test_wheel_holds_every_module_configuration_and_template(built):
    (wheel,) = built.glob(f"muscle_plugin-{__version__}-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"muscle_plugin-{__version__}.dist-info/METADATA").decode()
        record = archive.read(f"muscle_plugin-{__version__}.dist-info/RECORD").decode()
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "muscle_plugin").rglob("*.py")}
    assert modules <= names
    inside = "muscle_plugin/benchmark_configs/"
    assert {n.removeprefix(inside) for n in names if n.startswith(inside)} == names_of_configs()
    others = ("py.typed", "studies/studies.yaml", "studies/templates/report.html", "studies/templates/report.md")
    assert {f"muscle_plugin/{n}" for n in others} <= names
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert {n.split("/")[0] for n in names} == {"muscle_plugin", f"muscle_plugin-{__version__}.dist-info"}
    assert all(n in record for n in names)
    head, _, description = metadata.partition("\n\n")
    assert "License-Expression: MIT" in head
    assert "Description-Content-Type: text/markdown" in head
    # a package index has neither the repository's pictures nor its files
    assert description.startswith("# MUSCLE for USB")
    assert "](docs/" not in description
    assert "](https://arxiv.org" in description


@pytest.mark.slow
def test_source_distribution_holds_what_building_and_testing_take(built):
    (archive,) = built.glob(f"muscle_plugin-{__version__}.tar.gz")
    with tarfile.open(archive) as tar:
        names = {n.partition("/")[2] for n in tar.getnames()}
    assert {f"benchmark_configs/{n}" for n in names_of_configs()} <= names
    assert {p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").rglob("*.py")} <= names
    assert {"pyproject.toml", "setup.py", "train.py", "Makefile", "LICENSE", "CITATION.cff", "docs/method.md"} <= names
    assert not [n for n in names if n.startswith(("data/", "runs/", ".venv")) or n.endswith((".pyc", ".pth"))]


@pytest.mark.slow
def test_installed_wheel_trains_by_name_and_finds_studies_outside_the_repository(installed, tmp_path):
    start = "import sys; sys.path.insert(0, sys.argv.pop(1)); import muscle_plugin; "
    start += "assert muscle_plugin.__file__.startswith(sys.path[0]), muscle_plugin.__file__; "

    def run(*words, status=0, code="from muscle_plugin.cli import main; sys.exit(main())"):
        done = subprocess.run(
            [sys.executable, "-I", "-c", start + code, str(installed), *words],
            cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    short = ["--num_train_iter", "4", "--epoch", "1", "--num_eval_iter", "2", "--num_threads", "1"]
    run("train", "muscle_fixmatch_digits_10", *short, "--use_tensorboard", "false")
    (result,) = (tmp_path / "runs").glob("*/result.json")
    assert json.loads(result.read_text())["complete"] is True
    environment = json.loads((result.parent / "environment.json").read_text())
    assert environment["config"] == "muscle_fixmatch_digits_10"
    assert environment["git_revision"] is None
    run("report", "runs", "--out", "report")
    assert "MUSCLE+FixMatch" in (tmp_path / "report" / "report.html").read_text()
    assert "'muscle_digits_10'" in run("train", "muscle_digit_10", status=2)
    studies = (
        "from muscle_plugin.studies.definitions import expand, study_names as n; assert all(expand([x]) for x in n())"
    )
    assert run(code=studies) == ""
