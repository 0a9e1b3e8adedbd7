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
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from muscle_plugin.files import write_text
from muscle_plugin.studies import plots
from muscle_plugin.studies.definitions import StudyFigure, StudyTable, figures, tables
from muscle_plugin.studies.groups import RULES, Group, Ours, groups_of, names_in_settings, ours_for, summary
from muscle_plugin.studies.ranking import Ranking, natural_key, rank, scores_by_setting
from muscle_plugin.studies.runs import ACCURACY, Run, find_runs, names_of, write_summaries
from muscle_plugin.text import one_line
from muscle_plugin.version import __version__


class TableRow(NamedTuple):
    """A row of a table: the paper's cells as printed, and what runs give."""

    head: str
    paper: list[str]
    ours: list[list[Ours]]


class ReportTable(NamedTuple):
    """A study's table, filled; ``notes`` are the deviations of runs in it."""

    study: StudyTable
    rows: list[TableRow]
    notes: list[str]


class Picture(NamedTuple):
    """A picture with its caption, as the page embeds it."""

    title: str
    source: str

    @staticmethod
    def of(title: str, svg: bytes) -> Picture:
        """A picture of an SVG file's content."""
        return Picture(title, "data:image/svg+xml;base64," + base64.b64encode(svg).decode())


class ReportFigure(NamedTuple):
    """A figure of the paper from runs: pictures, and their points as tables.

    Attributes:
        points: metric -> series -> a cell for each x of the study.
        notes: which points are of runs that are not as configured.
    """

    study: StudyFigure
    pictures: list[Picture]
    points: dict[str, dict[str, list[str]]]
    notes: list[str]


@dataclass(frozen=True)
class Report:
    """The content of a page."""

    title: str
    command: str
    made: str
    rule: str
    runs: list[Run]
    unread: list[str]
    tables: list[ReportTable]
    others: list[Group]
    figures: list[ReportFigure]
    ranking: Ranking | None
    rank_picture: Picture | None
    curves: list[Picture]
    run_curves: list[Picture]
    environments: list[tuple[str, int]]

    @property
    def labelled_runs(self) -> list[tuple[str, Run]]:
        """Runs with the names of their directories."""
        return list(zip(names_of(self.runs), self.runs, strict=True))

    @property
    def states(self) -> Counter[str]:
        """Number of runs by state."""
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
    in_a_table = {c for t in tables() for c in t.configs}
    filled = [_filled(t, groups, rule) for t in tables() if by_config.keys() & set(t.configs)]
    # configurations that a table has too do not make a figure, unless it has no others
    drawn = [f for f in figures() if by_config.keys() & (set(f.configs) - in_a_table or set(f.configs))]
    shown = {c for t in filled for c in t.study.configs} | {c for f in drawn for c in f.configs}
    ranking = rank(scores_by_setting(groups, rule))
    return Report(
        title, command, date.today().isoformat(), rule, runs, unread, filled,
        [g for g in groups if g.config not in shown],
        [_figure(f, by_config, rule) for f in drawn],
        ranking,
        Picture.of("mean ranks", plots.rank_diagram(ranking)) if ranking else None,
        _curves(groups),
        [Picture.of(g.name, plots.curves_of_runs(g.runs)) for g in groups if _has_curve(g)],
        Counter(_environment(r) for r in runs if r.environment).most_common(),
    )  # fmt: skip


def _figure(study: StudyFigure, groups: Mapping[str, Group], rule: str) -> ReportFigure:
    panels = plots.study_panels(study, groups, rule)
    points = {
        plots.PANELS[metric]: {
            head: [
                summary(groups[config].scores(rule, metric)) if (config := at.get(x, "")) in groups else ""
                for x in study.xs
            ]
            for head, at in study.series.items()
        }
        for metric in panels
    }
    notes = [
        f"{head}, {x}: {groups[config].deviation}"
        for head, at in study.series.items()
        for x, config in at.items()
        if config in groups and groups[config].deviation
    ]
    return ReportFigure(study, [Picture.of(plots.PANELS[m], svg) for m, svg in panels.items()], points, notes)


def _filled(study: StudyTable, groups: Sequence[Group], rule: str) -> ReportTable:
    rows = []
    for head, cells in zip(study.rows, study.cells, strict=True):
        paper = ["" if c.paper is None else f"{c.paper[0]:.2f} ± {c.paper[1]:.2f}" for c in cells]
        ours = [ours_for(c, groups, rule) for c in cells]
        if any(ours) or study.of_paper:
            rows.append(TableRow(head, paper, ours))
    deviations = dict.fromkeys(o.deviation for row in rows for cell in row.ours for o in cell if o.deviation)
    return ReportTable(study, rows, list(deviations))


def _has_curve(group: Group) -> bool:
    return any(ACCURACY in m for r in group.runs for m in r.metrics if not r.pretrained)


def _curves(groups: Sequence[Group]) -> list[Picture]:
    """A picture per setting that has several algorithms."""
    settings: dict[str, dict[str, list[Run]]] = {}
    for group, name in zip(groups, names_in_settings(groups), strict=True):
        if _has_curve(group):
            settings.setdefault(group.setting, {})[name] = [r for r in group.runs if r.metrics]
    return [
        Picture.of(setting, plots.accuracy_curves(settings[setting]))
        for setting in sorted(settings, key=natural_key)
        if len(settings[setting]) > 1
    ]


def _environment(run: Run) -> str:
    e = run.environment
    device = e.get("gpu") or f"{e.get('device', '?')} ({e.get('processor', '?')}, {e.get('threads', '?')} thread(s))"
    packages = ", ".join(f"{n} {e[n]}" for n in ("torch", "semilearn", "python") if e.get(n))
    return f"{device}, {e.get('precision', 'fp32')}; {packages}; revision {e.get('git_revision') or '?'}"


# ------------------------------------------------------------------------------------------------------------- rendering


def _cell(text: object) -> str:
    """Text that is text within a cell of a Markdown table or a line: neither HTML, nor a link, nor a picture, nor code."""
    words = one_line(str(text).replace("\n", " ")).replace("\\", "\\\\").replace("<", "&lt;")
    return re.sub(r"([|\[\]`])", r"\\\1", words)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"


def render(report: Report, kind: str) -> str:
    """The report as ``html``, one page that needs nothing else, or as ``md``."""
    templates = Environment(
        loader=PackageLoader("muscle_plugin.studies", "templates"), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, autoescape=kind == "html",
    )  # fmt: skip
    templates.filters |= {
        "percent": _percent,
        "cell": _cell,
        "oneline": one_line,
    }
    page = templates.get_template(f"report.{kind}")
    return page.render(r=report, rule=RULES[report.rule], version=__version__)


# ---------------------------------------------------------------------------------------------------------- command line


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
    options = parser.parse_args(list(argv))
    runs, unread = find_runs(options.runs)
    report = make_report(runs, unread, options.score, options.title, shlex.join([*prog.split(), *argv]))
    for kind in ("html", "md"):
        write_text(options.out / f"report.{kind}", render(report, kind))
    write_summaries(runs, options.out / "runs.jsonl")
    for line in unread:
        print(f"note: left out: {one_line(line)}", file=sys.stderr)
    states = ", ".join(f"{n} {state}" for state, n in report.states.most_common())
    print(f"{len(runs)} runs ({states}). Written: {options.out / 'report.html'}, report.md, runs.jsonl")
    return 0
