"""Pictures, by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from torch import Tensor

from muscle_plugin.bench.runs import Run, by_algorithm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

#: Curves of the right-hand picture: key, label, line style.
INFORMATION = (
    ("train/entropy", "H(z): entropy of the mean prediction", "--"),
    ("train/mi", "I(z, z'): mutual information", "-"),
    ("train/conditional_entropy", "H(z|z'): what the views disagree on", ":"),
)


def _band(axes: Any, runs: Sequence[Run], key: str, scale: float, **style: Any) -> None:
    """Mean over runs, and a band from the lowest to the highest, at the steps that all runs have."""
    curves = [dict(zip(*run.curve(key), strict=True)) for run in runs]
    steps = sorted(set.intersection(*(set(c) for c in curves)))
    if not steps:
        return
    values = np.array([[scale * c[s] for s in steps] for c in curves])
    (line,) = axes.plot(steps, values.mean(0), **style)
    if len(runs) > 1:
        axes.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)


def learning_curves(runs: Sequence[Run], names: Mapping[str, str], num_classes: int, title: str, path: Path) -> None:
    """Test accuracy over steps for every algorithm, and the information terms of those that have them.

    Args:
        runs: finished runs.
        names: algorithm -> name in the legend.
        num_classes: C; ln C bounds the information terms.
        path: PNG to write.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, (algorithm, group) in enumerate(by_algorithm(runs).items()):
        colour = f"C{number}"
        _band(left, group, "eval/top-1-acc", 100, color=colour, label=names.get(algorithm, algorithm))
        for key, _, style in INFORMATION:
            _band(right, group, key, 1, color=colour, linestyle=style)
    left.set(xlabel="step", ylabel="test accuracy (%)", title=title)
    left.legend(loc="lower right")
    right.axhline(math.log(num_classes), color="grey", linewidth=0.8)
    right.annotate(
        f"ln {num_classes}", (0, math.log(num_classes)), xytext=(2, 3), textcoords="offset points", color="grey"
    )
    for _, label, style in INFORMATION:
        right.plot([], [], color="black", linestyle=style, label=label)
    right.set(xlabel="step", ylabel="nats", title="mutual information between views (training)", ylim=(-0.1, None))
    right.legend(loc="center right", fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def contact_sheet(rows: Mapping[str, Tensor], path: Path) -> None:
    """Images in a grid, one row per view, one column per image.

    Args:
        rows: label -> (N, channels, H, W) float images in [0, 1].
        path: PNG to write.
    """
    count = max(len(x) for x in rows.values())
    figure, grid = plt.subplots(
        len(rows), count, figsize=(0.7 * count + 1.6, 0.75 * len(rows)), squeeze=False, layout="constrained"
    )
    for axes_row, (label, images) in zip(grid, rows.items(), strict=True):
        for axes in axes_row:
            axes.set(xticks=[], yticks=[])
        for axes, image in zip(axes_row, images, strict=False):
            shown = image.permute(1, 2, 0).cpu().numpy()
            axes.imshow(shown.squeeze(-1) if shown.shape[2] == 1 else shown, cmap="gray", vmin=0, vmax=1)
        axes_row[0].set_ylabel(label, rotation=0, ha="right", va="center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
