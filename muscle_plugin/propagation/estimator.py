"""Label propagation by diffusion as a scikit-learn estimator."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score
from sklearn.utils import check_consistent_length, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from muscle_plugin.errors import InputError
from muscle_plugin.propagation.diffusion import as_int64, propagate
from muscle_plugin.propagation.graph import (
    AFFINITIES,
    SparseRows,
    above_zero,
    affinities,
    choice,
    choose_backend,
    default_k,
    normalise_rows,
    search,
    whole,
)

try:
    from sklearn.utils.validation import validate_data
except ImportError:  # scikit-learn before 1.6
    validate_data = BaseEstimator._validate_data


@dataclass(eq=False, repr=False)
class DiffusionLabelPropagation(ClassifierMixin, BaseEstimator):
    """Transductive label propagation (Iscen et al. 2019, arXiv 1904.04717, section 4.1).

    Unlike scikit-learn's ``LabelSpreading(kernel="knn")`` affinities are powers of the cosine, the linear system is
    solved by conjugate gradients instead of fixed-point iterations, and every point gets a certainty weight.

    Parameters are those of :func:`propagate`, and ``num_classes``: C, for integer labels 0 to C - 1, some of which may
    not occur; by default the classes are the labels that occur. The paper's are ``k=50, class_mass="none"``. Shares given
    as ``class_mass`` are in the order of ``classes_``.

    Attributes:
        classes_: (C,) labels, sorted.
        transduction_: (n,) the class of each point: its label, or the pseudo-label.
        label_distributions_: (n, C) float32, rows summing to 1; uniform where the diffusion did not reach.
        weights_: (n,) float32 certainty between 0 and 1; 1 on labelled points, 0 where the diffusion did not reach.
        class_weights_: (C,) float32 ``(n / C) / count``; 0 for a class without points.
        n_iter_: iterations of conjugate gradients, the maximum over classes.
        converged_: whether every class reached ``tol``.
        residuals_: (C,) relative residuals.
        neighbours_: "exact" or "approximate".
        k_: neighbours per point.
        max_in_degree_: the most points that have one and the same point, a hub, among their neighbours.
        n_isolated_: number of points without an affinity to any other.
        n_unreached_: number of points that the diffusion did not reach.
        timings_: seconds of "knn", "graph" and "diffusion".
        n_features_in_: d.
        feature_names_in_: (d,) names of the columns, if ``X`` had names.
    """

    method: str = "diffusion"
    class_mass: str | Sequence[float] = "uniform"
    k: int | None = None
    gamma: float = 3.0
    affinity: str = "cosine"
    alpha: float = 0.99
    max_iter: int = 20
    tol: float = 1e-6
    num_classes: int | None = None
    neighbours: str = "auto"
    approximate_above: int = 300_000
    probes: int = 16
    backend: str = "auto"
    seed: int = 0

    def fit(self, X: Any, y: Any) -> DiffusionLabelPropagation:
        """Propagate the labels.

        Args:
            X: (n, d) features: an array, DataFrame, SciPy sparse matrix (searched exactly) or tensor, which stays on its
                device.
            y: (n,) integers of at least 0, whole floats, booleans or strings. -1, NaN and, in lists, object arrays and
                pandas columns, None stand for unlabelled. The strings "-1" and "nan" are refused, and so is the largest
                value of an unsigned dtype, since it may be a -1 that wrapped around.

        Warns:
            UserWarning: points that the diffusion does not reach, or classes without a label.
            ConvergenceWarning: ``tol`` was not reached, and either it (above 0) was set or ``max_iter`` was raised: the
                default budget seldom reaches the default ``tol``.

        Raises:
            InputError: labels or settings outside their range.
            ValueError, TypeError: of scikit-learn, for wrong shapes, continuous ``y``, or ``X`` not of finite numbers.
        """
        # without y scikit-learn says so
        classes, codes = (np.empty(0), None) if y is None else self._encoded(y)
        features = self._rows(X, y=codes)
        settings = {name: value for name, value in self.get_params().items() if name != "num_classes"}
        result = propagate(features, torch.from_numpy(codes), len(classes), **settings)
        stats = result.stats
        self.classes_, self.transduction_ = classes, classes[result.labels.cpu().numpy()]
        self.label_distributions_ = result.distributions.cpu().numpy()
        self.weights_ = result.weights.cpu().numpy()
        self.class_weights_ = result.class_weights.cpu().numpy()
        self.n_iter_ = stats.iterations
        self.converged_ = stats.converged
        self.residuals_ = stats.residuals.cpu().numpy()
        self.neighbours_ = stats.neighbours
        self.k_, self.max_in_degree_ = stats.k, stats.in_degree
        self.n_isolated_, self.n_unreached_ = stats.isolated, stats.unreached
        self.timings_ = stats.seconds
        self._features = features
        if stats.unreached or stats.unlabelled_classes:
            warnings.warn(
                f"{stats.unreached} of {len(features)} points not reached ({stats.isolated} isolated): their labels"
                " are arbitrary, with weight 0; a larger k or max_iter, or labels near them, would help. "
                f"{len(stats.unlabelled_classes)} of {len(classes)} classes without a label",
                stacklevel=2,
            )
        asked = self.tol > 0 and (self.tol != type(self).tol or self.max_iter > type(self).max_iter)
        if asked and not stats.converged:
            warnings.warn(
                f"relative residual {self.residuals_.max():.1e} after {self.n_iter_} iterations, above tol={self.tol}: "
                f"raise max_iter={self.max_iter} or tol",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    @torch.no_grad()
    def predict_proba(self, X: Any) -> np.ndarray:
        """Return for new points, (m, d), the affinity-weighted mean distribution, (m, C), of their k nearest training points;
        uniform for a point without a positive affinity to any of them."""
        check_is_fitted(self, "weights_")
        gamma, affinity = above_zero("gamma", self.gamma), choice("affinity", self.affinity, AFFINITIES)
        queries = normalise_rows(self._rows(X, reset=False))
        base = normalise_rows(self._features)
        if isinstance(queries, Tensor):
            queries = queries.to(base.device)
        k = default_k(len(base)) if self.k is None else whole("k", self.k)
        similarity, index = search(base, queries, min(k, len(base)), choose_backend(self.backend, base.device))
        weights = affinities(similarity.float(), gamma, affinity).cpu()
        mean = torch.nn.functional.embedding_bag(  # without the (m, k, C) distributions in memory
            index.cpu(), torch.from_numpy(self.label_distributions_), mode="sum", per_sample_weights=weights
        )
        total = weights.sum(1, keepdim=True)
        return torch.where(total > 0, mean / total, 1 / mean.shape[1]).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Return the classes of new points, (m,): the largest of :meth:`predict_proba`."""
        best = self.predict_proba(X).argmax(1)  # first, since it says so where fit was not called
        return self.classes_[best]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy, between 0 and 1, on those of the points, (m, d), that have a label in ``y``, (m,).

        Raises:
            InputError: no point has a label.
        """
        predicted = self.predict(X)
        labels, labelled = _labels(y)
        check_consistent_length(predicted, labelled, sample_weight)
        weight = None if sample_weight is None else np.asarray(sample_weight)[labelled]
        return accuracy_score(labels, predicted[labelled], sample_weight=weight)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _encoded(self, y: Any) -> tuple[np.ndarray, np.ndarray]:
        """(C,) classes and, per point, (n,) the number of its class, -1 where it is unlabelled."""
        labels, labelled = _labels(y)
        classes, codes = np.unique(labels, return_inverse=True)
        if self.num_classes is not None:
            count = whole("num_classes", self.num_classes)
            if labels.dtype.kind not in "iuf" or classes[-1] >= count:
                expected = f"integer labels 0 to {count - 1}, or num_classes=None for any labels"
                raise InputError(f"num_classes: {count} expects {expected}, received label {classes[-1]}")
            classes, codes = np.arange(count), labels
        numbers = np.full(len(labelled), -1)
        numbers[labelled] = codes
        return classes, numbers

    def _rows(self, X: Any, **options: Any) -> Tensor | SparseRows:
        """``X`` after scikit-learn's checks of its shape, numbers and columns, and of the number of labels."""
        if isinstance(X, Tensor):  # its shape alone: it stays on its device, and NumPy does not know every dtype
            validate_data(self, np.broadcast_to(np.int8(0), X.shape), **options)
            return X
        checked = validate_data(self, X, accept_sparse="csr", dtype=[np.float32, np.float64], **options)
        array = checked[0] if "y" in options else checked
        if sparse.issparse(array):
            return SparseRows(array)
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))  # torch warns of what it could not write to


def _labels(y: Any) -> tuple[np.ndarray, np.ndarray]:
    """The labels that there are, and (n,) bool, whether each point has one."""
    # of objects where it is a list: NumPy would turn -1 and NaN among strings into strings
    array = y.cpu().numpy() if isinstance(y, Tensor) else np.asarray(y, object if isinstance(y, list | tuple) else None)
    given = column_or_1d(array, warn=True)
    if given.dtype.kind in "mMV":
        raise InputError(f"y: expected numbers, booleans or strings as labels, received {given.dtype}")
    if given.dtype.kind == "u":
        as_int64(torch.from_numpy(given.astype(given.dtype.newbyteorder("="))), "y")
    labelled: Any = np.ones(len(given), dtype=bool)
    if given.dtype.kind in "ifO":
        pandas = sys.modules.get("pandas")  # there are no missing values of its own before it is loaded
        missing = pandas.isna if pandas else np.vectorize(lambda v: v is None or v != v, otypes=[bool])
        labelled = ~missing(given)
        labelled[labelled] = given[labelled] != -1
    labels = given[labelled]
    if not len(labels):
        raise InputError(f"y: expected at least one labelled point, all {len(given)} are unlabelled")
    if labels.dtype.kind == "O":
        strings = {isinstance(label, str) for label in labels}
        if len(strings) > 1:
            raise InputError("y: expected strings alone or numbers alone as labels, received both")
        if strings == {False}:
            labels = np.array(labels.tolist())
    if labels.dtype.kind in "OU" and np.isin(labels, ["-1", "nan"]).any():
        raise InputError(
            "y: '-1' or 'nan' is a string here: give None for unlabelled points, in a list or object array"
        )
    check_classification_targets(np.resize(labels, len(given)))  # as long as y, since it warns where most labels differ
    if labels.dtype.kind in "if" and labels.min() < 0:
        raise InputError(f"y: expected -1 (unlabelled) or labels of at least 0, received {labels.min()}")
    return labels, labelled
