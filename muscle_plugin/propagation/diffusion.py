"""Label propagation by diffusion: the equations of ``docs/propagation.md`` (Iscen et al. 2019, arXiv 1904.04717, section 4.1).

A point that the diffusion does not reach (in the iterations allowed) gets a uniform p, the commonest label, weight 0,
and does not count in N and the class counts. A class without points gets class weight 0.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from muscle_plugin.errors import InputError
from muscle_plugin.propagation.class_mass import class_shares, even_mass, has_mass, scale_to_shares, volume_mbo
from muscle_plugin.propagation.graph import (
    BLOCK,
    AffinityGraph,
    Neighbourhood,
    SparseRows,
    affinity_graph,
    choice,
    choose_backend,
    neighbourhood,
    number,
    whole,
)

METHODS = ("diffusion", "poisson_mbo")
# classes solved at a time: a bound on memory
COLUMNS = {"cpu": 64, "cuda": 128}


@dataclass(frozen=True)
class PropagationStats:
    """Diagnostics of a propagation.

    Attributes:
        neighbours: "exact" or "approximate".
        backend: "faiss" or "torch".
        iterations: of conjugate gradients, the maximum over classes.
        residuals: (C,) ``|Y_c - (I - alpha S) Z_c| / |Y_c|`` before clipping; 0 for a class without a label.
        converged: whether every residual is at most ``tol``.
        isolated: number of points without an affinity to any other.
        k: neighbours per point.
        in_degree: the most points that have one and the same point among their neighbours.
        unreached: number of points whose row of Z is zero.
        unlabelled_classes: classes without a labelled point; no point gets them.
        seconds: wall-clock time of "knn" (from the features on), "graph" and "diffusion".
    """

    neighbours: str
    backend: str
    iterations: int
    residuals: Tensor
    converged: bool
    isolated: int
    k: int
    in_degree: int
    unreached: int
    unlabelled_classes: tuple[int, ...]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Propagation:
    """Pseudo-labels of n points, on the device of the features.

    Attributes:
        labels: (n,) int64, between 0 and C - 1.
        weights: (n,) float32, between 0 and 1.
        class_weights: (C,) float32.
        distributions: (n, C) float32, rows summing to 1: what the diffusion gives, for labelled points too.
        reached: (n,) bool, whether the diffusion reached the point.
        stats: diagnostics.
    """

    labels: Tensor
    weights: Tensor
    class_weights: Tensor
    distributions: Tensor
    reached: Tensor
    stats: PropagationStats


class Solution(NamedTuple):
    """(n, c) solution, (c,) relative residuals and (c,) iterations of each column."""

    x: Tensor
    residuals: Tensor
    iterations: Tensor


def conjugate_gradients(multiply: Callable[[Tensor], Tensor], rhs: Tensor, tol: float, max_iter: int) -> Solution:
    """Solve A x = b from x = 0 for all columns of ``rhs`` at once, each with its own scalars.

    A column is left once ``|b - A x| <= tol |b|`` by the recurrence, which drifts from the true residual in float32: a column
    whose true residual is still too large, and falling, is resumed from it.

    Args:
        multiply: x -> A x of a new (n, c) tensor, with A symmetric positive definite.
        rhs: (n, c) floating point, in whose dtype all is computed.
        tol: relative residual, at least 0.
        max_iter: products with A, without those of the checks.
    """
    x = torch.zeros_like(rhs)
    r, p = rhs.clone(), rhs.clone()
    product = torch.empty_like(rhs)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return torch.mul(a, b, out=product).sum(0)

    square = norm = checked = dot(rhs, rhs)
    limit = tol * tol * norm
    iterations = torch.zeros(rhs.shape[1], dtype=torch.int64, device=rhs.device)
    step = 0
    while True:
        while step < max_iter and bool((active := square > limit).any()):
            ap = multiply(p)
            length = torch.where(active, square / dot(p, ap), 0)
            x.addcmul_(p, length)
            r.addcmul_(ap, length, value=-1)
            previous, square = square, dot(r, r)
            torch.addcmul(r, p, torch.where(active, square / previous, 0), out=p)
            iterations += active
            step += 1
        if not ((square <= limit) & (norm > 0)).any():
            break
        torch.sub(rhs, multiply(x), out=r)
        square = dot(r, r)
        if step == max_iter or not ((square > limit) & (square < checked / 4)).any():
            break
        checked = square
        p.copy_(r)
    return Solution(x, torch.where(norm > 0, square / norm, 0).sqrt(), iterations)


def _diffuse(
    graph: AffinityGraph, labels: Tensor, num_classes: int, alpha: float, tol: float, max_iter: int, order: Tensor
) -> Solution:
    """Z before clipping, with residuals and iterations per class; row i of ``graph`` is point ``order[i]``."""
    inverse = order.argsort()
    labelled = (labels >= 0).nonzero().squeeze(1)
    classes, rows = labels[labelled], inverse[labelled]
    counts = torch.bincount(classes, minlength=num_classes)
    z = torch.empty(len(labels), num_classes, dtype=graph.values.dtype, device=labels.device)

    def multiply(p: Tensor) -> Tensor:
        sp = graph @ p
        return torch.add(p, sp, alpha=-alpha, out=sp)

    def solve(part: tuple[int, int]) -> Solution:
        first, last = part
        rhs = z.new_zeros(len(labels), last - first)
        here = (classes >= first) & (classes < last)
        rhs[rows[here], classes[here] - first] = 1 / counts[classes[here]].to(z.dtype)
        solution = conjugate_gradients(multiply, rhs, tol, max_iter)
        z[:, first:last] = solution.x[inverse]
        return solution

    device = labels.device.type
    threads = torch.get_num_threads() if device == "cpu" else 1
    count = -(-num_classes // COLUMNS.get(device, 64))
    if count > 1:  # as many parts for each thread
        count = min(num_classes, -(-count // threads) * threads)
    parts = list(pairwise(num_classes * i // count for i in range(count + 1)))
    if threads > 1 and len(parts) > 1:
        # a thread per part: all threads on one part would wait for one another in every operation
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            solutions = list(pool.map(solve, parts))
        torch.set_num_threads(threads)
    else:
        solutions = [solve(part) for part in parts]
    return Solution(z, torch.cat([s.residuals for s in solutions]), torch.cat([s.iterations for s in solutions]))


def class_scores(
    graph: AffinityGraph,
    labels: Tensor,
    num_classes: int,
    method: str,
    class_mass: str | Sequence[float],
    alpha: float,
    tol: float,
    max_iter: int,
    order: Tensor,
) -> Solution:
    """(n, C) Z, or scores in its place; arguments as of :func:`propagate`, row i of ``graph`` being point ``order[i]``."""
    shares = class_shares(class_mass, labels, num_classes)
    solution = _diffuse(graph, labels, num_classes, alpha, tol, max_iter, order)
    z = solution.x.clamp_(min=0)
    if has_mass(class_mass):
        z = even_mass(z)
    if method == "poisson_mbo":
        z[order] = volume_mbo(graph, labels[order], z[order], shares)
    elif shares is not None:
        z = scale_to_shares(z, shares)
    return solution._replace(x=z)


def pseudo_labels(z: Tensor, labels: Tensor, certainty: str = "entropy") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute labels and weights from the solution of the diffusion (equations 7 and 11), which is overwritten.

    Args:
        z: (n, C) floating point; or scores of the classes, rows of 0 for points that were not reached.
        labels: (n,) int64, -1 for unlabelled.
        certainty: "entropy", the paper's; "margin": what the second entry of a row lacks to the first, as a share of it.

    Returns:
        (n,) labels, (n,) weights, (n, C) distributions and (n,) whether the diffusion reached the point.
    """
    c = z.shape[1]
    labelled = labels >= 0
    commonest = torch.bincount(labels[labelled], minlength=c).argmax()
    mass = z.clamp_(min=0).sum(1)
    reached = mass >= torch.finfo(z.dtype).tiny
    z.div_(torch.where(reached, mass, 1)[:, None])
    z[~reached] = 1 / c
    if c == 1:
        weights = torch.ones_like(mass)
    elif certainty == "margin":
        first, second = z.topk(2, 1).values.T
        weights = 1 - second / first
    else:
        entropy = torch.cat([torch.special.entr(block).sum(1) for block in z.split(BLOCK)])
        weights = (1 - entropy / math.log(c)).clamp_(0, 1)
    weights = torch.where(reached, weights, 0)
    largest = weights.max()
    weights = torch.where(labelled, 1, weights / torch.where(largest > 0, largest, 1))
    guessed = torch.where(reached, z.argmax(1), commonest)
    return torch.where(labelled, labels, guessed), weights, z, reached


def class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Compute (C,) float32 ``(N / C) / count_c`` of (N,) int64 labels; 0 for a class without points."""
    counts = torch.bincount(labels, minlength=num_classes).float()
    return torch.where(counts > 0, len(labels) / num_classes / counts.clamp(min=1), 0)


def as_int64(labels: Tensor, name: str = "labels") -> Tensor:
    """Convert integers to int64. A -1 written into an unsigned dtype becomes its largest value, which is refused, not taken for
    a class."""
    wide = labels.long()
    if not labels.dtype.is_signed and bool((wide == wide.new_tensor(-1).to(labels.dtype).long()).any()):
        wrapped = f"{torch.iinfo(labels.dtype).max} is what -1 (unlabelled) becomes in {labels.dtype}"
        raise InputError(f"{name}: {wrapped}; give labels of a signed dtype")
    return wide


def _checked(features: Tensor | Neighbourhood, labels: Tensor, num_classes: int) -> Tensor:
    """The labels in int64; InputError if they do not fit the features and classes."""
    dtype = labels.dtype
    if labels.shape != (len(features),) or dtype == torch.bool or dtype.is_floating_point or dtype.is_complex:
        raise InputError(
            f"labels: expected {len(features)} integers, one per row of features, "
            f"received {dtype} of shape {tuple(labels.shape)}"
        )
    labels = as_int64(labels)
    low, high = (int(x) for x in labels.aminmax()) if len(labels) else (-1, -1)
    if low < -1 or not 0 <= high < num_classes:
        raise InputError(
            f"labels: expected -1 (unlabelled) to {num_classes - 1} and at least one labelled point, received {low} to {high}"
        )
    return labels


@torch.no_grad()
def propagate(
    features: Tensor | Neighbourhood,
    labels: Tensor,
    num_classes: int,
    *,
    method: str = "diffusion",
    class_mass: str | Sequence[float] = "none",
    k: int | None = 50,
    gamma: float = 3.0,
    affinity: str = "cosine",
    alpha: float = 0.99,
    max_iter: int = 20,
    tol: float = 1e-6,
    neighbours: str = "auto",
    approximate_above: int = 300_000,
    probes: int = 16,
    backend: str = "auto",
    seed: int = 0,
) -> Propagation:
    """Compute pseudo-labels, weights and class weights of all points from the labels of a few (the whole of section 4.1).

    Args:
        features: (n, d) of any real dtype on any device, or an array; scaled to unit length here. Or their
            :class:`Neighbourhood`, which leaves nothing to search: ``k`` and what follows ``tol`` say nothing then.
        labels: (n,) integers, -1 for unlabelled; at least one point is labelled.
        num_classes: C; classes without a label are allowed.
        method: "diffusion", or "poisson_mbo", which goes on from it (Calder et al. 2020, arXiv 2006.11184): classes keep their
            sizes and get short borders on the graph. More accurate with few labels, and 10 to 100 times slower.
        class_mass: "none" (the paper's); "uniform", where classes get the same mass, so that a hub's class gains nothing by
            it; "equal", "labels" or C numbers: from there on to these shares of the points (the same for all; those of the
            labels; in proportion to the numbers). With "none" and "uniform" classes have the sizes that the diffusion finds.
        k: neighbours per point; None for 2 ln n.
        gamma: exponent of the cosine, above 0.
        affinity: "cosine" (the paper's, to the power gamma), or "local_scaling" of the distances (Zelnik-Manor, Perona 2004).
        alpha: share of its neighbours in a point's value, between 0 and 1.
        max_iter: iterations of conjugate gradients; the paper's 20 are a budget that seldom reaches ``tol``.
        tol: relative residual at which a class is solved. In float32 the true residual, which counts here, stops falling
            at about 2e-6 on ill-conditioned graphs; the solver then stops too, not converged.
        neighbours: "exact", "approximate" or "auto" (approximate above ``approximate_above`` points).
        probes: lists that an approximate search compares with; more are slower and more exact.
        backend: "faiss" (CPU: faiss and SciPy), "torch" (any device) or "auto".
        seed: of the approximate search.

    Raises:
        InputError: shapes, labels or settings outside their range; NaN or infinity in the features.
        ImportError: backend "faiss" without faiss.
    """
    if not isinstance(features, (SparseRows, Neighbourhood)):
        features, labels = torch.as_tensor(features), torch.as_tensor(labels)
    num_classes, max_iter = whole("num_classes", num_classes), whole("max_iter", max_iter)
    alpha = number("alpha", alpha, "a number between 0 and 1, both excluded", lambda v: 0 < v < 1)
    tol, seed = number("tol", tol, "a number of at least 0", lambda v: v >= 0), whole("seed", seed, -math.inf)
    labels = _checked(features, labels.to(features.device), num_classes)
    choice("method", method, METHODS)
    class_shares(class_mass, labels, num_classes)  # refuses what is wrong before the search
    chosen = choose_backend(backend, features.device)
    times = []

    def part_ends() -> None:
        if features.is_cuda:
            torch.cuda.synchronize(features.device)
        times.append(time.perf_counter())

    part_ends()
    with torch.autocast(features.device.type, enabled=False):
        if isinstance(features, Neighbourhood):
            order, found = features
        else:
            order, found = neighbourhood(
                features, k, seed, method=neighbours, approximate_above=approximate_above, probes=probes, backend=chosen
            )
        part_ends()
        graph = affinity_graph(found, gamma, affinity=affinity, backend=chosen)
        searched, k = found.method, found.index.shape[1]
        in_degree = int(torch.bincount(found.index.view(-1), minlength=1).max())
        del found
        part_ends()
        z, residuals, iterations = class_scores(
            graph, labels, num_classes, method, class_mass, alpha, tol, max_iter, order
        )
        certainty = "entropy" if method == "diffusion" and not has_mass(class_mass) else "margin"
        given, weights, distributions, reached = pseudo_labels(z, labels, certainty)
        balance = class_weights(given[reached | (labels >= 0)], num_classes)
        part_ends()
    counts = torch.bincount(labels[labels >= 0], minlength=num_classes)
    stats = PropagationStats(
        neighbours=searched,
        backend=chosen,
        iterations=int(iterations.max()),
        residuals=residuals,
        converged=bool((residuals <= tol).all()),
        isolated=graph.isolated,
        k=k,
        in_degree=in_degree,
        unreached=int((~reached).sum()),
        unlabelled_classes=tuple((counts == 0).nonzero().squeeze(1).tolist()),
        seconds={name: b - a for name, (a, b) in zip(("knn", "graph", "diffusion"), pairwise(times), strict=True)},
    )
    return Propagation(given, weights, balance, distributions, reached, stats)
