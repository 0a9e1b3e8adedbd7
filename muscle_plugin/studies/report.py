"""``muscle-plugin report``: what run directories hold, as one HTML page and as Markdown."""

from __future__ import annotations

import argparse
import base64
import re
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from muscle_plugin.files import write_text
from muscle_plugin.studies import plots
from muscle_plugin.studies.definitions import Cell, StudyFigure, StudyTable, figures, tables
from muscle_plugin.studies.groups import (
    Group,
    gains_of_muscle,
    groups_of,
    names_in_settings,
    natural_key,
    rank,
    scores_by_setting,
)
from muscle_plugin.studies.runs import ACCURACY, RULES, Run, find_runs, mean_and_std, names_of, summary, write_summaries
from muscle_plugin.text import one_line
from muscle_plugin.version import __version__


def _picture(title: str, svg: bytes) -> dict[str, str]:
    """A picture with its caption, as the page embeds it."""
    return {"title": title, "source": "data:image/svg+xml;base64," + base64.b64encode(svg).decode()}


def contents(runs: Sequence[Run], rule: str) -> dict[str, Any]:
    """What the templates say of runs, by their names for it; ``rule`` is one of :data:`RULES`."""
    groups = groups_of(runs)
    by_config = {g.config: g for g in reversed(groups) if g.config}  # without deviation where there is such a group
    in_a_table = {c for t in tables() for c in t.configs}
    filled = [t for t in tables() if by_config.keys() & set(t.configs)]
    # configurations that a table has too do not make a figure, unless it has no others
    drawn = [f for f in figures() if by_config.keys() & (set(f.configs) - in_a_table or set(f.configs))]
    shown = {c for t in filled for c in t.configs} | {c for f in drawn for c in f.configs}
    ranking = rank(scores_by_setting(groups, rule))
    gains = gains_of_muscle(groups, rule)
    run_curves = []
    settings: dict[str, dict[str, Sequence[Run]]] = {}
    for group, name in zip(groups, names_in_settings(groups), strict=True):
        if evaluated := [r for r in group.runs if r.curve(ACCURACY) and not r.pretrained]:
            seeds = [(f"seed {r.result.get('seed', '?')}", [r]) for r in evaluated]
            run_curves.append(_picture(group.name, plots.accuracy_curves(seeds)))
            settings.setdefault(group.setting, {})[name] = evaluated
    return {
        "rule": rule,
        "rules": RULES,
        "runs": runs,
        "labelled_runs": list(zip(names_of(runs), runs, strict=True)),
        "states": Counter(r.state for r in runs),
        "tables": [_table(t, groups, rule) for t in filled],
        "others": [g for g in groups if g.config not in shown],
        "figures": [_figure(f, by_config, rule) for f in drawn],
        "gains": gains,
        "bases": list(dict.fromkeys(base for of_setting in gains.values() for base in of_setting)),
        "ranking": ranking,
        "rank_picture": _picture("mean ranks", plots.rank_diagram(ranking)) if ranking else None,
        "curves": [
            _picture(setting, plots.accuracy_curves(list(lines.items())))
            for setting, lines in sorted(settings.items(), key=lambda item: natural_key(item[0]))
            if len(lines) > 1
        ],
        "run_curves": run_curves,
        "environments": Counter(_environment(r) for r in runs if r.environment).most_common(),
    }


def _figure(study: StudyFigure, groups: Mapping[str, Group], rule: str) -> dict[str, Any]:
    """A figure of the paper from runs; ``points`` are metric -> series -> a cell for each x."""
    series = {head: {x: groups[c] for x, c in at.items() if c in groups} for head, at in study.series.items()}
    pictures, points = [], {}
    for metric in study.metrics:
        title = plots.PANELS[metric]
        scores = {head: {x: g.scores(rule, metric) for x, g in there.items()} for head, there in series.items()}
        if any(s for there in scores.values() for s in there.values()):
            pictures.append(_picture(title, plots.study_panel(study, scores, title)))
            points[title] = {head: [summary(there.get(x, ())) for x in study.xs] for head, there in scores.items()}
    notes = [f"{head}, {x}: {g.deviation}" for head, there in series.items() for x, g in there.items() if g.deviation]
    return {"study": study, "pictures": pictures, "points": points, "notes": notes}


def _table(study: StudyTable, groups: Sequence[Group], rule: str) -> dict[str, Any]:
    """A table beside the paper's; ``notes`` are the deviations of its runs."""
    rows: list[dict[str, Any]] = []
    for head, cells in zip(study.rows, study.cells, strict=True):
        paper = ["" if c.paper is None else f"{c.paper[0]:.2f} ± {c.paper[1]:.2f}" for c in cells]
        ours = [[_ours(c, g, rule) for g in groups if g.config == c.config] for c in cells]
        if any(ours) or study.of_paper:
            rows.append({"head": head, "paper": paper, "ours": ours})
    deviations = [found["group"].deviation for row in rows for cell in row["ours"] for found in cell]
    return {"study": study, "rows": rows, "notes": list(dict.fromkeys(filter(None, deviations)))}


def _ours(cell: Cell, group: Group, rule: str) -> dict[str, Any]:
    """What a group gives for a cell; runs that deviate from the cell's configuration are not compared with the paper."""
    scores, difference, within = group.scores(rule, cell.metric), None, None
    if scores and cell.paper is not None and not group.deviation:
        difference = mean_and_std(scores)[0] - cell.paper[0]
        within = abs(difference) <= 2 * cell.paper[1]
    return {"group": group, "text": summary(scores), "difference": difference, "within": within}


def _environment(run: Run) -> str:
    e = run.environment
    device = e.get("gpu") or f"{e.get('device', '?')} ({e.get('processor', '?')}, {e.get('threads', '?')} thread(s))"
    packages = ", ".join(f"{n} {e[n]}" for n in ("torch", "semilearn", "python") if e.get(n))
    return f"{device}, {e.get('precision', 'fp32')}; {packages}; revision {e.get('git_revision') or '?'}"


def _cell(text: object) -> str:
    """Text in which Markdown sees no cell, HTML, link, picture or code."""
    words = one_line(str(text).replace("\n", " ")).replace("\\", "\\\\").replace("<", "&lt;")
    return re.sub(r"([|\[\]`])", r"\\\1", words)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"


def render(content: Mapping[str, object], kind: str) -> str:
    """The report as ``html``, one page that needs nothing else, or as ``md``."""
    templates = Environment(
        loader=PackageLoader("muscle_plugin.studies", "templates"), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, autoescape=kind == "html",
    )  # fmt: skip
    templates.filters |= {"percent": _percent, "cell": _cell, "oneline": one_line}
    return templates.get_template(f"report.{kind}").render(content)


def main(argv: Sequence[str], prog: str = "muscle-plugin report") -> int:
    """Return the exit status 0; bad input is raised as a UserError."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Put runs together: tables beside the paper's, curves, ranking, every run; as one HTML page, as"
        " Markdown, and as summaries (runs.jsonl) that this command reads too.",
    )  # fmt: skip
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUNS", help="folders of runs at any depth, or runs.jsonl")
    add("--out", type=Path, default=Path("report"), metavar="DIR", help="folder to write into [%(default)s]")
    add("--score", choices=list(RULES), default="last", help="which accuracy of a run counts [%(default)s]")
    add("--title", default="MUSCLE: runs", help="title of the page [%(default)s]")
    add("--graph-baseline", action="store_true", help="add label propagation on raw pixels, where nothing is trained, for each"
        " data set, number of labels and seed of the runs; reads the data")  # fmt: skip
    options = parser.parse_args(list(argv))
    runs, unread = find_runs(options.runs)
    baselines: list[dict[str, str]] = []
    if options.graph_baseline:
        from muscle_plugin.studies.graph_baseline import baseline_rows  # torch

        baselines = baseline_rows([r for r in runs if r.state == "finished"])
    content = contents(runs, options.score) | {
        "title": options.title, "command": shlex.join([*prog.split(), *argv]), "made": date.today().isoformat(),
        "version": __version__, "unread": unread, "baselines": baselines,
    }  # fmt: skip
    for kind in ("html", "md"):
        write_text(options.out / f"report.{kind}", render(content, kind))
    write_summaries(runs, options.out / "runs.jsonl")
    for line in unread:
        print(f"note: left out: {one_line(line)}", file=sys.stderr)
    states = ", ".join(f"{n} {state}" for state, n in Counter(r.state for r in runs).most_common())
    print(f"{len(runs)} runs ({states}). Written: {options.out / 'report.html'}, report.md, runs.jsonl")
    return 0
