"""Mutual information between the predictions of two views (MUSCLE, arXiv 2012.00150, equations 4 to 7 and 9).

=============  ==========================================================================================
symbol         meaning
=============  ==========================================================================================
``p``          (N, C) probabilities of one view of N images, each row summing to 1: f(x) of equation 6
``q``          (N, C) probabilities of another view of the same images, or (V, N, C) of V such views
Q              (C, C) ``1/n sum_i p_i q_i^T``, over the n = N (or V * N) pairs
P              (C, C) ``(Q + Q^T) / 2``, the joint distribution; its row sums are the marginal P_c
I(z, z')       ``sum_cc' P_cc' ln(P_cc' / (P_c P_c'))`` in nats, between 0 and ln C: equation 5
H(z)           ``-sum_c P_c ln P_c`` in nats; near 0 when all images are given one class (collapse)
H(z|z')        ``H(z) - I(z, z')`` in nats; near 0 when the views agree with certainty: equation 9
=============  ==========================================================================================

Everything is computed in float32 (float64 stays float64), under autocast too: half precision would lose the small entries of
P in the sum over a batch.

With ``global_batch`` N counts the images of all processes, which have equally many: Q is their mean, with its gradient. The
mean of the processes' own values would be another quantity, since I is not linear in Q.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from muscle_plugin import distributed
from muscle_plugin.errors import InputError

__all__ = [
    "MutualInformationLoss",
    "MutualInformationTerms",
    "joint_distribution",
    "mutual_information",
    "mutual_information_terms",
]


class MutualInformationTerms(NamedTuple):
    """The three quantities of equation 9, each a scalar tensor in nats: ``information = entropy - conditional``."""

    information: Tensor
    entropy: Tensor
    conditional: Tensor


def joint_distribution(p: Tensor, q: Tensor, global_batch: bool = False) -> Tensor:
    """Compute the symmetrised joint distribution of two views' predictions (equation 6).

    Args:
        p: (N, C) probabilities.
        q: (N, C) probabilities of the paired views, or (V, N, C) of V views, each paired with ``p``.
        global_batch: average over the images of all processes.

    Returns:
        (C, C) symmetric matrix whose entries sum to 1; float32, or float64 for float64 input.

    Raises:
        InputError: the shapes do not pair.
    """
    if p.dim() != 2 or 0 in p.shape:
        raise InputError(f"p: expected shape (N, C) with N, C >= 1, received {tuple(p.shape)}")
    if q.dim() not in (2, 3) or q.shape[-2:] != p.shape or q.shape[0] < 1:
        n, c = p.shape
        raise InputError(f"q: expected shape ({n}, {c}) or (V, {n}, {c}) to pair with p, received {tuple(q.shape)}")
    with torch.autocast(p.device.type, enabled=False):
        dtype = torch.float64 if p.dtype == q.dtype == torch.float64 else torch.float32
        p, q = p.to(dtype), q.to(dtype)
        if q.dim() == 3:
            q = q.mean(0)  # the mean over views commutes with the product: no V copies of p are made
        joint = p.t() @ q / p.shape[0]
        if global_batch:
            joint = distributed.mean(joint)
        return (joint + joint.t()) / 2


def _x_log_x(x: Tensor) -> Tensor:
    """x ln x, 0 at 0, with a finite gradient there (ln of the smallest normal number, about -87 in float32)."""
    return x * x.clamp_min(torch.finfo(x.dtype).tiny).log()


def mutual_information_terms(p: Tensor, q: Tensor, global_batch: bool = False) -> MutualInformationTerms:
    """Compute I(z, z'), H(z) and H(z|z') of paired predictions (equations 5, 6 and 9).

    Arguments and errors are those of :func:`joint_distribution`; the terms are differentiable in ``p`` and ``q``.
    """
    joint = joint_distribution(p, q, global_batch)
    entropy = -_x_log_x(joint.sum(0)).sum()  # P is symmetric: both marginals are the same
    joint_entropy = -_x_log_x(joint).sum()
    return MutualInformationTerms(2 * entropy - joint_entropy, entropy, joint_entropy - entropy)


def mutual_information(p: Tensor, q: Tensor, global_batch: bool = False) -> Tensor:
    """Compute the mutual information I(z, z') of paired predictions (equation 5), in nats.

    Arguments and errors are those of :func:`joint_distribution`.

    Returns:
        Scalar between 0 (independent) and ln C (certain, agreeing and balanced), up to rounding.
    """
    return mutual_information_terms(p, q, global_batch).information


class MutualInformationLoss(nn.Module):
    """``-weight * I(z, z')`` of the soft-max of logits: the term that equation 7 subtracts.

    Args:
        weight: alpha of equation 7, at least 0.
        global_batch: take the mutual information over the images of all processes; after the usual averaging of
            gradients over processes, they are those of one process with all images.

    Raises:
        InputError: negative weight.
    """

    def __init__(self, weight: float = 1.0, global_batch: bool = False) -> None:
        super().__init__()
        if not weight >= 0:
            raise InputError(f"weight: expected a number >= 0, received {weight}")
        self.weight, self.global_batch = weight, global_batch

    def forward(self, weak_logits: Tensor, strong_logits: Tensor) -> tuple[Tensor, MutualInformationTerms]:
        """(loss, terms) from logits.

        Args:
            weak_logits: (N, C), one weak view per image.
            strong_logits: (V, N, C), V strong views per image, or (N, C) for one.
        """
        with torch.autocast(weak_logits.device.type, enabled=False):
            weak, strong = (
                x.to(torch.promote_types(x.dtype, torch.float32)).softmax(-1) for x in (weak_logits, strong_logits)
            )
            terms = mutual_information_terms(weak, strong, self.global_batch)
        return -self.weight * terms.information, terms
