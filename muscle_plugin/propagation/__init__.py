"""Label propagation by diffusion on a nearest-neighbour graph (Iscen et al. 2019, arXiv 1904.04717)."""

from muscle_plugin.propagation.diffusion import (
    Propagation,
    PropagationStats,
    class_weights,
    conjugate_gradients,
    propagate,
    pseudo_labels,
)
from muscle_plugin.propagation.estimator import DiffusionLabelPropagation
from muscle_plugin.propagation.graph import AffinityGraph, affinity_graph, nearest_neighbours, normalise_rows

__all__ = [
    "AffinityGraph",
    "DiffusionLabelPropagation",
    "Propagation",
    "PropagationStats",
    "affinity_graph",
    "class_weights",
    "conjugate_gradients",
    "nearest_neighbours",
    "normalise_rows",
    "propagate",
    "pseudo_labels",
]
