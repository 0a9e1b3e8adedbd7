"""``muscle-plugin report``: what run directories hold, as one HTML page and as Markdown."""

from __future__ import annotations

import argparse
import base64
import re
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from muscle_plugin.files import write_text
from muscle_plugin.studies import plots
from muscle_plugin.studies.definitions import StudyFigure, StudyTable, figures, tables
from muscle_plugin.studies.groups import RULES, Group, Ours, groups_of, names_in_settings, ours_for, summary
from muscle_plugin.studies.ranking import Ranking, natural_key, rank, scores_by_setting
from muscle_plugin.studies.runs import ACCURACY, Run, find_runs, names_of, write_summaries
from muscle_plugin.text import one_line
from muscle_plugin.version import __version__


@dataclass(frozen=True)
class TableRow:
    """A row of a table: the paper's cells as printed, and what runs give."""

    head: str
    paper: tuple[str, ...]
    ours: tuple[list[Ours], ...]


@dataclass(frozen=True)
class ReportTable:
    """A study's table, filled."""

    study: StudyTable
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """A picture with its caption, as the page embeds it."""

    title: str
    source: str

    @staticmethod
    def of(title: str, svg: bytes) -> Picture:
        """From an SVG file's content."""
        return Picture(title, "data:image/svg+xml;base64," + base64.b64encode(svg).decode())


@dataclass(frozen=True)
class ReportFigure:
    """A figure of the paper from runs: pictures, and their points as tables.

    Attributes:
        points: metric -> series -> a cell for each of ``xs``.
        notes: which points are of runs that are not as configured.
    """

    title: str
    pictures: list[Picture]
    x: str
    xs: list[str]
    points: dict[str, dict[str, list[str]]]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """All that a page says."""

    title: str
    command: str
    made: str
    rule: str
    runs: list[Run]
    groups: list[Group]
    unread: list[str]
    tables: list[ReportTable]
    others: list[Group]
    figures: list[ReportFigure]
    ranking: Ranking | None
    rank_picture: Picture | None
    curves: list[Picture]
    run_curves: list[Picture]
    environments: list[tuple[str, int]]

    def label(self, run: Run) -> str:
        """The name of a run's directory, with that of its folder where the name alone is not enough."""
        return next(name for name, r in zip(names_of(self.runs), self.runs, strict=True) if r is run)

    @property
    def states(self) -> Counter[str]:
        """Runs by state."""
        return Counter(r.state for r in self.runs)


def make_report(runs: list[Run], unread: list[str], rule: str, title: str, command: str) -> Report:
    """Put together what is said of runs.

    Args:
        runs, unread: from :func:`muscle_plugin.studies.runs.find_runs`.
        rule: ``last``, ``best`` or ``median20``: which top-1 accuracy of a run counts.
        title: of the page.
        command: that made it.
    """
    groups = groups_of(runs)
    by_config = {g.config: g for g in reversed(groups) if g.config}  # without deviation where there is such a group
    present = set(by_config)
    shown = [_fill(t, groups, rule) for t in tables() if present & set(t.configs)]
    in_tables = {c for t in shown for c in t.study.configs}
    drawn = [(f, plots.study_panels(f, by_config, rule)) for f in figures() if present & _own(f)]
    in_figures = {c for f, _ in drawn for c in f.configs}
    ranking = rank(scores_by_setting(groups, rule))
    return Report(
        title, command, date.today().isoformat(), rule, runs, groups, unread, shown,
        [g for g in groups if g.config not in in_tables | in_figures],
        [_figure(f, panels, by_config, rule) for f, panels in drawn],
        ranking,
        Picture.of("mean ranks", plots.rank_diagram(ranking)) if ranking else None,
        _curves(groups),
        [Picture.of(g.name, plots.curves_of_runs(g.runs)) for g in groups if _has_curve(g)],
        Counter(_environment(r) for r in runs if r.environment).most_common(),
    )  # fmt: skip


def _own(figure: StudyFigure) -> set[str]:
    """The configurations that stand for a figure: those that no table has, where there are any."""
    of_tables = {c for t in tables() for c in t.configs}
    return set(figure.configs) - of_tables or set(figure.configs)


def _figure(figure: StudyFigure, panels: Mapping[str, bytes], groups: Mapping[str, Group], rule: str) -> ReportFigure:
    tables: dict[str, dict[str, list[str]]] = {}
    for metric in figure.metrics:
        name = plots.PANELS.get(metric, metric)
        if name in panels:
            tables[name] = {
                head: [
                    summary(groups[c].scores(rule, metric)) if (c := points.get(x, "")) in groups else ""
                    for x in figure.xs
                ]
                for head, points in figure.series.items()
            }
    pictures = [Picture.of(n, p) for n, p in panels.items()]
    return ReportFigure(figure.title, pictures, figure.x, figure.xs, tables, _deviations(figure, groups))


def _deviations(figure: StudyFigure, groups: Mapping[str, Group]) -> tuple[str, ...]:
    """Which points of a figure are of runs that are not as configured."""
    shown = [
        (f"{name}, {x}", groups[c]) for name, points in figure.series.items() for x, c in points.items() if c in groups
    ]
    return tuple(f"{point}: {group.deviation}" for point, group in shown if group.deviation)


def _fill(study: StudyTable, groups: Sequence[Group], rule: str) -> ReportTable:
    rows = []
    for head, cells in zip(study.rows, study.cells, strict=True):
        paper = tuple("" if c.paper is None else f"{c.paper[0]:.2f} ± {c.paper[1]:.2f}" for c in cells)
        ours = tuple(ours_for(c, groups, rule) for c in cells)
        if any(ours) or study.of_paper:
            rows.append(TableRow(head, paper, ours))
    deviations = dict.fromkeys(o.deviation for row in rows for cell in row.ours for o in cell if o.deviation)
    return ReportTable(study, tuple(rows), tuple(deviations))


def _has_curve(group: Group) -> bool:
    return any(ACCURACY in m for r in group.runs for m in r.metrics if not r.pretrained)


def _curves(groups: Sequence[Group]) -> list[Picture]:
    """A picture per setting that has several algorithms."""
    settings: dict[str, dict[str, Sequence[Run]]] = {}
    for group, name in zip(groups, names_in_settings(groups), strict=True):
        if _has_curve(group):
            settings.setdefault(group.setting, {})[name] = [r for r in group.runs if r.metrics]
    return [
        Picture.of(setting, plots.accuracy_curves(lines))
        for setting, lines in sorted(settings.items(), key=lambda item: natural_key(item[0]))
        if len(lines) > 1
    ]


def _environment(run: Run) -> str:
    e = run.environment
    device = e.get("gpu") or f"{e.get('device', '?')} ({e.get('processor', '?')}, {e.get('threads', '?')} thread(s))"
    packages = ", ".join(f"{n} {e[n]}" for n in ("torch", "semilearn", "python") if e.get(n))
    return f"{device}, {e.get('precision', 'fp32')}; {packages}; revision {e.get('git_revision') or '?'}"


# ------------------------------------------------------------------------------------------------------------- rendering


def _templates() -> Environment:
    loader = PackageLoader("muscle_plugin.studies", "templates")
    env = Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=lambda name: bool(name and name.endswith(".html")),
    )  # fmt: skip
    env.filters |= {"percent": lambda x: "" if x is None else f"{100 * x:.2f}", "cell": _cell, "oneline": one_line}
    return env


def _cell(text: Any) -> str:
    """Text that is text within a cell of a Markdown table or a line: neither HTML, nor a link, nor a picture, nor code."""
    words = one_line(str(text).replace("\n", " ")).replace("\\", "\\\\").replace("<", "&lt;")
    return re.sub(r"([|\[\]`])", r"\\\1", words)


def render(report: Report, kind: str) -> str:
    """The report as ``html``, one page that needs nothing else, or as ``md``."""
    rule = RULES[report.rule]
    return _templates().get_template(f"report.{kind}").render(r=report, rule=rule, version=__version__)


# ---------------------------------------------------------------------------------------------------------- command line


def main(argv: Sequence[str], prog: str = "muscle-plugin report") -> int:
    """Returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Put runs together: tables beside the paper's, curves, ranking, every run; as one HTML page, as"
        " Markdown, and as summaries (runs.jsonl) that this command reads too.",
    )  # fmt: skip
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUNS", help="folders of runs at any depth, or runs.jsonl"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("report"), metavar="DIR", help="folder to write into [%(default)s]"
    )
    parser.add_argument(
        "--score", choices=list(RULES), default="last", help="which accuracy of a run counts [%(default)s]"
    )
    parser.add_argument("--title", default="MUSCLE: runs", help="title of the page [%(default)s]")
    options = parser.parse_args(list(argv))
    runs, unread = find_runs(options.runs)
    report = make_report(runs, unread, options.score, options.title, shlex.join([*prog.split(), *argv]))
    options.out.mkdir(parents=True, exist_ok=True)
    for kind in ("html", "md"):
        write_text(options.out / f"report.{kind}", render(report, kind))
    write_summaries(runs, options.out / "runs.jsonl")
    for line in unread:
        print(f"note: left out: {one_line(line)}", file=sys.stderr)
    states = ", ".join(f"{n} {state}" for state, n in report.states.most_common())
    print(f"{len(runs)} runs ({states}). Written: {options.out / 'report.html'}, report.md, runs.jsonl")
    return 0
