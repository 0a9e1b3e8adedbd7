"""Pictures of runs and views."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from muscle_plugin.studies.definitions import StudyFigure
from muscle_plugin.studies.groups import Ranking
from muscle_plugin.studies.runs import ACCURACY, Run, mean_and_std
from muscle_plugin.text import shown

if TYPE_CHECKING:
    from torch import Tensor

matplotlib.rcParams["svg.hashsalt"] = "muscle"  # the same picture is the same file
matplotlib.rcParams["text.parse_math"] = False  # names of runs are no formulas

#: Curves to draw: a name, and the runs to average.
Lines: TypeAlias = Sequence[tuple[str, Sequence[Run]]]
#: Curves of the mutual information: key, label, line style.
INFORMATION = (
    ("train/entropy", "H(z): entropy of the mean prediction", "--"),
    ("train/mi", "I(z, z'): mutual information", "-"),
    ("train/conditional_entropy", "H(z|z'): what the views disagree on", ":"),
)
#: Titles of the panels of Figure 3, by metric.
PANELS = {
    "top1": "test accuracy (%)",
    "labelled_classes/top-1-acc": "accuracy (%), classes with labels",
    "unlabelled_classes/top-1-acc": "accuracy (%), classes without labels",
    "entropy": "entropy of predictions (nats)",
    "labelled_classes/entropy": "entropy (nats), classes with labels",
    "unlabelled_classes/entropy": "entropy (nats), classes without labels",
}


def _write(figure: Figure, out: Path | BinaryIO, **style: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a name that the font cannot write: a box stands for it
        figure.savefig(out, **style)


def _svg(figure: Figure) -> bytes:
    out = io.BytesIO()
    _write(figure, out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _save(figure: Figure, path: Path, dpi: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(figure, path, dpi=dpi)


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _band(axes: Axes, runs: Sequence[Run], key: str, scale: float, **style: Any) -> None:
    """Draw mean and range over runs at the steps that all of them have."""
    curves = [run.curve(key) for run in runs]
    style.setdefault("marker", "o" if max(map(len, curves)) == 1 else None)
    steps = sorted(set.intersection(*(set(c) for c in curves)))
    if not steps:
        return
    values = np.array([[scale * c[s] for s in steps] for c in curves])
    (line,) = axes.plot(steps, values.mean(0), **style)
    if len(runs) > 1:
        axes.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)


def _accuracy(axes: Axes, lines: Lines, **legend: Any) -> None:
    palette = matplotlib.colormaps["tab10" if len(lines) <= 10 else "tab20"]
    for number, (name, runs) in enumerate(lines):
        label = shown(name, 70) if number < palette.N else None  # a longer legend would have no room
        _band(axes, runs, ACCURACY, 100, color=palette(number % palette.N), label=label, linewidth=1.4)
    axes.set(xlabel="step", ylabel="test accuracy (%)")
    more = f"the first {palette.N} of {len(lines)}" if len(lines) > palette.N else None
    axes.legend(loc="lower right", title=more, title_fontsize="x-small", **legend)
    _tidy(axes)


def learning_curves(lines: Lines, num_classes: int, title: str, path: Path) -> None:
    """Write a PNG of test accuracy over steps and of the information terms, which ln ``num_classes`` bounds."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _accuracy(left, lines)
    left.set(title=title)
    for number, (_, runs) in enumerate(lines):
        for key, _, style in INFORMATION:
            _band(right, runs, key, 1, color=f"C{number}", linestyle=style)
    bound = math.log(num_classes)
    right.axhline(bound, color="grey", linewidth=0.8)
    right.annotate(f"ln {num_classes}", (0, bound), xytext=(2, 3), textcoords="offset points", color="grey")
    for _, label, style in INFORMATION:
        right.plot([], [], color="black", linestyle=style, label=label)
    right.set(xlabel="step", ylabel="nats", title="mutual information between views (training)", ylim=(-0.1, None))
    right.legend(loc="center right", fontsize="small")
    _tidy(right)
    _save(figure, path, 130)


def contact_sheet(rows: Mapping[str, Tensor], path: Path) -> None:
    """Write a PNG of images in a grid: label -> (N, channels, H, W) float images in [0, 1], a row each."""
    count = max(len(x) for x in rows.values())
    figure = Figure(figsize=(0.7 * count + 1.6, 0.75 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), count, squeeze=False)
    for axes_row, (label, images) in zip(grid, rows.items(), strict=True):
        for axes in axes_row:
            axes.set(xticks=[], yticks=[])
        for axes, image in zip(axes_row, images, strict=False):
            axes.imshow(image.permute(1, 2, 0).squeeze(-1).cpu().numpy(), cmap="gray", vmin=0, vmax=1)
        axes_row[0].set_ylabel(label, rotation=0, ha="right", va="center")
    _save(figure, path, 110)


def accuracy_curves(lines: Lines) -> bytes:
    """Draw test accuracy over steps, mean and range over runs; returns an SVG."""
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    _accuracy(figure.subplots(), lines, fontsize="x-small", ncols=1 if any(len(n) > 30 for n, _ in lines) else 2)
    return _svg(figure)


def study_panel(study: StudyFigure, scores: Mapping[str, Mapping[str, Sequence[float]]], title: str) -> bytes:
    """Draw scores (series -> x -> those of its runs) with error bars of one standard deviation; returns an SVG."""
    numeric = all(x.replace(".", "", 1).isdigit() for x in study.xs)
    place = {x: float(x) if numeric else float(i) for i, x in enumerate(study.xs)}
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate(scores.items()):
        found = {x: mean_and_std(s) for x, s in points.items() if s}
        if found:
            offset = 0.0 if numeric else 0.04 * (number - (len(scores) - 1) / 2)
            at, (means, stds) = [place[x] + offset for x in found], zip(*found.values(), strict=True)
            width = 1.3 if numeric else 0
            axes.errorbar(at, means, stds, marker="o", capsize=3, linewidth=width, elinewidth=1, label=name)
    if numeric:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(list(place.values()), list(place))
    axes.set(xlabel=study.x, ylabel=title)
    axes.legend(fontsize="small")
    _tidy(axes)
    return _svg(figure)


def rank_diagram(ranking: Ranking) -> bytes:
    """Draw mean ranks on a line, with a bar over algorithms that do not differ at the 5 % level (Nemenyi); returns an SVG."""
    import scikit_posthocs

    different = scikit_posthocs.posthoc_nemenyi_friedman(np.array([*ranking.scores.values()]).T)
    different.index = different.columns = list(ranking.scores)
    figure = Figure(figsize=(7.5, 0.9 + 0.17 * len(ranking.ranks)), layout="constrained")
    scikit_posthocs.critical_difference_diagram(
        ranking.ranks, different, ax=figure.subplots(), label_props={"fontsize": 9}, text_h_margin=0.02
    )
    return _svg(figure)
