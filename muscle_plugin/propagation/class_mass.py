"""Class mass on the diffusion's solution, and Poisson MBO with classes of given sizes: ``docs/propagation.md``.

The class whose labelled point is a hub has the largest entries nearly everywhere in Z: with few labels ``argmax`` over
rows of Z follows the hubs. Both methods here compare an entry with its class's mean instead.
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

CLASS_MASS = ("none", "uniform", "labels")
HEAT_STEPS = 40  # of Calder et al.'s Poisson MBO between two thresholds, and the most thresholds
ROUNDS = 20


def class_shares(class_mass: str | Sequence[float], labels: Tensor, num_classes: int) -> Tensor | None:
    """Return (C,) float32 shares of the points, summing to 1; 0 for classes without a label; None for "none".

    Raises:
        InputError: not "none", "uniform", "labels" or C finite numbers of at least 0 that give a labelled class a share.
    """
    counts = torch.bincount(labels[labels >= 0], minlength=num_classes)
    if isinstance(class_mass, str) and class_mass in CLASS_MASS:
        if class_mass == "none":
            return None
        shares = (counts > 0).float() if class_mass == "uniform" else counts.float()
    else:
        try:
            given = np.asarray(class_mass, np.float64)
        except (TypeError, ValueError):  # a string, a mapping, lists of unequal lengths
            given = np.empty(0)
        if given.shape != (num_classes,) or not (np.isfinite(given) & (given >= 0)).all():
            expected = f"one of {', '.join(CLASS_MASS)}, or {num_classes} shares of the points, each at least 0"
            raise InputError(f"class_mass: expected {expected}, received {class_mass!r}")
        shares = torch.as_tensor(given / max(given.sum(), 1e-300)).float().to(labels.device) * (counts > 0)
        if not shares.sum() > 0:
            raise InputError("class_mass: expected a share above 0 for a class with labels, received 0 for all of them")
    return shares / shares.sum()


def scale_classes(z: Tensor, shares: Tensor) -> Tensor:
    """Return (n, C) scores of classes with the given shares from the diffusion's solution; rows as in :func:`_contrast`.

    Columns of Z are divided by their sums, as in class mass normalisation (Zhu, Ghahramani, Lafferty 2003), and rows by
    their mean under the shares. These ratios scatter narrowly round 1, so that factors as unequal as the shares would
    give the largest class nearly everything: the shares weigh what exceeds 1 instead. For equal shares ``argmax`` is Zhu's.
    """
    ratio = z / z.sum(0).clamp(min=torch.finfo(z.dtype).tiny)
    mean = (ratio @ shares)[:, None]
    reached = mean > 0
    ratio.div_(torch.where(reached, mean, 1)).sub_(1).mul_(shares)
    return _contrast(ratio, shares > 0).mul_(reached)


def _contrast(scores: Tensor, known: Tensor) -> Tensor:
    """Return (n, C) squares of what exceeds the row's least score, which is overwritten, the largest being 1; 0 for classes
    that are not known, (C,) bool. Neither scale nor offset of a row matters: both tell how far it is from labelled points."""
    least = scores.masked_fill(~known, torch.inf).amin(1, keepdim=True)
    scores.sub_(least)[:, ~known] = 0
    largest = scores.amax(1, keepdim=True)
    return torch.where(largest > 0, scores / torch.where(largest > 0, largest, 1), known.to(scores.dtype)).square_()


def assign(scores: Tensor, sizes: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return (m,) ``argmax`` of ``scores + shift``, (m, C), and the (C,) shift with which each class gets nearly its size.

    The shift solves the dual of the assignment problem by sign-based steps (Rprop), from the one that is given.
    """
    step = torch.full_like(shift, 0.1) * scores.std().clamp(min=1e-12)
    limit = (0.01 * sizes).clamp(min=1)
    before = torch.zeros_like(shift)
    least, best = math.inf, (torch.empty(0), shift)
    for _ in range(200):
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
    """Return (n, C) scores, rows as in :func:`_contrast`, of Poisson MBO (Calder et al. 2020, arXiv 2006.11184, algorithm 2).

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
    source -= source.mean(0)
    root = graph.degree.sqrt()[:, None]
    step = graph.degree[:, None] / graph.degree.max()
    source = source * root[rows] / graph.degree.max()
    if shares is None:
        shares = torch.bincount(start[reached].argmax(1), minlength=c) / reached.sum()
    sizes = (shares * reached.sum()).to(start.dtype)
    shift = start.new_zeros(c)
    current, _ = assign(start[reached], sizes, shift)
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
    result[reached] = _contrast(scores + shift, sizes > 0)
    return result
