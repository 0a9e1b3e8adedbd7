"""Mean Teacher (Tarvainen & Valpola 2017, arXiv 1703.01780): in USB's variant, and as its authors train it on CIFAR-10.

The class of USB's git main takes the student's logits from the teacher's output, so that its consistency loss is zero
and trains nothing (issues #102 and #226 there); release 0.3.2 is right, and :class:`MeanTeacher` does what it does.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from muscle_plugin.schedules import sigmoid_rampup
from muscle_plugin.training.protocols import StepOutput
from muscle_plugin.usb.names import ALGORITHMS, AlgorithmBase

_USBMeanTeacher: Any = ALGORITHMS["meanteacher"]


class MeanTeacher(_USBMeanTeacher):
    """A step fits the labels, and draws the student's prediction of one weak view to the teacher's of another.

    Reads ``x_lb``, ``y_lb``, ``x_ulb_w`` (the teacher's view) and ``x_ulb_s`` (the student's, weak as well); returns
    USB's pair of dictionaries. The teacher is ``self.ema_model``, with its own batch statistics and without gradient.
    Unlabelled images leave the running statistics of batch norm alone. The consistency weight rises linearly over the
    first ``unsup_warm_up`` of all steps. Equation 3 of the MUSCLE paper.
    """

    def train_step(self, x_lb: Tensor, y_lb: Tensor, x_ulb_w: Tensor, x_ulb_s: Tensor) -> StepOutput:
        with self.amp_cm():
            labelled = self.model(x_lb)
            with torch.no_grad():
                target = self.compute_prob(self.ema_model(x_ulb_w)["logits"])
            self.bn_controller.freeze_bn(self.model)
            student = self.model(x_ulb_s)
            self.bn_controller.unfreeze_bn(self.model)
            sup_loss = self.ce_loss(labelled["logits"], y_lb, reduction="mean")
            unsup_loss = self.consistency_loss(student["logits"], target, "mse")
            ramp = min(self.it / (self.unsup_warm_up * self.num_train_iter), 1.0) if self.unsup_warm_up else 1.0
            loss = sup_loss + self.lambda_u * ramp * unsup_loss
        feat = {"x_lb": labelled["feat"], "x_ulb_s": student["feat"]}
        log = self.process_log_dict(
            sup_loss=sup_loss.detach(), unsup_loss=unsup_loss.detach(), total_loss=loss.detach()
        )
        return self.process_out_dict(loss=loss, feat=feat), log


class OriginalMeanTeacher(AlgorithmBase):
    """The authors' PyTorch code: a step fits the labels, and draws the student's predictions of all images, labelled ones too,
    to the teacher's of another weak view.

    Reads ``x_lb``, ``y_lb``, ``x_ulb_w`` (the student's views) and ``x_lb_w2``, ``x_ulb_w2`` (the teacher's, weak too);
    returns USB's pair of dictionaries. The loss is::

        sum_labelled CE / B  +  consistency * ramp * mean (p - q)^2  +  logit_distance * mean (u - v)^2

    B counts all images of the step; p are the student's probabilities and q the teacher's, over images and classes; the
    last term is there for a net of two heads, whose logits u (classes) and v (consistency) it holds together. The ramp is
    exp(-5 (1 - e / consistency_rampup)^2) at epoch e. The teacher trains its own batch statistics; its weights are the
    average with momentum min(1 - 1 / (t + 1), ema_m) at step t.
    """

    # read by the EMA hook: the teacher's batch statistics are its own, and the averaging begins with small momentum
    ema_copies_buffers = False
    ema_warms_up = True

    def __init__(self, args: Namespace, *others: Any, **named: Any) -> None:
        super().__init__(args, *others, **named)
        self.consistency = args.consistency
        self.consistency_rampup = args.consistency_rampup
        self.logit_distance = args.logit_distance

    def train_step(self, x_lb: Tensor, y_lb: Tensor, x_lb_w2: Tensor, x_ulb_w: Tensor, x_ulb_w2: Tensor) -> StepOutput:
        return self.teach(x_lb, y_lb, x_lb_w2, x_ulb_w, x_ulb_w2)

    def teach(
        self, x_lb: Tensor, y_lb: Tensor, x_lb_w2: Tensor, x_ulb_w: Tensor, x_ulb_w2: Tensor,
        idx_ulb: Tensor | None = None,
    ) -> StepOutput:  # fmt: skip
        """The step; ``idx_ulb`` goes to :meth:`class_loss`."""
        with self.amp_cm():
            student = self.model(torch.cat([x_lb, x_ulb_w]))
            with torch.no_grad():
                self.ema_model.train()
                teacher = self.ema_model(torch.cat([x_lb_w2, x_ulb_w2]))["logits"].float()
        logits = student["logits"].float()
        second = student.get("logits2", student["logits"]).float()
        class_loss = self.class_loss(logits, y_lb, idx_ulb)
        consistency = F.mse_loss(second.softmax(1), teacher.softmax(1))
        distance = F.mse_loss(logits, second)
        ramp = sigmoid_rampup(self.stage_epoch, self.consistency_rampup)
        loss = class_loss + self.consistency * ramp * consistency + self.logit_distance * distance
        log = self.process_log_dict(
            sup_loss=class_loss.detach(), unsup_loss=consistency.detach(), total_loss=loss.detach()
        )
        return self.process_out_dict(loss=loss), log

    @property
    def stage_epoch(self) -> int:
        """The epoch on which the ramp depends."""
        return int(self.epoch)

    def class_loss(self, logits: Tensor, y_lb: Tensor, idx_ulb: Tensor | None) -> Tensor:
        """Cross-entropy of the labelled images, which come first among the (B, C) logits, over B."""
        return F.cross_entropy(logits[: len(y_lb)], y_lb, reduction="sum") / len(logits)
