"""Class mass on the diffusion's solution, and Poisson MBO: ``docs/propagation.md``.

The class whose labelled point is a hub has the largest entries nearly everywhere in Z: with few labels ``argmax`` over
rows of Z follows the hubs. Class mass compares an entry with its class's mean instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from muscle_plugin.errors import InputError
from muscle_plugin.propagation.graph import AffinityGraph

CLASS_MASS = ("none", "uniform", "equal", "labels")
# of Poisson MBO, as its authors have them: steps of heat between two assignments of labels, and assignments at most
HEAT_STEPS, ROUNDS = 40, 20


def class_shares(class_mass: str | Sequence[float], labels: Tensor, num_classes: int) -> Tensor | None:
    """Return (C,) float32 shares of the points, 0 for classes without a label, others summing to 1; None where
    ``class_mass`` gives none ("none", "uniform").

    Raises:
        InputError: not one of ``CLASS_MASS`` or C finite numbers above 0.
    """
    counts = torch.bincount(labels[labels >= 0], minlength=num_classes)
    if isinstance(class_mass, str) and class_mass in CLASS_MASS:
        if class_mass in ("none", "uniform"):
            return None
        shares = (counts > 0).float() if class_mass == "equal" else counts.float()
    else:
        try:
            given = np.asarray(class_mass, np.float64)
        except (TypeError, ValueError):  # a string, a mapping, lists of unequal lengths
            given = np.empty(0)
        if given.shape != (num_classes,) or not (np.isfinite(given) & (given > 0)).all():
            expected = f"one of {', '.join(CLASS_MASS)}, or {num_classes} shares of the points, each above 0"
            raise InputError(f"class_mass: expected {expected}, received {class_mass!r}")
        shares = torch.as_tensor(given / given.max()).float().to(labels.device) * (counts > 0)
    return shares / shares.sum()


def has_mass(class_mass: str | Sequence[float]) -> bool:
    """Whether it is anything but "none"."""
    return not isinstance(class_mass, str) or class_mass != "none"


def even_mass(z: Tensor) -> Tensor:
    """Return Z, (n, C), with columns divided by their sums: class mass normalisation (Zhu, Ghahramani, Lafferty 2003)."""
    return z / z.sum(0).clamp(min=torch.finfo(z.dtype).tiny)


def scale_to_shares(z: Tensor, shares: Tensor) -> Tensor:
    """Return Z, (n, C), with columns scaled so that ``argmax`` gives classes their shares, (C,), of the points reached; rows
    are scaled, too.

    Scaling the sums of columns to unequal shares, as Zhu et al. have it, would give the largest class nearly everything:
    an entry differs little from its column's mean.
    """
    largest = z.amax(1, keepdim=True)
    reached = largest[:, 0] > 0
    z = z / torch.where(largest > 0, largest, 1)
    logs = z[reached].clamp(min=torch.finfo(z.dtype).tiny).log()
    _, shift = assign(logs, shares * reached.sum(), torch.zeros_like(shares))
    # a class that is alone on its part of the graph cannot be shifted away: its entries, 1, stay above 0
    return z * (shift - shift.max()).clamp(min=-60).exp()


def assign(scores: Tensor, sizes: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return (m,) ``argmax`` of ``scores + shift``, (m, C), and the (C,) shift with which each class gets nearly its size.

    The shift solves the dual of the assignment problem by sign-based steps (Rprop), from the one that is given.
    """
    step = torch.full_like(shift, 0.1) * scores.std().clamp(min=1e-12)
    limit = (0.01 * sizes).clamp(min=max(1, len(scores) / 1000))
    before = torch.zeros_like(shift)
    least, best = math.inf, (torch.empty(0), shift)
    for _ in range(100):
        labels = (scores + shift).argmax(1)
        excess = torch.bincount(labels, minlength=len(sizes)) - sizes
        gap = float(excess.abs().sum())
        if gap < least:
            least, best = gap, (labels, shift)
        if (excess.abs() <= limit).all():
            break
        sign = excess.sign()
        step = step * torch.where(sign * before < 0, 0.5, 1.2)
        before = sign
        shift = shift - step * sign
    return best


def volume_mbo(graph: AffinityGraph, labels: Tensor, start: Tensor, shares: Tensor | None) -> Tensor:
    """Return (n, C) scores, at least 0, of Poisson MBO (Calder et al. 2020, arXiv 2006.11184, algorithm 2).

    Heat flows along the graph from the present labels, with the labelled points as sources, and each point then takes
    its warmest class, shifted so that every class gets its share of the points; until fewer than 1 in 1,000 labels change.

    Args:
        graph: of n points.
        labels: (n,) int64, -1 for unlabelled.
        start: (n, C) scores to begin with; rows of 0, for points that cannot be reached, stay, and so do isolated points.
        shares: (C,) of the points that can be reached; None for the shares that ``start`` gives.
    """
    c = start.shape[1]
    reached = (start.sum(1) > 0) & (graph.degree > 0)
    if not reached.any():
        return start
    rows = (labels >= 0).nonzero().squeeze(1)
    source = F.one_hot(labels[rows], c).to(start.dtype)
    root = graph.degree.sqrt()[:, None]
    step = graph.degree[:, None] / graph.degree.max()
    source = (source - source.mean(0)) * root[rows] / graph.degree.max()
    shift = start.new_zeros(c)
    if shares is None:
        current = start[reached].argmax(1)
        sizes = torch.bincount(current, minlength=c).to(start.dtype)
    else:
        sizes = shares * reached.sum()
        current = scale_to_shares(start[reached], shares).argmax(1)
    for _ in range(ROUNDS):
        heat = torch.zeros_like(start)  # times the root of the degree
        heat[reached] = F.one_hot(current, c).to(start.dtype) * root[reached]
        for _ in range(HEAT_STEPS):
            flow = graph @ heat
            heat.addcmul_(flow.sub_(heat), step).index_add_(0, rows, source)
        scores = heat[reached] / root[reached]
        previous = current
        current, shift = assign(scores, sizes, shift)
        if (current != previous).float().mean() < 1e-3:
            break
    result = start.clone()
    result[reached] = (scores + (shift - shift[sizes > 0].min())).clamp_(min=0).mul_(sizes > 0)
    return result
