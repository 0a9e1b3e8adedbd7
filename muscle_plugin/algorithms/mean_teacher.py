"""Mean Teacher in USB's variant, working on every version of USB.

The class of USB's git main takes the student's logits from the teacher's output, so that its consistency loss is zero
and trains nothing (issues #102 and #226 there); release 0.3.2 is right. This step does what 0.3.2's does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from muscle_plugin.usb.names import ALGORITHMS

_USBMeanTeacher: Any = ALGORITHMS["meanteacher"]


class MeanTeacher(_USBMeanTeacher):
    """A step fits the labels, and draws the student's prediction of one weak view to the teacher's of another.

    Reads ``x_lb``, ``y_lb``, ``x_ulb_w`` (the teacher's view) and ``x_ulb_s`` (the student's, weak as well); returns
    USB's pair of dictionaries. The teacher is ``self.ema_model``, with its own batch statistics and without gradient.
    Unlabelled images leave the running statistics of batch norm alone. The consistency weight rises linearly over the
    first ``unsup_warm_up`` of all steps. Tarvainen & Valpola 2017; equation 3 of the MUSCLE paper.
    """

    def train_step(self, x_lb: Tensor, y_lb: Tensor, x_ulb_w: Tensor, x_ulb_s: Tensor) -> tuple[Any, Any]:
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
