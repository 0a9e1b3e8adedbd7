"""Seconds of label propagation: the reference procedure of LP-DeepSSL (SciPy, class by class) against ours.

One process, the same data, in turns (reference, ours, reference, ...). Ratios are taken within a round; the table
shows their median with the smallest and largest. "diffusion" ends at pseudo-labels and weights in both.

    python benchmarks/propagation.py [--n 50000] [--classes 10 100] [--rounds 5] [--threads 2]
    python benchmarks/propagation.py --sizes 10000 30000 100000 300000 1000000 [--plot out.png] [--json FILE]
    python benchmarks/propagation.py --recall        # of approximate neighbours, by lists compared with

With ``--sizes`` ours alone is measured, each size in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from common import write_figures
from rich.console import Console
from rich.table import Table
from scipy import sparse
from scipy.sparse.linalg import cg
from threadpoolctl import threadpool_limits

from muscle_plugin.propagation import nearest_neighbours, normalise_rows, propagate

PARTS = ("knn", "graph", "diffusion")
# part: how many times as fast as the reference it is to be, by number of classes where that matters
GOALS = {("knn", None): 1.0, ("graph", None): 3.0, ("diffusion", 10): 2.5, ("diffusion", 100): 6.0}
AGREEMENT, WEIGHTS = 0.999, 1e-3
console = Console(width=110)


def clusters(n: int, d: int, classes: int, labels: int, seed: int, noise: float = 1.7, per_class: int = 3):
    """(features, float32; labels, -1 but for ``labels`` points, each class having some; true classes)."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes * per_class, d), dtype=np.float32)
    which = rng.integers(0, len(centres), n)
    x = np.empty((n, d), np.float32)
    for first in range(0, n, 1 << 16):
        rows = which[first : first + (1 << 16)]
        x[first : first + len(rows)] = centres[rows] + noise * rng.standard_normal((len(rows), d), dtype=np.float32)
    truth = which % classes
    y = np.full(n, -1)
    y[rng.choice(n, labels, replace=False)] = 0
    y[y == 0] = truth[y == 0]
    for j in set(range(classes)) - set(y):
        y[rng.choice(np.flatnonzero(truth == j))] = j
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(truth)


def reference(x: np.ndarray, y: np.ndarray, classes: int, k: int, alpha: float = 0.99, max_iter: int = 20):
    """LP-DeepSSL's procedure: (pseudo-labels, weights, seconds). Its linear systems are in float64."""
    import faiss

    seconds = {}
    start = time.perf_counter()
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)
    similarity, near = index.search(unit, k + 1)
    seconds["knn"] = time.perf_counter() - start

    start = time.perf_counter()
    n = len(x)
    rows = np.repeat(np.arange(n), k)
    w = sparse.csr_matrix(((similarity[:, 1:] ** 3).ravel(), (rows, near[:, 1:].ravel())), shape=(n, n))
    w = w + w.T
    w = w - sparse.diags(w.diagonal())
    degree = np.asarray(w.sum(1)).ravel()
    degree[degree == 0] = 1
    root = sparse.diags(1 / np.sqrt(degree))
    s = root @ w @ root
    seconds["graph"] = time.perf_counter() - start

    start = time.perf_counter()
    system = sparse.eye(n) - alpha * s
    z = np.zeros((n, classes))
    for j in range(classes):
        rhs = (y == j) / (y == j).sum()
        with threadpool_limits(1, "blas"):  # its threads slow vectors of this size, severalfold on a busy machine
            z[:, j] = cg(system, rhs, rtol=1e-6, maxiter=max_iter)[0]
    z = np.maximum(z, 0)
    p = z / z.sum(1, keepdims=True)
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), 1)
    weights = 1 - entropy / np.log(classes)
    weights /= weights.max()
    guessed = p.argmax(1)
    guessed[y >= 0], weights[y >= 0] = y[y >= 0], 1
    seconds["diffusion"] = time.perf_counter() - start
    return guessed, weights, seconds


def compare(n: int, d: int, k: int, classes: int, labels: int, rounds: int) -> None:
    """Reference and ours in turns on the same data."""
    x, y, truth = clusters(n, d, classes, labels, seed=0)
    theirs, ours, agreement, gap = [], [], [], []
    propagate(x[:1000], torch.where(torch.arange(1000) < 10, 0, -1), 2)  # threads and libraries are up
    for _ in range(rounds):
        guessed, weights, seconds = reference(x.numpy(), y.numpy(), classes, k)
        theirs.append(seconds)
        result = propagate(x, y, classes, k=k)
        ours.append(result.stats.seconds)
        agreement.append(float((result.labels.numpy() == guessed).mean()))
        gap.append(float(np.abs(result.weights.numpy() - weights).max()))
    title = f"n = {n:,}, d = {d}, k = {k}, C = {classes}, {labels} labels, {rounds} rounds, {os.cpu_count()} CPUs"
    table = Table(title=title)
    for column in ("part", "reference s", "ours s", "ratio", "goal", "met"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in PARTS:
        a, b = [t[part] for t in theirs], [t[part] for t in ours]
        ratios = [i / j for i, j in zip(a, b, strict=True)]
        goal = GOALS.get((part, None), GOALS.get((part, classes)))
        median = statistics.median(ratios)
        met = "" if goal is None else "yes" if median >= goal else "no"
        table.add_row(part, _spread(a), _spread(b), _spread(ratios, "x"), "" if goal is None else f"{goal}x", met)
    low, high = min(agreement), max(gap)
    table.add_row("argmax agreement", "", "", f"{low:.3%}", f"{AGREEMENT:.1%}", "yes" if low >= AGREEMENT else "no")
    table.add_row("weights, largest gap", "", "", f"{high:.1e}", f"{WEIGHTS:.0e}", "yes" if high <= WEIGHTS else "no")
    console.print(table)
    right = float((result.labels == truth).double().mean())
    load = os.getloadavg()[0]
    console.print(
        f"ours: accuracy {right:.3f}, {result.stats.iterations} iterations, largest residual "
        f"{result.stats.residuals.max():.1e}; {torch.get_num_threads()} torch threads, load average {load:.1f}\n"
    )


def _spread(values: list[float], unit: str = "") -> str:
    return f"{statistics.median(values):.3g}{unit} ({min(values):.3g}-{max(values):.3g})"


def measure(n: int, d: int, k: int, classes: int, labels: int, neighbours: str, device: str) -> None:
    """One size, in this process; prints JSON. On a GPU the second of two, since the first one starts it."""
    x, y, truth = clusters(n, d, classes, labels, seed=0)
    x, y, truth = (t.to(device) for t in (x, y, truth))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for _ in range(1 if device == "cpu" else 2):
        start = time.perf_counter()
        result = propagate(x, y, classes, k=k, neighbours=neighbours)
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    accuracy = float((result.labels.to(truth.device) == truth).double().mean())
    out = {"n": n, "total": seconds, "peak": peak, "before": before, "accuracy": accuracy, **result.stats.seconds}
    print(json.dumps(out | {"neighbours": result.stats.neighbours}))


def in_own_process(n: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """What :func:`measure` prints of one size."""
    command = [sys.executable, __file__, "--measure", str(n), "--d", str(arguments.d), "--k", str(arguments.k)]
    command += ["--classes", str(arguments.classes[0]), "--neighbours", arguments.neighbours]
    command += ["--labels", str(arguments.labels), "--device", arguments.device]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def grow(sizes: list[int], arguments: argparse.Namespace) -> None:
    """Each size in a process of its own; exponents of a power of n fitted to time and memory."""
    rows = []
    table = Table(title=f"d = {arguments.d}, k = {arguments.k}, C = {arguments.classes[0]}, {os.cpu_count()} CPUs")
    for column in ("n", "neighbours", *(f"{p} s" for p in PARTS), "total s", "peak MiB", "of it data MiB", "accuracy"):
        table.add_column(column, justify="right")
    for n in sizes:
        row = in_own_process(n, arguments)
        rows.append(row)
        write_figures(arguments, sizes=rows)  # what is measured is there if time runs out
        seconds = [f"{row[p]:.3g}" for p in (*PARTS, "total")]
        memory = [f"{row['peak']:,.0f}", f"{row['before']:,.0f}", f"{row['accuracy']:.3f}"]
        table.add_row(f"{n:,}", row["neighbours"], *seconds, *memory)
    console.print(table)
    exponents = {}
    for method in ("exact", "approximate"):
        exponents[f"knn, {method}"] = _exponent([r for r in rows if r["neighbours"] == method], "knn")
    exponents |= {p: _exponent(rows, p) for p in ("graph", "diffusion")}
    exponents["memory above data"] = _exponent([r | {"extra": r["peak"] - r["before"]} for r in rows], "extra")
    known = [f"{name} n^{e:.2f}" for name, e in exponents.items() if e is not None]
    console.print(f"fitted: {', '.join(known)}; load average {os.getloadavg()[0]:.1f}")
    if arguments.plot:
        plot(rows, arguments.plot)


def _exponent(rows: list[dict], key: str) -> float | None:
    rows = [r for r in rows if r[key] > 0]
    if len(rows) < 2:
        return None
    return float(np.polyfit(np.log([r["n"] for r in rows]), np.log([r[key] for r in rows]), 1)[0])


def plot(rows: list[dict], path: str) -> None:
    """Time and peak memory over n."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    n = [r["n"] for r in rows]
    for part, marker in zip(PARTS, "os^", strict=True):
        left.loglog(n, [r[part] for r in rows], marker=marker, label=part)
    close = [r["n"] for r in rows if r["neighbours"] == "approximate"]
    if close:
        left.axvline(min(close) / 1.5, color="grey", linestyle=":", label="approximate neighbours from here")
    left.set(xlabel="points", ylabel="seconds")
    left.legend()
    right.loglog(n, [r["peak"] / 1024 for r in rows], marker="o", label="peak")
    right.loglog(n, [r["before"] / 1024 for r in rows], marker="s", label="before (libraries and data)")
    right.set(xlabel="points", ylabel="resident memory, GiB")
    right.legend()
    figure.savefig(path, dpi=120)
    console.print(f"written: {path}")


def recall(n: int, d: int, k: int, classes: int, labels: int) -> None:
    """Recall of approximate neighbours and its effect on labels, by the number of lists compared with."""
    x, y, _ = clusters(n, d, classes, labels, seed=0)
    unit = normalise_rows(x)
    start = time.perf_counter()
    exact = nearest_neighbours(unit, k, method="exact").index.numpy()
    seconds = time.perf_counter() - start
    labels_exact = propagate(x, y, classes, k=k, neighbours="exact").labels
    table = Table(title=f"approximate neighbours, n = {n:,}, d = {d}, C = {classes} (exact: {seconds:.3g} s)")
    for column in ("method", "seconds", f"recall@{k}", "argmax agreement"):
        table.add_column(column, justify="left" if column == "method" else "right")

    def hits(index: np.ndarray) -> str:
        some = np.random.default_rng(0).choice(n, 2000, replace=False)
        return f"{np.mean([len(set(index[i]) & set(exact[i])) / k for i in some]):.3f}"

    for backend in ("faiss", "torch"):
        for probes in (8, 16, 32, 64):
            settings = {"probes": probes, "backend": backend}
            start = time.perf_counter()
            index = nearest_neighbours(unit, k, method="approximate", **settings).index.numpy()
            seconds = time.perf_counter() - start
            given = propagate(x, y, classes, k=k, neighbours="approximate", **settings).labels
            same = (given == labels_exact).double().mean()
            table.add_row(f"{backend}, {probes} lists", f"{seconds:.3g}", hits(index), f"{same:.3%}")
    console.print(table)
    console.print(f"load average {os.getloadavg()[0]:.1f}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=50_000)
    parser.add_argument("--d", type=int, default=128)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--labels", type=int, default=500)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", help="measure how ours grows, at these numbers of points")
    parser.add_argument("--neighbours", choices=["auto", "exact", "approximate"], default="auto")
    parser.add_argument("--device", default="cpu", help="with --sizes: cpu or cuda [%(default)s]")
    parser.add_argument("--plot", help="with --sizes: write the curves here")
    parser.add_argument("--json", metavar="FILE", help="with --sizes: write the figures there")
    parser.add_argument("--recall", action="store_true", help="recall of approximate neighbours")
    parser.add_argument("--threads", type=int, help="torch's threads; 1 is quicker where others keep the CPUs busy")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.measure:
        measure(
            arguments.measure, arguments.d, arguments.k, arguments.classes[0], arguments.labels, arguments.neighbours,
            arguments.device,
        )  # fmt: skip
    elif arguments.sizes:
        grow(arguments.sizes, arguments)
    elif arguments.recall:
        recall(arguments.n, arguments.d, arguments.k, arguments.classes[0], arguments.labels)
    else:
        for classes in arguments.classes:
            compare(arguments.n, arguments.d, arguments.k, classes, arguments.labels, arguments.rounds)


if __name__ == "__main__":
    main()
