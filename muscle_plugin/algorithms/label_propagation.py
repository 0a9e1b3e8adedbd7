"""Label propagation (Iscen et al. 2019, arXiv 1904.04717), alone and with Mean Teacher, in the two stages of its authors.

Stage 1 trains on the labels (with Mean Teacher: on its loss). Stage 2 goes on from stage 1's weights, begins its epochs
and its learning rate anew, and before each epoch gives every unlabelled image a pseudo-label and a weight by diffusion on
the graph of nearest neighbours of the present features.
"""

from __future__ import annotations

import math
from argparse import Namespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from muscle_plugin import distributed
from muscle_plugin.algorithms.mean_teacher import OriginalMeanTeacher
from muscle_plugin.data.view_pool import PooledBatches
from muscle_plugin.errors import InputError
from muscle_plugin.propagation import propagate
from muscle_plugin.registry.catalogue import class_mass, stage_1_epochs
from muscle_plugin.training.protocols import StepOutput
from muscle_plugin.usb.names import AlgorithmBase, Hook

if TYPE_CHECKING:
    from muscle_plugin.training import Host
else:
    Host = object


#: The most classes whose pseudo-labels are logged each by itself.
LOGGED_CLASSES = 20


class _BeforeEpoch(Hook):
    """Refreshes the pseudo-labels before each epoch of stage 2."""

    def before_train_epoch(self, algorithm: PseudoLabels) -> None:
        if algorithm.stage == 2:
            # of features that never change the pseudo-labels do not, either
            if algorithm.pseudo_labels is None or algorithm.encoder is None:
                algorithm.refresh_pseudo_labels()
            if algorithm.it == algorithm.stage_1_steps:
                algorithm.prepare_steps()  # the step of stage 2 forwards other views


class PseudoLabels(Host):
    """Mixin of the two classes below: the stages, the pseudo-labels, and the loss on them.

    Attributes:
        pseudo_labels: (unlabelled images,) int64; like the weights None before stage 2.
        pseudo_weights: (unlabelled images,) w_i c_y, the entropy weight times the class weight.
        class_weights: (C,) c.
        pseudo_log: what is logged of them: accuracy against the held-back labels, where the data set has them; coverage
            (share of the unlabelled images that the diffusion reached), mean weight; for each class and for the lowest one
            the accuracy on its images, and the share of the pseudo-labels that it has.
    """

    def __init__(self, args: Namespace, *others: Any, **named: Any) -> None:
        super().__init__(args, *others, **named)
        self.pseudo_labels: Tensor | None = None
        self.pseudo_weights: Tensor | None = None
        self.class_weights: Tensor | None = None
        self.pseudo_log: dict[str, float] = {}
        mass = class_mass(args.lp_class_mass)
        if isinstance(mass, list) and len(mass) != self.num_classes:  # of a folder it is known only now
            raise InputError(f"lp_class_mass: expected {self.num_classes} numbers, one for each class, got {len(mass)}")

    def set_hooks(self) -> None:
        super().set_hooks()
        self.register_hook(_BeforeEpoch(), "PseudoLabels", "NORMAL")

    @property
    def stage_1_steps(self) -> int:
        """Steps of stage 1: whole epochs, ``lp_start`` of all; with all epochs also the steps left over after them."""
        epochs = stage_1_epochs(self.args.lp_start, self.epochs)
        return self.num_train_iter if epochs == self.epochs else epochs * max(1, self.num_iter_per_epoch)

    def schedule_restarts(self) -> tuple[int, ...]:
        """The steps at which the learning rate begins anew."""
        return (self.stage_1_steps,)

    @property
    def stage_epoch(self) -> int:
        """The epoch, counted from the beginning of the stage."""
        return self.epoch if self.stage == 1 else self.epoch - stage_1_epochs(self.args.lp_start, self.epochs)

    @property
    def stage(self) -> int:
        return 1 if self.it < self.stage_1_steps else 2

    def refresh_pseudo_labels(self) -> None:
        """Pseudo-labels and weights from the student's present features (eval mode, weakly augmented images), or from those of
        a frozen backbone (images as they are). Of several processes each takes the features of its part of the images, and
        the first propagates."""
        args, source, split, device = self.args, self.source, self.split, self.device
        points = torch.cat([split.labelled, split.unlabelled[~torch.isin(split.unlabelled, split.labelled)]])
        every = len(points) == len(source.train)
        pooled = self.batches if every and isinstance(self.batches, PooledBatches) else None
        features = torch.empty(0)
        if pooled:  # in any order: the neighbours are the same for all runs
            points = torch.arange(len(points))
        else:
            at_once = self.settings.eval_batch_size
            features = self.batches.features(self.model, source.train[points], self.it, at_once, self.amp_cm)
            features = distributed.gather_parts(features, to_first=True)
        known = torch.where(torch.isin(points, split.labelled), source.train_labels[points], -1)

        def pseudo_label() -> tuple[Tensor, Tensor, Tensor]:
            k = args.lp_k or None
            found = propagate(
                pooled.neighbours(k) if pooled else features, known.to(device), self.num_classes,
                method=args.lp_method, class_mass=class_mass(args.lp_class_mass), k=k, affinity=args.lp_affinity,
                gamma=args.lp_gamma, alpha=args.lp_alpha, max_iter=args.lp_max_iter, tol=args.lp_tol,
            )  # fmt: skip
            return found.labels.cpu(), found.weights.cpu(), found.class_weights.cpu()

        labels, weights, self.class_weights = (t.to(device) for t in distributed.from_first(pseudo_label))
        place = torch.empty(len(source.train), dtype=torch.int64)
        place[points] = torch.arange(len(points))
        chosen = place[split.unlabelled].to(device)
        self.pseudo_labels, weights = labels[chosen], weights[chosen]
        self.pseudo_weights = weights * self.class_weights[self.pseudo_labels]
        truth = source.train_labels[split.unlabelled].to(device)
        reached, right = weights > 0, self.pseudo_labels == truth
        told = (truth >= 0) & reached
        self.pseudo_log = {
            "pseudo_coverage": float(reached.float().mean()),
            "pseudo_weight": float(weights.mean()),
            "pseudo_accuracy": float(right[told].float().mean()),  # of none: not a number
        }

        def counts(classes: Tensor) -> Tensor:
            return torch.bincount(classes, minlength=self.num_classes).cpu()

        for name, of_classes in (
            ("pseudo_accuracy", counts(truth[told & right]) / counts(truth[told])),
            ("pseudo_share", counts(self.pseudo_labels[reached]) / reached.sum().cpu()),
        ):
            values = of_classes.tolist()
            self.pseudo_log[f"{name}_lowest"] = min((x for x in values if not math.isnan(x)), default=math.nan)
            if len(values) <= LOGGED_CLASSES:
                self.pseudo_log |= {f"{name}/{c}": x for c, x in zip(source.classes, values, strict=True)}

    def class_loss(self, logits: Tensor, y_lb: Tensor, idx_ulb: Tensor | None) -> Tensor:
        """sum_i w_i c_y CE_i over the images of the step, labelled ones first among the (B, C) logits, divided by B; in stage
        1 over the labelled alone."""
        b, labelled, unlabelled = len(logits), logits[: len(y_lb)], logits[len(y_lb) :]
        per_image = F.cross_entropy(labelled, y_lb, reduction="none")
        if self.stage == 1 or self.pseudo_labels is None or self.pseudo_weights is None or self.class_weights is None:
            return per_image.sum() / b
        pseudo = F.cross_entropy(unlabelled, self.pseudo_labels[idx_ulb], reduction="none")
        return ((self.class_weights[y_lb] * per_image).sum() + (self.pseudo_weights[idx_ulb] * pseudo).sum()) / b


class LabelPropagation(PseudoLabels, AlgorithmBase):
    """A step of stage 1 fits the labels; one of stage 2 fits labels and weighted pseudo-labels alike.

    Reads ``x_lb``, ``y_lb``, ``x_ulb_w`` and ``idx_ulb``; returns USB's pair of dictionaries.
    """

    def train_step(  # type: ignore[override]
        self, x_lb: Tensor, y_lb: Tensor, x_ulb_w: Tensor, idx_ulb: Tensor
    ) -> StepOutput:
        images = x_lb if self.stage == 1 else torch.cat([x_lb, x_ulb_w])
        with self.amp_cm():
            logits = self.model(images)["logits"].float()
        if self.stage == 1:
            loss = F.cross_entropy(logits, y_lb)
        else:
            loss = self.class_loss(logits, y_lb, idx_ulb)
        log = self.process_log_dict(sup_loss=loss.detach(), total_loss=loss.detach(), **self.pseudo_log)
        return self.process_out_dict(loss=loss), log


class MeanTeacherLabelPropagation(PseudoLabels, OriginalMeanTeacher):
    """Mean Teacher in both stages; in stage 2 its class loss counts the weighted pseudo-labels too.

    Reads the views of :class:`OriginalMeanTeacher` and ``idx_ulb``; returns USB's pair of dictionaries.
    """

    def train_step(  # type: ignore[override]
        self, x_lb: Tensor, y_lb: Tensor, x_lb_w2: Tensor, x_ulb_w: Tensor, x_ulb_w2: Tensor, idx_ulb: Tensor
    ) -> StepOutput:
        out, log = self.teach(x_lb, y_lb, x_lb_w2, x_ulb_w, x_ulb_w2, idx_ulb)
        return out, log | self.process_log_dict(**self.pseudo_log)
