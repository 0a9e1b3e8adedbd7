"""Label propagation by diffusion as a scikit-learn estimator."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from muscle_plugin.errors import InputError
from muscle_plugin.propagation.diffusion import as_int64, propagate
from muscle_plugin.propagation.graph import above_zero, choose_backend, normalise_rows, search, whole

try:
    from sklearn.utils.validation import validate_data
except ImportError:  # scikit-learn before 1.6
    validate_data = BaseEstimator._validate_data


@dataclass(eq=False, repr=False)
class DiffusionLabelPropagation(ClassifierMixin, BaseEstimator):
    """Transductive label propagation (Iscen et al. 2019, arXiv 1904.04717, section 4.1).

    Unlike scikit-learn's ``LabelSpreading(kernel="knn")`` affinities are powers of the cosine, the linear system is
    solved by conjugate gradients instead of fixed-point iterations, and every point gets a certainty weight.

    Parameters are those of :func:`propagate`, and ``num_classes``: C, for classes 0 to C - 1, some of which may have no label;
    by default the classes are the labels that occur.

    Attributes:
        classes_: (C,) labels.
        transduction_: (n,) the class of each point: its label, or the pseudo-label.
        label_distributions_: (n, C) float32, rows summing to 1; uniform where the diffusion did not reach.
        weights_: (n,) float32 certainty between 0 and 1; 1 on labelled points, 0 where the diffusion did not reach.
        class_weights_: (C,) float32 ``(n / C) / count``; 0 for a class without points.
        n_iter_: iterations of conjugate gradients, the maximum over classes.
        converged_: whether every class reached ``tol``.
        residuals_: (C,) relative residuals.
        neighbours_: "exact" or "approximate".
        n_isolated_: number of points without an affinity to any other.
        n_unreached_: number of points that the diffusion did not reach.
        timings_: seconds of "knn", "graph" and "diffusion".
        n_features_in_: d.
        feature_names_in_: (d,) names of the columns, if ``X`` had names.
    """

    k: int = 50
    gamma: float = 3.0
    alpha: float = 0.99
    max_iter: int = 20
    tol: float = 1e-6
    num_classes: int | None = None
    neighbours: str = "auto"
    approximate_above: int = 300_000
    probes: int = 16
    backend: str = "auto"
    seed: int = 0

    def fit(self, X: np.ndarray | Tensor, y: np.ndarray | Tensor) -> DiffusionLabelPropagation:
        """Propagate the labels.

        Args:
            X: (n, d) features, also of a DataFrame; the work is done on the device of a tensor.
            y: (n,) integers, -1 for unlabelled. In an unsigned dtype all are labelled, and its largest value is refused, since
                it may be a -1 that wrapped around.

        Raises:
            InputError: labels or settings outside their range.
            ValueError, TypeError: of scikit-learn, for ``X`` of another shape, not finite, not numbers, or sparse.
        """
        features = self._tensor(X, reset=True)
        given = y.cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
        if given.dtype.kind not in "iu":
            raise InputError(f"y: expected integers, -1 for unlabelled, received {given.dtype}")
        codes = as_int64(torch.from_numpy(given.astype(given.dtype.newbyteorder("="), order="C")), "y").numpy()
        if self.num_classes is None:
            classes = np.unique(given[given >= 0])
            codes = np.where(given >= 0, np.searchsorted(classes, given), codes)
        else:
            classes = np.arange(whole("num_classes", self.num_classes))
        settings = self.get_params()
        del settings["num_classes"]
        result = propagate(features, torch.from_numpy(codes), max(1, len(classes)), **settings)
        stats = result.stats
        self.classes_, self.transduction_ = classes, classes[result.labels.cpu().numpy()]
        self.label_distributions_ = result.distributions.cpu().numpy()
        self.weights_ = result.weights.cpu().numpy()
        self.class_weights_ = result.class_weights.cpu().numpy()
        self.n_iter_ = stats.iterations
        self.converged_ = stats.converged
        self.residuals_ = stats.residuals.cpu().numpy()
        self.neighbours_ = stats.neighbours
        self.n_isolated_, self.n_unreached_ = stats.isolated, stats.unreached
        self.timings_ = stats.seconds
        self._features = features
        if stats.unreached or stats.unlabelled_classes:
            warnings.warn(
                f"{stats.unreached} of {len(features)} points not reached (weight 0; {stats.isolated} isolated), "
                f"{len(stats.unlabelled_classes)} of {len(self.classes_)} classes without a label",
                stacklevel=2,
            )
        return self

    def predict_proba(self, X: np.ndarray | Tensor) -> np.ndarray:
        """Return for new points, (m, d), the affinity-weighted mean distribution, (m, C), of their k nearest training points;
        uniform for a point without a positive affinity to any of them."""
        check_is_fitted(self, "weights_")
        k, gamma = whole("k", self.k), above_zero("gamma", self.gamma)
        queries = self._tensor(X, reset=False)
        base = normalise_rows(self._features)
        backend = choose_backend(self.backend, base.device)
        queries = normalise_rows(queries.to(base.device))
        similarity, index = search(base, queries, min(k, len(base)), backend)
        affinity = similarity.clamp(min=0).pow(gamma)
        total = affinity.sum(1, keepdim=True).cpu()
        near = torch.from_numpy(self.label_distributions_)[index.cpu()]
        mean = torch.einsum("mk,mkc->mc", affinity.cpu(), near) / total
        return torch.where(total > 0, mean, 1 / mean.shape[1]).numpy()

    def predict(self, X: np.ndarray | Tensor) -> np.ndarray:
        """Return the classes of new points, (m,): the largest of :meth:`predict_proba`."""
        best = self.predict_proba(X).argmax(1)  # first, since it says so where fit was not called
        return self.classes_[best]

    def _tensor(self, X: np.ndarray | Tensor, reset: bool) -> Tensor:
        """``X`` after scikit-learn's checks: shape, finite numbers, and columns as in :meth:`fit` unless ``reset``."""
        if isinstance(X, Tensor):  # its shape alone: it stays on its device, and NumPy does not know every dtype
            validate_data(self, np.broadcast_to(np.int8(0), X.shape), reset=reset)
            return X
        array = validate_data(self, X, reset=reset, dtype=[np.float32, np.float64])
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))  # torch warns of what it could not write to
