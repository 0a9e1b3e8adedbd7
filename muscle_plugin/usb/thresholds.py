"""USB's adaptive thresholds and distribution alignment, computed on the device: the same values without waiting for it.

USB 0.3.2's hooks bring class counts to the CPU, index by boolean masks or turn a pointer into a Python integer on every step;
FlexMatch's copies a label per unlabelled image. With several processes two of them are wrong as well: FlexMatch's keeps the
labels of its own process alone, SoftMatch's calls a function that it does not have. A class here takes over an instance of its
base with its attributes, so that checkpoints, and algorithms that look into their hooks, find what they know.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from muscle_plugin import distributed
from muscle_plugin.errors import InputError
from muscle_plugin.usb.calls import speed_patches
from muscle_plugin.usb.names import (
    DistAlignQueueHook,
    FlexMatchThresholdingHook,
    FreeMatchThresholdingHook,
    Hook,
    SoftMatchWeightingHook,
    concat_all_gather,
)


def class_counts(labels: Tensor, num_classes: int) -> Tensor:
    """(C,) int64 counts of (N,) labels 0 to C - 1; unlike that of ``bincount`` its size does not depend on the labels."""
    return torch.zeros(num_classes, dtype=torch.int64, device=labels.device).scatter_add_(
        0, labels, torch.ones_like(labels)
    )


class FlexMatchThresholds(FlexMatchThresholdingHook):
    """FlexMatch's curriculum (Zhang et al. 2021, equations 5 to 9 and 11).

    ``selected_label`` (N,) holds for each unlabelled image the class that was last predicted for it with confidence, -1
    before; ``classwise_acc`` (C,) the learning status beta of each class. An image counts if its confidence reaches
    ``p_cutoff * beta / (2 - beta)`` with the status of its predicted class before this step.
    """

    selected_label: Tensor
    classwise_acc: Tensor

    @torch.no_grad()
    def masking(
        self, algorithm: Any, logits_x_ulb: Tensor, idx_ulb: Tensor, softmax_x_ulb: bool = True, *_: Any, **__: Any
    ) -> Tensor:
        self.selected_label = self.selected_label.to(logits_x_ulb.device)
        self.classwise_acc = self.classwise_acc.to(logits_x_ulb.device)
        probabilities = logits_x_ulb.detach()
        if softmax_x_ulb:
            probabilities = algorithm.compute_prob(probabilities)
        confidence, predicted = probabilities.max(dim=-1)
        status = self.classwise_acc[predicted]
        mask = confidence.ge(algorithm.p_cutoff * (status / (2.0 - status))).to(confidence.dtype)
        # the labels of confident images, of all processes, are kept
        n = len(self.selected_label)
        place = torch.where(confidence.ge(algorithm.p_cutoff), idx_ulb, n)  # one place more, for the others
        place, labels = distributed.gather(place), distributed.gather(predicted)
        self.selected_label = torch.cat([self.selected_label, labels[:1]]).index_put_((place,), labels)[:n]
        self.update()
        return mask

    @torch.no_grad()
    def update(self, *_: Any, **__: Any) -> None:
        """Set beta_c to the images last given class c over those of the most frequent class; with ``thresh_warmup`` images
        without a class count as one. While all images are of one kind beta stays as it is."""
        counts = class_counts(self.selected_label + 1, self.num_classes + 1)
        of_classes, most = counts[1:], counts.max()
        over = most if self.thresh_warmup else of_classes.max()
        status = (of_classes.double() / over).to(self.classwise_acc.dtype)
        self.classwise_acc = torch.where(most < self.ulb_dest_len, status, self.classwise_acc)


class FreeMatchThresholds(FreeMatchThresholdingHook):
    """FreeMatch's self-adaptive thresholds (Wang et al. 2023, equations 5 to 8): moving averages of the confidence
    ``time_p``, of the mean prediction ``p_model`` (C,) and of the classes predicted ``label_hist`` (C,)."""

    p_model: Tensor
    label_hist: Tensor
    time_p: Tensor

    @torch.no_grad()
    def update(self, algorithm: Any, probs_x_ulb: Tensor) -> None:
        p = distributed.gather(probs_x_ulb)
        confidence, predicted = p.max(dim=-1, keepdim=True)
        now = torch.quantile(confidence, 0.8) if algorithm.use_quantile else confidence.mean()
        counts = class_counts(predicted.flatten(), self.num_classes).to(self.p_model.dtype)
        old, new = self.m, 1 - self.m
        self.time_p = self.time_p * old + new * now
        if algorithm.clip_thresh:
            self.time_p = self.time_p.clip(0.0, 0.95)
        self.p_model = self.p_model * old + new * p.mean(dim=0)
        self.label_hist = self.label_hist * old + new * (counts / counts.sum())
        # the algorithm reads its own copies
        algorithm.time_p, algorithm.p_model, algorithm.label_hist = self.time_p, self.p_model, self.label_hist


class SoftMatchWeights(SoftMatchWeightingHook):
    """SoftMatch's truncated Gaussian (Chen et al. 2023, equations 7 and 8): moving averages of the confidence's mean and
    variance, in float32 as USB keeps them."""

    prob_max_mu_t: Tensor
    prob_max_var_t: Tensor

    # USB's update calls it as a method
    concat_all_gather = staticmethod(concat_all_gather)

    @torch.no_grad()
    def update(self, algorithm: Any, probs_x_ulb: Tensor) -> tuple[Tensor, Tensor]:
        if self.per_class:
            return super().update(algorithm, probs_x_ulb)
        p = distributed.gather(probs_x_ulb)
        confidence, predicted = p.max(dim=-1)
        self.prob_max_mu_t = self._average(self.prob_max_mu_t, confidence.mean())
        self.prob_max_var_t = self._average(self.prob_max_var_t, confidence.var(unbiased=True))
        return confidence, predicted

    def _average(self, before: Tensor, now: Tensor) -> Tensor:
        # USB weights the new value as a Python float: in float64, rounded once
        return self.m * before + ((1 - self.m) * now.double()).to(before.dtype)


class AlignmentQueue(DistAlignQueueHook):
    """Distribution alignment over the last ``queue_length`` batches (CoMatch, SimMatch): mean predictions written in turn
    into ``p_model`` (L, C), and into ``p_target`` where the target is learnt too; the places are tensors (1,)."""

    p_model: Tensor
    p_model_ptr: Tensor
    p_target: Tensor
    p_target_ptr: Tensor | None

    @torch.no_grad()
    def update_p(self, algorithm: Any, probs_x_ulb: Tensor, probs_x_lb: Tensor | None) -> None:
        device = probs_x_ulb.device
        self.p_model, self.p_model_ptr = self.p_model.to(device), self.p_model_ptr.to(device)
        self.p_target = self.p_target.to(device)
        unlabelled = distributed.gather(probs_x_ulb.detach())
        self.p_model_ptr = self._write(self.p_model, self.p_model_ptr, unlabelled)
        if self.p_target_ptr is not None:
            assert probs_x_lb is not None
            labelled = distributed.gather(probs_x_lb)
            self.p_target_ptr = self._write(self.p_target, self.p_target_ptr.to(device), labelled)

    def _write(self, queue: Tensor, place: Tensor, probabilities: Tensor) -> Tensor:
        queue.index_copy_(0, place, probabilities.mean(dim=0, keepdim=True).to(queue.dtype))
        return (place + 1) % self.queue_length


#: USB's hook -> what takes over its instance.
TAKE_OVER: dict[type, type] = {
    c.__bases__[0]: c for c in (FlexMatchThresholds, FreeMatchThresholds, SoftMatchWeights, AlignmentQueue)
}


def take_over(hook: Hook, unlabelled: int) -> None:
    """Give a hook of USB's the class that computes the same on the device; another hook stays as it is. An InputError
    where a step's ``unlabelled`` images, those of all processes, are too few for it."""
    if isinstance(hook, SoftMatchWeightingHook) and not hook.per_class and unlabelled < 2:
        raise InputError(
            "softmatch: the variance of the confidences needs 2 or more unlabelled images per step, got 1;"
            " give a larger --total_batch or --ratio"
        )
    if type(hook) in TAKE_OVER and (speed_patches() or distributed.world_size() > 1):
        hook.__class__ = TAKE_OVER[type(hook)]
