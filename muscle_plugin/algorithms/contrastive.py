"""The contrastive loss in place of, or beside, mutual information: the comparison of the paper's Figure 2 (c) and (d)."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from torch import Tensor

from muscle_plugin import distributed
from muscle_plugin.training.protocols import StepOutput
from muscle_plugin.usb.names import AlgorithmBase


class Contrastive(AlgorithmBase):
    """A step fits the labels, and tells every unlabelled image from the others by its weak and its hard view (NT-Xent).

    Reads ``x_lb``, ``y_lb``, ``x_ulb_w`` and ``x_ulb_s``; returns USB's pair of dictionaries. NT-Xent (Chen et al. 2020,
    arXiv 2002.05709) is pytorch-metric-learning's, on the L2-normalised features: no projection head, as the paper names
    none; over the images of all processes. ``muscle_contrastive`` has both losses. With ``--stage pretrain`` the labels are
    left out.
    """

    def __init__(self, args: Namespace, *others: Any, **named: Any) -> None:
        super().__init__(args, *others, **named)
        from pytorch_metric_learning.losses import SupConLoss

        self.contrastive_weight = args.contrastive_weight
        # with one other view of an image this is NT-Xent, in n^2 steps; the library's NTXentLoss takes n^3
        self.nt_xent = SupConLoss(temperature=args.temperature)

    def train_step(self, x_lb: Tensor, y_lb: Tensor, x_ulb_w: Tensor, x_ulb_s: Tensor) -> StepOutput:
        j, i = len(x_lb), len(x_ulb_w)
        with self.amp_cm():
            out = self.model(torch.cat([x_lb, x_ulb_w, x_ulb_s]))
        sup_loss = self.ce_loss(out["logits"][:j].float(), y_lb, reduction="mean")
        image = torch.arange(i, device=x_lb.device).repeat(2) + i * distributed.rank()
        features, image = distributed.gather(out["feat"][j:].float()), distributed.gather(image)
        contrastive = self.nt_xent(features, image)
        sup_weight = 0.0 if self.args.stage == "pretrain" else 1.0
        loss = sup_weight * sup_loss + self.contrastive_weight * contrastive
        log = self.process_log_dict(
            sup_loss=sup_loss.detach(), unsup_loss=contrastive.detach(), total_loss=loss.detach()
        )
        return self.process_out_dict(loss=loss), log
