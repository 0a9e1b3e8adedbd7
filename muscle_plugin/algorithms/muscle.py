"""MUSCLE as a mixin: it subtracts alpha times the mutual information between views from any algorithm's loss.

``class MuscleFixMatch(Muscle, Host, FixMatch)`` is MUSCLE+FixMatch; over USB's supervised class it is plain MUSCLE.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from muscle_plugin.algorithms.forward_capture import ForwardCapture, Rows
from muscle_plugin.data.views import LABELLED, STRONG, UNLABELLED, WEAK, View
from muscle_plugin.errors import RunError
from muscle_plugin.losses import MutualInformationLoss, mutual_information
from muscle_plugin.registry.catalogue import MUSCLE_BASE, WEAK_UNLABELLED_VIEW
from muscle_plugin.settings.schema import MuscleSettings, RunSettings
from muscle_plugin.training.protocols import StepOutput
from muscle_plugin.training.state import outside_state, undone

if TYPE_CHECKING:
    from muscle_plugin.training import Host

    class Settings(MuscleSettings, RunSettings): ...

else:
    Host = object

#: The strong (hard) views that MUSCLE adds to a batch, by kind of image.
EXTRA_HARD = {LABELLED: "x_lb_h", UNLABELLED: "x_ulb_h"}
#: The weak views that it adds where the base has none.
USUAL_WEAK = {LABELLED: "x_lb", UNLABELLED: WEAK_UNLABELLED_VIEW}


#: The share of ln C above which agreement by chance is noted.
MOSTLY_CHANCE = 3 / 4


def chance_information(images: int, classes: int) -> float:
    """The mutual information, in nats, of one draw of independent one-hot predictions of two views: how far the estimate
    from so many images can be off."""
    drawn = torch.randint(classes, (2, images), generator=torch.Generator().manual_seed(0))
    return float(mutual_information(*F.one_hot(drawn, classes).float()))


@dataclass(frozen=True)
class Plan:
    """Where a step's predictions come from, so that no image is forwarded twice.

    Attributes:
        found: views that the base forwards, and where.
        weak: per kind of image (labelled, unlabelled), the view used as the weak one.
        hard: per kind of image, the base's views used as strong ones.
        extra_views: views of the batch that MUSCLE forwards itself, in this order.
        carrier: the base's call to which they are appended; None: they have a forward of their own.
        rows: images per call of the base; empty without a carrier.
    """

    found: Mapping[str, Rows]
    weak: Mapping[str, str]
    hard: Mapping[str, tuple[str, ...]]
    extra_views: tuple[str, ...]
    carrier: int | None = None
    rows: tuple[int, ...] = ()


@outside_state
class Muscle(Host):
    """Mixin in front of :class:`Host` and a USB class (equations 7 and 8).

    A step runs the base's ``train_step`` on the views it asks for, captures its predictions of weak and strong views,
    appends the missing strong views to the base's batch, and returns the base's loss minus ``mi_weight`` times the mutual
    information of one weak view paired with ``hard_views`` strong ones, over labelled and unlabelled images. Logged beside
    the base's values: ``train/mi``, ``train/entropy`` = H(z) and ``train/conditional_entropy`` = H(z|z'), in nats. With
    ``mi_weight`` 0 it steps aside: the base trains bit for bit.
    """

    settings: Settings
    mi_loss: MutualInformationLoss
    plan: Plan | None

    def __init__(self, args: Namespace, *others: Any, **named: Any) -> None:
        super().__init__(args, *others, **named)
        self.mi_loss = MutualInformationLoss(self.settings.mi_weight, global_batch=True)
        self.plan = None
        if self.mi_loss.weight:
            self.batches.prepare((WEAK, STRONG))
        n = sum(self.batch_sizes) if self.settings.mi_labelled else self.batch_sizes[1]
        most = math.log(self.num_classes)
        if self.mi_loss.weight and (chance := chance_information(n, self.num_classes)) > MOSTLY_CHANCE * most:
            self.notes.append(
                f"{n} images per step are too few for the mutual information of {self.num_classes} classes: independent"
                f" predictions already score {chance:.1f} of at most {most:.1f} nats. Use a larger --total_batch"
            )

    def prepare_steps(self) -> None:
        """Observe in a trial step, which is undone, what the base forwards; then ask for the views it lacks."""
        super().prepare_steps()
        if self.mi_loss.weight == 0:
            return
        self.plan = None
        self.batches.add_views({})
        batch = self.batches.batch(self.it)
        with undone(self), self.in_step(), ForwardCapture(self.model, self._live) as capture:
            super().train_step(**self.process_batch(**batch))
        self.model.zero_grad(set_to_none=True)
        self.plan = self._make_plan(capture, batch)

    def _live(self) -> bool:
        return self.ema is None or not self.ema.backup

    def _make_plan(self, capture: ForwardCapture, batch: Mapping[str, Tensor]) -> Plan:
        settings, views = self.settings, self.batches.views
        forwarded = {n: r for n in views if (r := capture.find(batch[n]))}
        with_gradient = {n for n, r in forwarded.items() if r.with_gradient}
        weak: dict[str, str] = {}
        hard: dict[str, tuple[str, ...]] = {}
        extra: dict[str, View] = {}
        for kind in (LABELLED, UNLABELLED) if settings.mi_labelled else (UNLABELLED,):
            own = {n: v for n, v in views.items() if v.images == kind}
            weak[kind] = min(  # the first that is forwarded with a gradient, or at all, or else the first
                (n for n, v in own.items() if v.strength == WEAK),
                key=lambda n: (n not in with_gradient, n not in forwarded),
                default=USUAL_WEAK[kind],
            )
            if weak[kind] not in views:
                extra[weak[kind]] = View(kind, WEAK)
            strong = [n for n, v in own.items() if v.strength == STRONG and n in with_gradient]
            hard[kind] = tuple(strong[: settings.hard_views])
            if missing := settings.hard_views - len(hard[kind]):
                extra[EXTRA_HARD[kind]] = View(kind, STRONG, missing)
        self.batches.add_views(extra)
        found = {n: forwarded[n] for n in (*weak.values(), *chain(*hard.values())) if n in forwarded}
        weak_extra = [n for n in weak.values() if n not in found]
        extra_views = (*weak_extra, *(n for n in extra if n not in weak_extra))
        if settings.mi_batch_norm == "joint" and "x_lb" in with_gradient:
            rows = tuple(len(c.images) for c in capture.calls)
            return Plan(found, weak, hard, extra_views, forwarded["x_lb"].call, rows)
        return Plan(found, weak, hard, extra_views)

    def train_step(self, **batch: Tensor) -> StepOutput:
        """One step on the views of ``batch``, keyed as in ``Batches.views``; returns USB's pair of dictionaries."""
        base = {k: v for k, v in batch.items() if k in self.batches.parameters}
        if self.mi_loss.weight == 0:
            return super().train_step(**base)
        plan = self.plan
        if plan is None or not {*plan.weak.values(), *plan.extra_views} <= batch.keys():
            raise RunError(
                "MUSCLE's step lacks its strong views: train by algorithm.train(), or give semilearn's Trainer this"
                " algorithm's own loaders, trainer.fit(*algorithm.loaders())"
            )
        extra_views = torch.cat([batch[n] for n in plan.extra_views]) if plan.extra_views else None
        with ForwardCapture(self.model, self._live, extra_views, plan.carrier, plan.rows) as capture:
            out, log = super().train_step(**base)
        weak, hard = self._predictions(plan, capture, batch, self._extra_logits(capture, extra_views))
        loss, terms = self.mi_loss(weak, hard)
        if self.settings.stage == "pretrain" and self.usb_name == MUSCLE_BASE:  # the base's loss is that of the labels
            out["loss"] = 0 * out["loss"]
        out["loss"] = out["loss"] + loss
        return out, log | {
            "train/mi": terms.information.detach(),
            "train/entropy": terms.entropy.detach(),
            "train/conditional_entropy": terms.conditional.detach(),
            "train/total_loss": out["loss"].detach(),
        }

    def _extra_logits(self, capture: ForwardCapture, extra_views: Tensor | None) -> Tensor | None:
        """(M, C) logits of the extra views: from the call that carried them, or from a forward of their own, which leaves the
        running batch statistics alone."""
        if extra_views is None or capture.extra_logits is not None:
            return capture.extra_logits
        with self.amp_cm():
            self.bn_controller.freeze_bn(self.model)
            logits = self.model(extra_views)["logits"]
            self.bn_controller.unfreeze_bn(self.model)
        return logits

    def _predictions(
        self, plan: Plan, capture: ForwardCapture, batch: Mapping[str, Tensor], extra_logits: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(N, C) logits of the weak views and (V, N, C) of the strong ones, labelled images before unlabelled ones."""
        logits = {n: capture.logits(r) for n, r in plan.found.items()}
        if extra_logits is not None:
            parts = extra_logits.split([len(batch[n]) for n in plan.extra_views])
            logits |= dict(zip(plan.extra_views, parts, strict=True))
        weak, hard = [], []
        for kind, name in plan.weak.items():
            weak.append(logits[name])
            n, c = logits[name].shape
            names = [h for h in (*plan.hard[kind], EXTRA_HARD[kind]) if h in logits]
            hard.append(torch.cat([logits[h].view(-1, n, c) for h in names]))
        return torch.cat(weak), torch.cat(hard, 1)
