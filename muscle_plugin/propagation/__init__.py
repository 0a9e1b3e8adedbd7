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
from muscle_plugin.propagation.graph import (
    AffinityGraph,
    Neighbourhood,
    affinity_graph,
    nearest_neighbours,
    neighbourhood,
    normalise_rows,
)

__all__ = [
    "AffinityGraph",
    "DiffusionLabelPropagation",
    "Neighbourhood",
    "Propagation",
    "PropagationStats",
    "affinity_graph",
    "class_weights",
    "conjugate_gradients",
    "nearest_neighbours",
    "neighbourhood",
    "normalise_rows",
    "propagate",
    "pseudo_labels",
]
