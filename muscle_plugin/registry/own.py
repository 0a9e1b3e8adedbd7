"""The algorithms of this package, by name, with their settings and views; their classes are in ``algorithms/``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Argument:
    """One setting that an algorithm adds, as in USB's ``SSL_Argument``."""

    name: str
    type: type
    default: Any
    help: str = ""


@dataclass(frozen=True)
class Algorithm:
    """One entry of a registry: its class, the parameters of its ``train_step`` and its settings."""

    name: str
    class_name: str
    views: tuple[str, ...]
    arguments: tuple[Argument, ...]


_MEAN_TEACHER = (
    Argument("consistency", float, 100.0, "weight of the consistency loss; its authors take 100"),
    Argument("consistency_rampup", int, 5, "epochs over which that weight rises"),
    Argument("logit_distance", float, 0.01, "weight that ties the two heads of a net that has two"),
)
_LABEL_PROPAGATION = (
    Argument("lp_start", float, 0.5, "share of the epochs that is stage 1, without pseudo-labels"),
    Argument("lp_k", int, 50, "nearest neighbours in the graph"),
    Argument("lp_gamma", float, 3.0, "power of the affinity"),
    Argument("lp_alpha", float, 0.99, "strength of the diffusion, below 1"),
    Argument("lp_max_iter", int, 20, "iterations of conjugate gradients"),
    Argument("lp_tol", float, 1e-6, "relative residual at which they end"),
)
_CONTRASTIVE = (
    Argument("contrastive_weight", float, 1.0, "weight of the contrastive loss"),
    Argument("temperature", float, 0.5, "temperature of NT-Xent"),
)
_TWO_WEAK_VIEWS = ("x_lb", "y_lb", "x_lb_w2", "x_ulb_w", "x_ulb_w2")

OWN_ALGORITHMS: dict[str, Algorithm] = {
    a.name: a
    for a in (
        Algorithm("meanteacher_original", "OriginalMeanTeacher", _TWO_WEAK_VIEWS, _MEAN_TEACHER),
        Algorithm("labelprop", "LabelPropagation", ("x_lb", "y_lb", "x_ulb_w", "idx_ulb"), _LABEL_PROPAGATION),
        Algorithm(
            "meanteacher_labelprop", "MeanTeacherLabelPropagation", (*_TWO_WEAK_VIEWS, "idx_ulb"),
            (*_LABEL_PROPAGATION, *_MEAN_TEACHER),
        ),
        Algorithm("contrastive", "Contrastive", ("x_lb", "y_lb", "x_ulb_w", "x_ulb_s"), _CONTRASTIVE),
    )
}  # fmt: skip


def stage_1_epochs(lp_start: float, epochs: int) -> int:
    """Whole epochs of label propagation's first stage."""
    return round(lp_start * epochs)
