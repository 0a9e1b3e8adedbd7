"""Reports: what is said of runs is what they hold; ranking; USB's formats; the page in a browser."""

import csv
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from ruamel.yaml import YAML

from muscle_plugin import cli
from muscle_plugin.data.load import choose_split, load_data
from muscle_plugin.settings.resolve import load_settings, resolve
from muscle_plugin.settings.sources import Layer
from muscle_plugin.studies import graph_baseline, plots
from muscle_plugin.studies.definitions import study_configs
from muscle_plugin.studies.graph_baseline import METHODS, on_pixels
from muscle_plugin.studies.groups import critical_difference, groups_of, rank, scores_by_setting
from muscle_plugin.studies.runs import find_runs, summary
from muscle_plugin.studies.usb_export import columns


def report(words):
    return cli.main(["report", *words])


# ---------------------------------------------------------------------------------------------------------------- tables


def made(tmp_path, *words):
    assert report([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), *words]) == 0
    return (tmp_path / "out" / "report.html").read_text(), (tmp_path / "out" / "report.md").read_text()


def row(markdown, head):
    (line,) = [x for x in markdown.splitlines() if x.startswith(f"| {head} |")]
    return [c.strip() for c in line.split("|")[2:-1]]


def test_cells_show_the_papers_figure_ours_the_difference_and_whether_it_is_within_two_std(make_run, tmp_path):
    for seed, score in enumerate((0.85, 0.86, 0.87)):
        make_run("muscle_cifar10_1000", seed, score)
        make_run("muscle_cifar10_500", seed, score)
    html, markdown = made(tmp_path)
    assert row(markdown, "MUSCLE, paper") == ["85.46 ± 0.85", "79.01 ± 0.99", "70.37 ± 1.98", "52.79 ± 4.81"]
    assert row(markdown, "MUSCLE, ours") == [
        "86.00 ± 1.00 (n = 3) +0.54 ✓", "86.00 ± 1.00 (n = 3) +6.99 ✗", "–", "–",
    ]  # fmt: skip
    assert "within 2 std" in html
    assert "outside 2 std" in html
    assert "not run" in html
    assert row(markdown, "MT, ours") == ["–"] * 4


@pytest.mark.parametrize(("rule", "mean"), [("last", "86.00"), ("best", "87.00"), ("median20", "85.00")])
def test_the_rule_chooses_the_figure_and_is_named(make_run, tmp_path, rule, mean):
    make_run("muscle_cifar10_1000", 0, 0.86)
    _, markdown = made(tmp_path, "--score", rule)
    assert row(markdown, "MUSCLE, ours")[0].startswith(f"{mean} (n = 1)")
    named = {"last": "at the last step", "best": "chosen on the test set", "median20": "median of the last 20"}
    assert named[rule] in markdown


def test_top_5_has_columns_of_its_own(make_run, tmp_path):
    make_run("muscle_miniimagenet_4000", 0, 0.30)
    _, markdown = made(tmp_path)
    ours = row(markdown, "MUSCLE, ours")
    assert ours[1].startswith("30.00 (n = 1)")
    assert ours[4].startswith("65.00 (n = 1)")


def test_shortened_or_changed_runs_are_named_so_and_never_compared_or_mixed(make_run, tmp_path):
    make_run("fixmatch_cifar10_250", 0, 0.90)
    make_run("fixmatch_cifar10_250", 1, 0.40, num_train_iter=400, epoch=4, net="small_cnn")
    html, markdown = made(tmp_path)
    cell = row(markdown, "FixMatch, setting 2, ours")[1]
    assert cell == "90.00 (n = 1) +0.49 ✓; 40.00 (n = 1) [1]"
    why = "epoch 4 instead of 300, net small_cnn instead of cnn13, num_train_iter 400 instead of the default"
    assert f"[1] **not the table's configuration**: {why}" in markdown
    assert why in html
    assert "finished, not as configured" in html


@pytest.mark.parametrize(
    ("changes", "head"),
    [
        ({"dataset": "digits", "num_labels": 10, "net": "small_cnn"}, "MUSCLE, ours"),
        ({"algorithm": "meanteacher_original"}, "MT, ours"),
        ({"num_labels": 1000}, "MUSCLE, ours"),
    ],
)
def test_a_run_of_another_algorithm_data_set_or_number_of_labels_is_in_no_table(make_run, tmp_path, changes, head):
    make_run("muscle_cifar10_1000", 0, 0.86)
    make_run("muscle_cifar10_500", 0, 0.79, **changes)
    _, markdown = made(tmp_path)
    assert row(markdown, head)[1] == "–"
    assert row(markdown, "MUSCLE, ours") == ["86.00 (n = 1) +0.54 ✓", "–", "–", "–"]
    assert row(markdown, "muscle_cifar10_500")[1] == "79.00 (n = 1)"


def test_the_graph_baseline_has_a_row_for_each_data_set_and_number_of_labels_and_no_rank(make_run, tmp_path):
    """Its splits are the runs'; what cannot be read is one line, and the report is written."""
    for seed, (a, score) in product((0, 1), {"supervised": 0.5, "fixmatch": 0.7, "muscle": 0.8}.items()):
        for labels in (10, 100):
            make_run(f"{a}_digits_{labels}", seed, score)
    make_run("muscle_fixmatch_folder", 0, 0.9, data_dir=str(tmp_path / "nowhere"), num_labels=20)
    make_run("muscle_fixmatch_folder", 1, 0.9, data_dir=str(tmp_path / "nowhere"), num_labels=20)
    html, markdown = made(tmp_path, "--graph-baseline")
    settings = [load_settings("muscle_digits_10", seed=seed).settings for seed in (0, 1)]
    measured = [on_pixels(s) for s in settings]
    for method in METHODS:
        text = summary([of_seed[method][0] for of_seed in measured])
        assert f"\n| digits, 10 labels, 16 x 16 | {method} | {text} |" in markdown
        assert text in html
        assert markdown.count(method) == 2  # with 10 and with 100 labels; it has no rank
    assert row(markdown, "muscle") == ["1.00", "80.00", "80.00"]
    assert re.search(r"\n\| folder, 20 labels, .* \| not measured: .*nowhere: no such folder", markdown)
    assert "cannot be read" not in html
    report([str(tmp_path / "out" / "runs.jsonl"), "--out", str(tmp_path / "again"), "--graph-baseline"])
    again = (tmp_path / "again" / "report.md").read_text()
    both = ([x.rpartition(")")[0] for x in m.splitlines() if "no training" in x] for m in (markdown, again))
    assert next(both) == next(both)  # but for the seconds


def test_the_graph_baseline_sees_no_label_but_those_of_the_split(monkeypatch):
    settings = load_settings("muscle_digits_10").settings
    source = load_data(settings)
    labelled = source.train[choose_split(settings, source).labelled]
    expected = {name: accuracy for name, (accuracy, _) in on_pixels(settings).items()}
    hidden = source.labels.clone()
    hidden[source.train] = -1
    hidden[labelled] = source.labels[labelled]
    monkeypatch.setattr(graph_baseline, "load_data", lambda _: replace(source, labels=hidden))
    assert {name: accuracy for name, (accuracy, _) in on_pixels(settings).items()} == expected


def test_a_run_with_another_number_of_labels_is_ranked_with_no_configuration(make_run, tmp_path):
    for seed in range(2):
        for a, score in (("supervised", 0.5), ("fixmatch", 0.7), ("muscle", 0.8)):
            make_run(f"{a}_digits_100", seed, score)
            make_run(f"{a}_digits_20", seed, score)
        make_run("fixmatch_digits_100", seed, 0.99, where="runs/changed", num_labels=10)
    _, markdown = made(tmp_path)
    assert row(markdown, "FixMatch") == ["–", "70.00 ± 0.00 (n = 2)", "–", "70.00 ± 0.00 (n = 2)"]
    assert row(markdown, "fixmatch") == ["2.00", "70.00", "70.00"]
    assert row(markdown, "fixmatch_digits_100")[:2] == ["10", "99.00 (n = 2)"]


def test_runs_that_start_from_other_weights_are_apart_unless_the_configuration_says_so(make_run, tmp_path):
    make_run("muscle_cifar10_1000", 0, 0.86)
    make_run("muscle_cifar10_1000", 1, 0.66, init_from="elsewhere/some_run_0/latest_model.pth")
    for seed in (0, 1):
        make_run("muscle_cifar10_250_after_cl", seed, 0.7 + 0.02 * seed, save_dir="elsewhere")
    _, markdown = made(tmp_path)
    assert row(markdown, "MUSCLE, ours")[0] == "86.00 (n = 1) +0.54 ✓; 66.00 (n = 1) [1]"
    assert "init_from some_run instead of the default" in markdown
    assert row(markdown, "fine-tuned by MUSCLE")[0] == "71.00 ± 1.41 (n = 2)"
    assert "not the figure's configuration" not in markdown


def test_pretraining_without_labels_has_no_accuracy(make_run, tmp_path):
    for seed in (0, 1):
        make_run("contrastive_cifar10_250_pretrain", seed, 0.1)
    html, markdown = made(tmp_path)
    assert "10.00" not in markdown.split("## All runs")[0]
    assert markdown.count("finished, pre-trained") == 2
    assert "finished, pre-trained" in html


def test_failed_and_cut_off_runs_and_damaged_folders_are_shown(make_run, tmp_path):
    make_run("muscle_digits_10", 0, 0.9)
    failed = make_run("muscle_digits_10", 1, 0.9)
    (failed / "failure.json").write_text(json.dumps({"error": "OutOfMemoryError: <no> memory", "at": "now"}))
    make_run("muscle_digits_10", 2, 0.9, stopped_at=500)
    never = make_run("fixmatch_digits_10", 0, 0.9)
    for name in ("result.json", "environment.json", "metrics.jsonl"):
        (never / name).unlink()
    (never / "failure.json").write_text(json.dumps({"error": "RunError: no data", "config": "fixmatch_digits_10"}))
    damaged = make_run("muscle_digits_10", 3, 0.9)
    (damaged / "result.json").write_text("{")
    html, markdown = made(tmp_path)
    assert row(markdown, "MUSCLE")[0] == "90.00 (n = 1) (1 failed, 1 cut off)"
    assert row(markdown, "FixMatch")[0] == "(1 failed)"
    assert "muscle_digits_10_1: failed: OutOfMemoryError: &lt;no> memory" in markdown
    assert "muscle_digits_10_2: cut off at step 500 of 1200" in markdown
    assert "OutOfMemoryError: &lt;no&gt; memory" in html
    assert "cannot be read" in html
    assert "muscle_digits_10_3" in html


def test_a_run_whose_metrics_end_in_half_a_line_is_shown(make_run, tmp_path, capsys):
    for seed in range(3):
        path = make_run("muscle_digits_10", seed, 0.9) / "metrics.jsonl"
        path.write_bytes(path.read_bytes()[: -(1, 2, 60)[seed]])  # without its line end; cut off in the last line
    _, markdown = made(tmp_path)
    assert row(markdown, "MUSCLE")[0] == "90.00 ± 0.00 (n = 3)"
    assert capsys.readouterr().err == ""
    counts = [len(json.loads(line)["evaluations"]) for line in (tmp_path / "out" / "runs.jsonl").open()]
    assert counts == [4, 3, 3]
    path.write_text(path.read_text().replace("}", "", 1))  # damaged in its middle
    made(tmp_path)
    assert re.fullmatch(r"note: left out: .*muscle_digits_10_2: metrics\.jsonl: line 1: .*\n", capsys.readouterr().err)


def strict(text):
    """JSON text as any other reader has it: NaN and Infinity are none."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("value", ["null", "NaN"])
def test_what_was_not_finite_is_a_gap_for_every_reader(make_run, tmp_path, capsys, value):
    classic(make_run)
    path = tmp_path / "runs" / "classic_cv-muscle_fixmatch_cifar10_40_0"
    for key in ("eval/loss", "eval/top-5-acc", "lr", "eval/top-1-acc"):
        lines = (path / "metrics.jsonl").read_text().splitlines()
        number = 1 if key == "eval/top-1-acc" else 0
        lines[number] = re.sub(f'"{key}": [^,]+', f'"{key}": {value}', lines[number])
        (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    result = re.sub('"entropy": [^,]+', f'"entropy": {value}', (path / "result.json").read_text())
    (path / "result.json").write_text(result)
    made(tmp_path)
    assert capsys.readouterr().err == ""
    summaries = [strict(line) for line in (tmp_path / "out" / "runs.jsonl").open()]
    (mine,) = [s for s in summaries if s["path"].endswith("cifar10_40_0")]
    assert [step for step, _ in mine["evaluations"]] == [262_144, 786_432, 1_048_576]
    assert mine["result"]["last_evaluation"]["entropy"] is None
    assert report([str(tmp_path / "out" / "runs.jsonl"), "--out", str(tmp_path / "again")]) == 0
    assert exported(tmp_path) == 0
    log = tmp_path / "usb" / "saved_models" / "classic_cv" / "muscle_fixmatch_cifar10_40_0" / "log.txt"
    assert [line.split("] ")[1].split()[0] for line in log.read_text().splitlines()] == ["262144", "786432", "1048576"]
    assert not re.search("None|nan|inf", log.read_text())


@pytest.mark.parametrize("value", ["null", "NaN"])
def test_a_finished_run_without_a_finite_accuracy_has_none(make_run, tmp_path, value):
    path = make_run("muscle_digits_10", 0, 0.9)
    for name in ("result.json", "metrics.jsonl"):
        text = (path / name).read_text()
        (path / name).write_text(re.sub('("[a-z0-9]+_top1"|"eval/top-1-acc"): [^,]+', rf"\1: {value}", text))
    html, markdown = made(tmp_path)
    assert "| muscle_digits_10_0 | finished |  |  |  | 1200 |" in markdown
    assert "<h2>Curves<" not in html


def test_no_warning_of_a_library_is_printed(make_run, tmp_path, recwarn):
    for a in ("muscle", "fixmatch", "supervised"):  # all alike, so that the Friedman test divides 0 by 0
        for labels in (10, 20, 100):
            make_run(f"{a}_digits_{labels}", 0, 0.5)
    for seed in range(1, 100):  # more than a legend has room for
        make_run("muscle_digits_10", seed, 0.5)
    for number in range(12):  # names that are long, and in a script that the font lacks
        path = make_run("muscle_digits_10", number, 0.5, where="other", num_labels=20, lr=0.01 + number / 1000)
        path.rename(path.parent / f"{'猫' * 60}{number}_{number}")
    (tmp_path / "other").rename(tmp_path / "runs" / "other")
    _, markdown = made(tmp_path)
    assert "## Ranking" in markdown
    assert "p = 1;" in markdown
    assert [str(w.message) for w in recwarn] == []


def test_a_legend_has_as_many_lines_as_it_has_colours(monkeypatch):
    lines = [(f"seed {i}", [SimpleNamespace(curve=lambda _: {1: 0.5, 2: 0.6})]) for i in range(50)]
    figures = []
    monkeypatch.setattr(plots, "_svg", figures.append)
    plots.accuracy_curves(lines)
    plots.accuracy_curves(lines[:20])
    many, few = [f.axes[0].get_legend() for f in figures]
    assert len(figures[0].axes[0].lines) == 50
    assert (
        [t.get_text() for t in many.get_texts()]
        == [t.get_text() for t in few.get_texts()]
        == [n for n, _ in lines[:20]]
    )
    assert (many.get_title().get_text(), few.get_title().get_text()) == ("the first 20 of 50", "")


@pytest.mark.slow
def test_order_and_overlap_of_folders_do_not_matter_and_summaries_say_the_same(make_run, tmp_path):
    for seed in (0, 1):
        make_run("muscle_digits_10", seed, 0.9, where="runs/a")
        make_run("supervised_digits_10", seed, 0.6, where="runs/b")
        make_run("fixmatch_digits_10", seed, 0.8, where="runs/b", lr=0.1)
    a, b = str(tmp_path / "runs/a"), str(tmp_path / "runs/b")
    texts = []
    for i, words in enumerate(([a, b], [b, a, a], [str(tmp_path / "runs"), b], [str(tmp_path / "0" / "runs.jsonl")])):
        assert report([*words, "--out", str(tmp_path / str(i))]) == 0
        text = (tmp_path / str(i) / "report.md").read_text()
        texts.append("\n".join(line for line in text.splitlines() if "muscle-plugin report" not in line))
    assert texts[0] == texts[1] == texts[2] == texts[3]
    assert "lr 0.1 instead of 0.05" in texts[0]


@pytest.mark.slow
def test_figures_have_a_picture_each_and_figure_3_six(make_run, tmp_path):
    for a in ("supervised", "meanteacher_original", "muscle"):
        for n in (80, 400):
            make_run(f"{a}_cifar20_{n}", 0, 0.4)
    make_run("muscle_meanteacher_original_cifar10_250_r2", 0, 0.7)
    make_run("muscle_cifar10_250_nodropout", 0, 0.7, num_train_iter=400, epoch=4)
    html, _ = made(tmp_path)
    assert re.search("not the figure's configuration</b>: MUSCLE, without: epoch 4 instead of 180", html)
    assert len(re.findall('alt="Figure 3', html)) == 6
    assert len(re.findall(r'alt="Figure 2 \(a\)', html)) == 1
    assert len(re.findall(r'alt="Figure 2 \(b\)', html)) == 1
    assert "Figure 2 (c)" not in html


def test_runs_of_no_study_are_listed(make_run, tmp_path):
    make_run("muscle_labelprop_cifar10_250", 0, 0.625)
    _, markdown = made(tmp_path)
    assert row(markdown, "muscle_labelprop_cifar10_250")[:2] == ["250", "62.50 (n = 1)"]


def own(make_run, where, seed, score, name="muscle_digits_10", **settings):
    """A run of a configuration that is none of benchmark_configs."""
    path = make_run(name, seed, score, where=f"runs/{where}", **settings)
    about = json.loads((path / "environment.json").read_text()) | {"config": None}
    (path / "environment.json").write_text(json.dumps(about))
    return path.rename(path.with_name(f"mine_{seed}"))


def test_runs_of_other_settings_are_apart_though_their_folders_have_one_name_and_summaries_keep_all(make_run, tmp_path):
    for seed in (0, 1):
        own(make_run, "a", seed, 0.5 + 0.1 * seed, lr=0.1)
        own(make_run, "b", seed, 0.9, lr=0.01, split_file=f"x_{seed}/split.json")
        own(make_run, "c", seed, 0.7, name="fixmatch_digits_10")
    _, markdown = made(tmp_path)
    assert [line for line in markdown.splitlines() if line.startswith("| mine |")] == [
        "| mine | 10 | 55.00 (n = 2) |  algorithm muscle, lr 0.1, split_file the default |",
        "| mine | 10 | 90.00 (n = 2) |  algorithm muscle, lr 0.01, split_file x |",
        "| mine | 10 | 70.00 (n = 2) |  algorithm fixmatch, lr 0.05, split_file the default |",
    ]
    assert (
        report([str(tmp_path / "out" / "runs.jsonl"), str(tmp_path / "runs" / "a"), "--out", str(tmp_path / "2")]) == 0
    )
    again = (tmp_path / "2" / "report.md").read_text()
    assert again.split("\n", 5)[5] == markdown.split("\n", 5)[5]


def test_algorithms_of_one_name_and_setting_are_ranked_each_for_itself(make_run, tmp_path):
    for n in (10, 20):
        for where, lr, score in (("a", 0.1, 0.5), ("b", 0.01, 0.9)):
            own(make_run, f"{where}{n}", 0, score, f"muscle_digits_{n}", lr=lr)
    groups = groups_of(find_runs([tmp_path / "runs"])[0])
    scores = scores_by_setting(groups, "last")
    assert sorted(v for row in scores.values() for v in row.values()) == [50, 50, 90, 90]


def test_a_copy_of_a_run_counts_once_and_another_run_of_its_seed_is_pointed_out(make_run, tmp_path):
    for seed in (0, 1):
        path = make_run("muscle_digits_10", seed, 0.8 + 0.1 * seed)
        shutil.copytree(path, tmp_path / "runs" / "copy" / path.name)
    _, markdown = made(tmp_path)
    assert row(markdown, "MUSCLE")[0] == "85.00 ± 7.07 (n = 2)"
    again = make_run("muscle_digits_10", 1, 0.7, where="runs/again")
    about = json.loads((again / "environment.json").read_text()) | {"started": "2026-11-02T10:00:00+00:00"}
    (again / "environment.json").write_text(json.dumps(about))
    _, markdown = made(tmp_path)
    assert row(markdown, "MUSCLE")[0] == "80.00 ± 10.00 (n = 3) (seed 1 2 times)"


@pytest.mark.parametrize("there", [False, True])
def test_without_runs_one_line_says_so(tmp_path, capsys, there):
    if there:
        (tmp_path / "runs").mkdir()
    assert report([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert ("no run in it" if there else "no such folder") in error


# ----------------------------------------------------------------------------------------------------------------- page


class _Sources(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.sources = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]


def full(make_run):
    """Runs for a page with every section, and names that would break one that did not escape them."""
    for seed in range(3):
        for i, a in enumerate(("supervised", "fixmatch", "muscle", "muscle_fixmatch")):
            for n in (10, 20, 40):
                make_run(f"{a}_digits_{n}", seed, 0.5 + 0.1 * i + 0.01 * seed + n / 1000)
        make_run("muscle_cifar10_250", seed, 0.7 + 0.01 * seed)
        make_run("muscle_cifar20_80", seed, 0.4)
    evil = make_run("muscle_digits_100", 0, 0.5)
    environment = json.loads((evil / "environment.json").read_text()) | {
        "command": ["<script>document.title='x'</script>", '"onload="x'], "git_revision": "<img src=http://127.0.0.1/x>",
    }  # fmt: skip
    (evil / "environment.json").write_text(json.dumps(environment))
    (evil / "failure.json").write_text(json.dumps({"error": "<script>fetch('http://127.0.0.1/')</script>"}))
    evil.rename(evil.parent / "<img src=x onerror=alert(1)>_0")


@pytest.mark.slow
def test_the_page_needs_nothing_else_and_escapes_names(make_run, tmp_path):
    full(make_run)
    html, markdown = made(tmp_path, "--title", "<b>&")
    page = _Sources()
    page.feed(html)
    assert "script" not in page.tags
    assert page.tags.count("img") > 5
    assert all(s.startswith(("data:", "#")) for s in page.sources)
    assert "&lt;b&gt;&amp;" in html
    assert "<script" not in markdown


@pytest.mark.skipif(not shutil.which("chromium"), reason="Debian's chromium is not installed (apt install chromium)")
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser_nothing_is_requested_complains_or_overflows(make_run, tmp_path, width):
    sync_api = pytest.importorskip("playwright.sync_api")
    full(make_run)
    made(tmp_path)
    url = (tmp_path / "out" / "report.html").as_uri()
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        said, asked = [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        page.wait_for_timeout(200)
        wide = page.evaluate("document.scrollingElement.scrollWidth")
        broken = page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length")
        small = page.evaluate(
            "Math.min(...[...document.querySelectorAll('td')].map(e => parseFloat(getComputedStyle(e).fontSize)))"
        )
        seen = page.evaluate("document.body.innerText")
        browser.close()
    assert said == []
    assert [u for u in asked if not u.startswith("data:")] == [url]
    assert wide <= width
    assert broken == 0
    assert small >= 12
    assert "MUSCLE+FixMatch" in seen
    assert "<script>fetch('http://127.0.0.1/')</script>" in seen


# -------------------------------------------------------------------------------------------------------------- ranking


def test_ranks_are_means_over_settings_with_shared_ranks_for_ties():
    # ranks by hand: s1: a 1, b 2, c 3; s2: a 1.5, b 1.5, c 3; s3: b 1, a 2, c 3
    scores = {"s1": {"a": 9, "b": 8, "c": 7}, "s2": {"a": 5, "b": 5, "c": 1}, "s3": {"a": 2, "b": 3, "c": 1}}
    found = rank(scores)
    assert found.ranks == {"a": pytest.approx(1.5), "b": pytest.approx(1.5), "c": pytest.approx(3)}
    # Friedman's statistic by its formula, with the correction for the tie: sum of squared deviations over the mean variance
    means = np.array([1.5, 1.5, 3.0])
    statistic = 3 * ((means - 2) ** 2).sum() / ((1 + 0.75 + 1) / 3)
    assert found.p_value == pytest.approx(np.exp(-statistic / 2))  # chi-squared with 2 degrees of freedom


def test_what_muscle_adds_is_paired_by_seed(make_run, tmp_path):
    base, own = (0.5, 0.6, 0.4), (0.55, 0.63, 0.51)
    for seed in range(3):
        make_run("fixmatch_digits_10", seed, base[seed])
        make_run("muscle_fixmatch_digits_10", seed, own[seed])
    make_run("muscle_fixmatch_digits_10", 3, 0.1)  # without its base
    make_run("muscle_digits_10", 0, 0.6)
    make_run("supervised_digits_10", 0, 0.58)
    differences = [100 * (b - a) for a, b in zip(base, own, strict=True)]
    mean = sum(differences) / 3
    half = 4.3027 * np.std(differences, ddof=1) / 3**0.5
    _, text = made(tmp_path)
    assert f"| over fixmatch | {mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}] (n = 3) |" in text
    assert "| over supervised | +2.0 (n = 1) |" in text


def test_critical_difference_is_that_of_demsars_example():
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)  # Demsar 2006, section 3.2.2: 2.569 sqrt(20/84)


def test_what_the_runs_do_not_cover_is_left_out():
    whole = {s: {"a": 3, "b": 2, "c": 1} for s in ("s1", "s2", "s3")}
    whole["s1"]["d"] = 4
    found = rank({**whole, "s4": {"a": 1, "d": 2}})
    assert set(found.ranks) == {"a", "b", "c"}
    assert found.settings == ("s1", "s2", "s3")
    assert set(found.left_out) == {"d", "s4"}
    assert rank({"s1": {"a": 1, "b": 2, "c": 3}}) is None
    assert rank({"s1": {"a": 1, "b": 2}, "s2": {"a": 1, "b": 2}}) is None


def test_algorithms_are_ranked_on_the_seeds_that_they_share(make_run, tmp_path):
    for n in (10, 20):
        for seed in range(4):  # seed 3 is a lucky one, which muscle does not have
            for a, score in (("supervised", 0.5), ("fixmatch", 0.7), ("muscle", 0.8)):
                if (a, seed) != ("muscle", 3):
                    make_run(f"{a}_digits_{n}", seed, score + (0.19 if seed == 3 else 0.0))
        make_run(f"muscle_fixmatch_digits_{n}", 0, 0.95)
    _, markdown = made(tmp_path)
    assert row(markdown, "muscle") == ["1.00", "80.00", "80.00"]
    assert row(markdown, "fixmatch") == ["2.00", "70.00", "70.00"]
    assert "| muscle_fixmatch |" not in markdown  # one run of four


# ------------------------------------------------------------------------------------------------------------- USB's files


def classic(make_run, algorithm="muscle_fixmatch", **settings):
    for i, column in enumerate(columns("classic_cv")):
        for seed in range(3):
            make_run(f"classic_cv/{algorithm}_{column}", seed, 0.90 - 0.05 * i + 0.01 * seed, **settings)


def exported(tmp_path, *words):
    return cli.main(["usb-export", str(tmp_path / "runs"), "--out", str(tmp_path / "usb"), *words])


def test_rows_are_error_at_the_best_step_over_three_seeds_as_usb_writes_them(make_run, tmp_path):
    classic(make_run)
    assert exported(tmp_path) == 0
    raw = (tmp_path / "usb" / "results" / "classic_cv.csv").read_bytes()
    assert raw.startswith(b"\xef\xbb\xbf,cifar10_40,cifar10_250,cifar10_4000,svhn_40,")
    assert raw.endswith(b"\r\n")
    head, line = csv.reader(raw.decode("utf-8-sig").splitlines())
    assert len(head) == len(line) == 10
    errors = 100 * (1 - np.array([0.91, 0.92, 0.93]))
    assert (
        line[:2] == ["muscle_fixmatch", f"{round(errors.mean(), 2)}±{round(errors.std(), 2)}"] == [line[0], "8.0±0.82"]
    )


@pytest.mark.slow
def test_rows_are_added_to_usbs_file_and_replace_their_like(make_run, tmp_path, capsys):
    classic(make_run)
    classic(make_run, "fixmatch")
    results = tmp_path / "checkout" / "results"
    results.mkdir(parents=True)
    head = ",".join(["", *columns("classic_cv")])
    fixmatch = "fixmatch" + ",8.33±1.41" * 9
    old = "muscle_fixmatch" + ",1.0±0.1" * 9
    (results / "classic_cv.csv").write_bytes(f"\ufeff{head}\r\n{old}\r\n{fixmatch}\r\n".encode())
    (results / "usb_cv.csv").write_bytes(f"{','.join(['', *columns('usb_cv')])}\n".encode())
    assert exported(tmp_path, "--usb", str(tmp_path / "checkout"), "--algorithms", "muscle_fixmatch") == 0
    assert re.fullmatch(r"note: .*\bmuscle_fixmatch\b.*\bclassic_cv\.csv.*\n", capsys.readouterr().err)
    lines = (tmp_path / "usb" / "results" / "classic_cv.csv").read_text(encoding="utf-8-sig").splitlines()
    assert lines[0] == head
    assert lines[1].startswith("muscle_fixmatch,8.0±0.82,")
    assert lines[2] == fixmatch
    (results / "classic_cv.csv").write_text("something,else\n")
    assert exported(tmp_path, "--usb", str(tmp_path / "checkout")) == 2


def test_configurations_are_flat_and_give_the_settings_they_came_from(make_run, tmp_path):
    classic(make_run)
    assert exported(tmp_path) == 0
    files = sorted((tmp_path / "usb" / "config" / "classic_cv" / "muscle_fixmatch").glob("*.yaml"))
    assert len(files) == 27
    for path in files:
        flat = YAML(typ="safe", pure=True).load(path.read_text())
        assert all(isinstance(v, (str, int, float, bool)) for v in flat.values())
        assert flat["save_name"] == path.stem
        column, seed = path.stem.removeprefix("muscle_fixmatch_").rsplit("_", 1)
        ours = load_settings(f"classic_cv/muscle_fixmatch_{column}", seed=int(seed)).as_dict()
        read = resolve([Layer(path.name, dict(flat))]).as_dict()
        same_place = ("save_dir", "save_name", "resume", "load_path", "num_workers", "data_dir", "overwrite")
        assert {k: v for k, v in read.items() if k not in same_place} == {
            k: v for k, v in ours.items() if k not in same_place
        }


def test_logs_are_read_as_usbs_script_reads_them(make_run, tmp_path):
    classic(make_run)
    assert exported(tmp_path) == 0
    log = tmp_path / "usb" / "saved_models" / "classic_cv" / "muscle_fixmatch_cifar10_40_0" / "log.txt"
    lines = [line for line in log.read_text().splitlines(True) if line.endswith("iters\n")]
    # the expressions by which USB's scripts/average_log.py finds its figures
    top1 = [float(re.search(r"eval\/top-1-acc': (([0-9]|\.)*)", x).group(1)) for x in lines]
    top5 = [float(re.search(r"eval\/top-5-acc': (([0-9]|\.)*)", x).group(1)) for x in lines]
    best = [float(re.search(r"BEST_EVAL_ACC: (([0-9]|\.)*)", x).group(1)) for x in lines]
    assert top1 == pytest.approx([0.225, 0.45, 0.675, 0.9])
    assert top5 == pytest.approx([0.6125, 0.725, 0.8375, 0.95])
    assert best[-1] == 0.9
    assert re.search(r"at ([0-9]*)", lines[-1].split("BEST_EVAL_ACC")[1]).group(1) == "1048576"
    assert "1048576 iteration, USE_EMA: True, " in lines[-1]


def test_changed_or_incomplete_rows_are_refused_with_the_reason(make_run, tmp_path, capsys):
    classic(make_run)
    classic(make_run, "fixmatch", num_train_iter=1000, epoch=1)
    shutil.rmtree(tmp_path / "runs" / "classic_cv-muscle_fixmatch_svhn_40_2")
    assert exported(tmp_path) == 2
    said = capsys.readouterr().err
    assert re.search(r"classic_cv, muscle_fixmatch: .*\bsvhn_40 .* 2\b", said)
    assert re.search(r"classic_cv, fixmatch: .*\bcifar10_40 .* 0, 1, 2\b", said)
    assert re.search(r"\bepoch 1 .*\b1024, num_train_iter 1000 .*\b1048576\b", said)
    assert "no row" in said
    assert not (tmp_path / "usb").exists()


@pytest.mark.slow
def table_in(path, columns):
    """The lines of the table with these columns."""
    lines = path.read_text().splitlines()
    start = lines.index(f"| | {' | '.join(f'{n} labels' for n in columns)} |")
    return lines[start : lines.index("", start)]


def test_the_readmes_main_table_is_the_committed_reports_which_its_summaries_give(tmp_path):
    results, columns = ROOT / "results" / "frozen_cifar10", (10, 40, 100, 250, 1000)
    assert report([str(results / "runs.jsonl"), "--out", str(tmp_path)]) == 0
    fresh = table_in(tmp_path / "report.md", columns)
    assert len(fresh) == 2 + len({name.rsplit("_", 1)[0] for name in study_configs("frozen_cifar10")}) == 2 + 16
    assert all(line.count("(n = 5)") == 5 for line in fresh[2:])
    assert fresh == table_in(results / "report.md", columns) == table_in(ROOT / "README.md", columns)


def test_the_readmes_table_of_digits_is_the_committed_reports_which_its_summaries_give(tmp_path):
    summaries, columns = ROOT / "results" / "digits" / "runs.jsonl", (10, 20, 40, 100)
    assert report([str(summaries), "--out", str(tmp_path)]) == 0
    heads = [name.rsplit("_", 1)[0] for name in study_configs("digits")]
    assert len(set(heads)) == 18
    fresh = table_in(tmp_path / "report.md", columns)
    assert len(fresh) == 2 + 18
    assert fresh == table_in(ROOT / "results" / "digits" / "report.md", columns)
    committed = (ROOT / "results" / "digits" / "report.md").read_text()
    *trained, pixels, mbo = table_in(ROOT / "README.md", columns)
    assert fresh == trained
    for line, method in zip((pixels, mbo), METHODS, strict=True):
        untrained = [x.split(" | ") for x in committed.splitlines() if f" | {method} | " in x]
        assert [x[0] for x in untrained] == [f"| digits, {n} labels, 16 x 16" for n in columns]
        assert line.split(" | ")[1:] == [*(x[2] for x in untrained[:3]), f"{untrained[3][2]} |"]
