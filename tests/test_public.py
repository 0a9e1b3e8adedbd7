"""What is public is listed, documented and typed; the version is the same wherever it stands."""

import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import muscle_plugin

PAGE = (ROOT / "docs" / "public-api.md").read_text(encoding="utf-8")
#: Module -> the names that the page lists under its heading.
LISTED = {
    module: set(re.findall(r"^\| `(\w+)`", text, re.M))
    for module, text in re.findall(r"^### `([\w.]+)`\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)
}


def test_page_has_every_module_that_exports_names():
    top = [f"muscle_plugin.{m.name}" for m in pkgutil.iter_modules(muscle_plugin.__path__)]
    exporting = {m for m in top if m.rpartition(".")[2] not in ("cli", "register") and _exports(m)}
    assert exporting | {"muscle_plugin", "muscle_plugin.register"} <= set(LISTED)


def _exports(module):
    return getattr(importlib.import_module(module), "__all__", ())


@pytest.mark.parametrize("module", LISTED)
def test_names_resolve_are_documented_and_are_all_on_the_page(module):
    found = importlib.import_module(module)
    if hasattr(found, "__all__"):
        assert set(found.__all__) == LISTED[module]
    assert found.__doc__
    for name in LISTED[module]:
        value = getattr(found, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert len((value.__doc__ or "").split()) > 3, f"{module}.{name} has no docstring"
            assert value.__module__.startswith("muscle_plugin."), f"{module}.{name} is another package's"


def test_import_is_light_and_an_unknown_name_is_an_attribute_error():
    code = "import muscle_plugin, sys; muscle_plugin.__version__; assert not {'torch', 'semilearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=300)
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        muscle_plugin.nothing_of_this_name  # noqa: B018


SCRIPT = """
from pathlib import Path

from torch import Tensor

from muscle_plugin import Predictor, export_model, load_exported, load_settings, mutual_information, train
from muscle_plugin.propagation import DiffusionLabelPropagation
from muscle_plugin.schedules import schedule


def go(weak: Tensor, hard: Tensor) -> float:
    result: dict[str, object] = train(load_settings("muscle_digits_10", seed=1), quiet=True)
    lines: list[str] = export_model(Path("runs/x"), "out", format="onnx")
    predictor: Predictor = load_exported("out")
    classes: list[str] = predictor.classes
    model = DiffusionLabelPropagation(k=10)
    loss: Tensor = mutual_information(weak, hard)
    print(result, lines, classes, model, loss)
    return schedule("cosine", 100)(3)
"""


def mypy(path):
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--follow-imports", "silent",
         "--cache-dir", str(ROOT / ".mypy_cache"), str(path)],
        env={**os.environ, "MYPYPATH": str(ROOT)}, cwd=path.parent, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return done.stdout.splitlines()


@pytest.mark.slow
def test_type_checker_accepts_a_users_script_and_finds_its_mistakes(tmp_path):
    pytest.importorskip("mypy")
    assert (ROOT / "muscle_plugin" / "py.typed").is_file()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert mypy(script)[-1].startswith("Success")
    script.write_text(SCRIPT.replace("seed=1), quiet=True", "seed=1), quite=True").replace("(3)", '("3")'))
    found = mypy(script)
    assert any('"quite"' in line for line in found), found
    assert any('"str"; expected "float"' in line for line in found), found


def test_version_is_the_same_everywhere():
    version = muscle_plugin.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest[1] == version
    others = re.compile(r"muscle[-_]plugin[ =-]+v?(\d+\.\d+\.\d+)")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        assert set(others.findall(page.read_text(encoding="utf-8"))) <= {version}, page
    said = subprocess.run(
        [sys.executable, "-m", "muscle_plugin.cli", "--version"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert said.stdout.strip() == f"muscle-plugin {version}"


def test_citation_has_the_keys_that_its_format_wants():
    from ruamel.yaml import YAML

    content = YAML(typ="safe").load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= set(content)
    paper = content["preferred-citation"]
    assert [a["family-names"] for a in paper["authors"]] == ["Xie", "Hussein", "Galstyan", "Abd-Almageed"]
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:2012.00150"}]
