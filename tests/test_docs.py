"""The documentation site: it builds without a warning, holds what it must, looks right, and its commands exist."""

import argparse
import contextlib
import http.server
import re
import shlex
import shutil
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT

from muscle_plugin import cli
from muscle_plugin.registry.catalogue import base_algorithms
from muscle_plugin.settings.schema import MACHINE, PLACE, MuscleSettings, RunSettings, affecting
from muscle_plugin.studies import jobs, sweep

DOCS = ROOT / "docs"


class Page(HTMLParser):
    """The anchors, links and navigation of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.navigation: list[str] = []
        self.equations = 0
        self.text: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[k] for k in ("id", "name") if found.get(k)}
        self.links += [found[k] for k in ("href", "src") if found.get(k)]
        self.equations += tag == "math"
        if tag == "a" and "md-nav__link" in (found.get("class") or ""):
            self.navigation.append(found["href"])

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    for name in ("mkdocstrings", "math_core"):
        pytest.importorskip(name, reason=f"{name} is not installed (extra docs)")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stdout + made.stderr
    return out


@pytest.fixture(scope="module")
def pages(site):
    """Every page by its path in the site."""
    return {p.relative_to(site).as_posix(): Page(p) for p in site.rglob("*.html") if p.name != "404.html"}


@pytest.mark.slow
def test_every_page_of_docs_is_in_the_navigation(pages):
    here = {p.relative_to(DOCS).with_suffix(".html").as_posix() for p in DOCS.rglob("*.md")}
    assert {"settings.html", "faq.html", "benchmark.html"} <= here
    named = {urlsplit(link).path for link in pages["index.html"].navigation}
    assert here - named - {"index.html"} == set()


@pytest.mark.slow
def test_no_link_or_anchor_is_broken(site, pages):
    """Also of raw HTML and of what is generated, which ``--strict`` does not look at."""
    broken = []
    for name, page in pages.items():
        for link in page.links:
            to = urlsplit(link)
            if to.scheme == "data":  # a notebook's pictures
                continue
            if to.scheme or to.netloc:
                assert to.netloc in ("arxiv.org", "github.com", "www.ray.io"), f"{name}: {link}"
                continue
            target = (site / name).parent.joinpath(unquote(to.path)).resolve() if to.path else site / name
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                broken.append(f"{name}: {link}")
            elif to.fragment and target.suffix == ".html":
                place = target.relative_to(site.resolve()).as_posix() if to.path else name
                if place in pages and unquote(to.fragment) not in pages[place].anchors | {
                    "__skip",
                    "__toc",
                    "__search",
                }:
                    broken.append(f"{name}: {link}")
    assert broken == []


def test_the_settings_page_has_every_setting(pages):
    page = pages["settings.html"]
    settings = {**RunSettings.model_fields, **MuscleSettings.model_fields}
    assert set(settings) <= page.anchors
    text = " ".join("".join(page.text).split())
    missing = [n for n, f in settings.items() if f.description.replace("`", "") not in text]
    assert missing == []
    assert text.count("May change on resume.") == len(affecting(MACHINE, PLACE))
    for algorithm in base_algorithms().values():
        for argument in algorithm.arguments:
            assert argument.name in text


def test_the_settings_page_says_what_settings_of_algorithms_mean(monkeypatch):
    pytest.importorskip("mkdocstrings", reason="mkdocs-material and mkdocstrings-python are not installed (extra docs)")
    monkeypatch.syspath_prepend(str(DOCS / "hooks"))
    import generated

    own = {(n, a.name): a for n, e in base_algorithms().items() for a in e.arguments}
    assert [k for k, a in own.items() if generated.meaning(k[0], a) == "—"] == []
    assert [n for group in generated.groups().values() for n in group] == list(RunSettings.model_fields)


def test_docstrings_are_shown_as_they_are_meant(pages):
    text = "".join(pages["api.html"].text)
    assert not re.search(r":(func|class|meth|mod):|====|\\\||^:::|Args:", text, re.MULTILINE)
    anchors = pages["api.html"].anchors
    assert {
        "muscle_plugin.losses.mutual_information", "muscle_plugin.training.host.Host",
        "muscle_plugin.propagation.estimator.DiffusionLabelPropagation.fit", "muscle_plugin.schedules.schedule",
        "muscle_plugin.data.source.Source", "muscle_plugin.data.batches.Batches",
        "muscle_plugin.settings.resolve.load_settings",
    } <= anchors  # fmt: skip


CODE = re.compile(r"^```.*?^```|^ {4}.*?$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
INLINE_MATH = re.compile(r"(.?)\$([^$\n]+)\$(.?)")


def test_every_equation_is_drawn_when_the_site_is_built(site, pages):
    found = 0
    for path in DOCS.rglob("*.md"):
        name = path.relative_to(DOCS).with_suffix(".html").as_posix()
        text = path.read_text(encoding="utf-8")
        here = text.count("\n```math\n") + len(INLINE_MATH.findall(CODE.sub("", text)))
        assert pages[name].equations == here, name
        assert "arithmatex" not in (site / name).read_text(encoding="utf-8")
        found += here
    assert found > 50
    assert "\\frac" in "".join(pages["method.html"].text)  # what is copied from the page
    assert "\\frac" not in (site / "search" / "search_index.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda p: p.stem)
def test_equations_within_a_line_are_ones_that_github_shows(path):
    """Between blanks or marks, and without what Markdown takes as its own: it reads a backslash before a mark, and ``}_k``."""
    for before, latex, after in INLINE_MATH.findall(CODE.sub("", path.read_text(encoding="utf-8"))):
        assert before in " ([" or not before, latex
        assert after in " .,:;)]" or not after, latex
        assert latex == latex.strip(), latex
        assert not re.search(r"\\[^A-Za-z]|}_\w|[*<>|]", latex), latex


def test_a_wrong_equation_is_named(monkeypatch):
    pytest.importorskip("math_core", reason="math_core is not installed (extra docs)")
    monkeypatch.syspath_prepend(str(DOCS / "hooks"))
    import equations
    from mkdocs.exceptions import PluginError

    page = argparse.Namespace(file=argparse.Namespace(src_uri="method.md"))
    html = '<p><span class="arithmatex">\\(a &lt; {}\\)</span></p>'
    assert "<mo>&lt;</mo><mi>b</mi>" in equations.on_page_content(html.format("b"), page=page)
    with pytest.raises(PluginError, match=r"method\.md: .*\\fracc"):
        equations.on_page_content(html.format("\\fracc"), page=page)


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))], ids=lambda p: p.stem)
def test_files_that_the_docs_name_exist(path):
    named = re.findall(
        r"(?<![\w/.-])(?:benchmarks|tests|muscle_plugin|docs)/[\w/.-]+\.(?:py|sh|md|yaml)\b", path.read_text()
    )
    assert [n for n in named if not (ROOT / n).is_file()] == []


# ------------------------------------------------------------------------------------------------------------- commands

FENCE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^|\n\n)((?: {4}.*(?:\n|$)|\n(?= {4}))+)")
INLINE = re.compile(r"`((?:muscle-plugin|python train\.py) [^`]+)`")
STARTS = ("muscle-plugin", "train.py")


def commands_of(text):
    """(words after ``muscle-plugin``, the line shown under it) of every command in a page's code."""
    blocks = FENCE.findall(text) + INDENTED.findall(FENCE.sub("", text)) + INLINE.findall(text)
    found = []
    for block in blocks:
        lines = [line.strip() for line in block.replace("\\\n", " ").splitlines() if line.strip()]
        for line, below in zip(lines, [*lines[1:], ""], strict=False):
            try:
                words = shlex.split(line.removeprefix("$ "), comments=True)
            except ValueError:  # prose with an apostrophe
                continue
            runs = words[:1] in (["muscle-plugin"], ["python"], ["torchrun"]) or "=" in (words or [""])[0]
            start = next((i for i, w in enumerate(words) if w in STARTS), None)
            if not runs or start is None or (words[0] == "python" and start != 1):
                continue
            rest = words[start + 1 :] if words[start] == "muscle-plugin" else ["train", *words[start + 1 :]]
            rest = [w for w in rest if w not in ("…", "...")]
            if len(rest) > 1:
                found.append((rest, below))
    return found


SHOWN = {
    " ".join(words): (path.stem, words, below)
    for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    for words, below in commands_of(path.read_text(encoding="utf-8"))
}


class Parsed(Exception):
    """The command line was understood."""


def understood(words, monkeypatch):
    """The exit status of a command, which does nothing but read its words: 0 if all flags, names and values are right."""

    def stop(*_, **__):
        raise Parsed

    if words[0] in ("train", "data"):
        words = [*words, "--print-config"]
    elif words[0] == "sweep":
        expand = jobs.expand
        monkeypatch.setattr(jobs, "expand", lambda names: expand(names)[:2])  # all are read by test_studies
        monkeypatch.setattr(sweep, "open_pool", stop)
        monkeypatch.setattr(jobs.Job, "state", "new")  # whatever the reader's own runs/ holds
    else:
        parse = argparse.ArgumentParser.parse_args
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda *a: stop(parse(*a)))
    try:
        return cli.main(words)
    except Parsed:
        return 0
    except SystemExit as e:  # argparse's
        return e.code or 0


def test_enough_commands_are_found():
    assert {words[0] for _, words, _ in SHOWN.values()} >= {"train", "sweep", "report", "predict", "data", "usb-export"}
    assert len(SHOWN) > 30


@pytest.mark.parametrize(
    ("words", "below"), [pytest.param(w, b, id=f"{f}: {line}") for line, (f, w, b) in SHOWN.items()]
)
def test_commands_in_the_docs_exist(words, below, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    status = understood(words, monkeypatch)
    wrong = below.startswith("error: --")  # a page shows what a wrong flag gives
    assert status == (2 if wrong else 0), capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "train --lrr 1",
        "sweep table9",
        "report --oot x",
        "predict --image x",
        "data show --c no_such",
        "nothing --x",
    ],
)
def test_a_wrong_command_is_noticed(words, monkeypatch, capsys):
    assert understood(words.split(), monkeypatch) == 2


# -------------------------------------------------------------------------------------------------------------- browser


# The elements that reach beyond the window's right edge.
BEYOND = """[...document.querySelectorAll("*")].filter(e => e.getBoundingClientRect().right > innerWidth + 1)
            .slice(0, 5).map(e => `${e.tagName}.${e.className}`)"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="Debian's chromium is not installed (apt install chromium)")
def test_no_page_is_wider_than_the_window_or_loads_from_elsewhere(site, pages):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra test)")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}/"
    asked, wide, errors = [], [], []
    try:
        with sync_api.sync_playwright() as p:
            browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page()
            page.on("request", lambda r: asked.append(r.url))
            page.on("pageerror", lambda e: errors.append(str(e)))
            for name in pages:
                page.goto(base + name, wait_until="domcontentloaded")
                for width in (390, 1280):
                    page.set_viewport_size({"width": width, "height": 800})
                    try:  # the theme moves its columns when a width is crossed; what counts is where they come to rest
                        page.wait_for_function(f"document.documentElement.scrollWidth <= {width}", timeout=5_000)
                    except sync_api.TimeoutError:
                        wide.append(f"{name} at {width}: {page.evaluate(BEYOND)}")
            page.goto(f"{base}index.html", wait_until="networkidle")
            for _ in range(10):  # what is typed before the index is there is not looked up
                page.locator(".md-search__input").first.fill("")
                page.locator(".md-search__input").first.press_sequentially("sequestered")
                with contextlib.suppress(sync_api.TimeoutError):
                    page.locator(".md-search-result__link").first.wait_for(timeout=6_000)
                    break
            assert page.locator(".md-search-result__link").count() > 0
            browser.close()
    finally:
        server.shutdown()
        server.server_close()
    assert wide == []
    assert errors == []
    assert len(asked) > len(pages)
    assert [url for url in asked if not url.startswith(base)] == []
