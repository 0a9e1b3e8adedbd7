"""Mean Teacher as its authors train it on CIFAR-10 (Tarvainen & Valpola 2017, arXiv 1703.01780; their PyTorch code).

USB's ``meanteacher`` differs: mean cross-entropy over labelled images, consistency on unlabelled images only, a linear
ramp over steps, and a teacher without statistics of its own.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from muscle_plugin.registry.catalogue import usb_arguments
from muscle_plugin.schedules import sigmoid_rampup
from muscle_plugin.training.protocols import StepOutput
from muscle_plugin.usb.names import AlgorithmBase, SSL_Argument


class OriginalMeanTeacher(AlgorithmBase):
    """A step fits the labels, and draws the student's predictions of all images to the teacher's of another weak view.

    Reads ``x_lb``, ``y_lb``, ``x_ulb_w`` (the student's views) and ``x_lb_w2``, ``x_ulb_w2`` (the teacher's, weak too);
    returns USB's pair of dictionaries. The loss is::

        sum_labelled CE / B  +  consistency * ramp * mean (p - q)^2  +  logit_distance * mean (u - v)^2

    B counts all images of the step; p are the student's probabilities and q the teacher's, over images and classes; the
    last term is there for a net of two heads, whose logits u (classes) and v (consistency) it holds together. The ramp is
    exp(-5 (1 - e / consistency_rampup)^2) at epoch e. The teacher trains its own batch statistics; its weights are the
    average with momentum min(1 - 1 / (t + 1), ema_m) at step t.
    """

    #: The teacher's batch statistics are its own, not copies of the student's (read by the EMA hook).
    ema_copies_buffers = False
    #: The averaging begins with small momentum (read by the EMA hook).
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
        n = len(x_lb)
        feat = {"x_lb": student["feat"][:n], "x_ulb_w": student["feat"][n:]}
        return self.process_out_dict(loss=loss, feat=feat), log

    @property
    def stage_epoch(self) -> int:
        """The epoch on which the ramp depends."""
        return int(self.epoch)

    def class_loss(self, logits: Tensor, y_lb: Tensor, idx_ulb: Tensor | None) -> Tensor:
        """Cross-entropy of the labelled images, which come first among the (B, C) logits, over B."""
        return F.cross_entropy(logits[: len(y_lb)], y_lb, reduction="sum") / len(logits)

    @staticmethod
    def get_argument() -> list[SSL_Argument]:
        return usb_arguments("meanteacher_original")
