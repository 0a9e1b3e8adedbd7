"""Baselines on frozen features: a linear head fitted to the labelled images, in closed form or to convergence.

The features are those of images without augmentation, divided by their Euclidean length.
"""

from __future__ import annotations

import warnings

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from torch import Tensor
from torch.nn import functional as F

from muscle_plugin.errors import InputError
from muscle_plugin.nets.frozen import FeatureHead
from muscle_plugin.training.protocols import StepOutput
from muscle_plugin.usb.names import AlgorithmBase

#: Inverse strengths of the penalty among which cross-validation chooses, and the one without it.
STRENGTHS, USUAL_STRENGTH = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0), 64.0
#: Labels of each class that cross-validation needs, and the most parts it makes.
ENOUGH, FOLDS = 4, 5
#: Bias of a class without labels.
_NEVER = -1e4


class FittedHead(AlgorithmBase):
    """Fits the head to the features of all labelled images in a single step, which returns USB's pair of dictionaries with a
    loss of 0."""

    def train_step(self, y_lb: Tensor) -> StepOutput:  # type: ignore[override]
        members = self.source.train[self.split.labelled]
        features = F.normalize(self.batches.fixed_features(members))
        weight, bias = self.fit(features.cpu(), self.source.labels[members])
        assert isinstance(self.model, FeatureHead)
        with torch.no_grad():
            self.model.mean.zero_()
            self.model.std.fill_(1)
            self.model.classifier.weight.copy_(weight)
            self.model.classifier.bias.copy_(bias)
        loss = 0 * self.model.classifier.weight.sum()  # the optimiser, without weight decay, leaves the head as it is
        return self.process_out_dict(loss=loss), self.process_log_dict(sup_loss=loss.detach())

    def fit(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(C, F) weights and (C,) biases from (n, F) features of unit length and (n,) labels."""
        raise NotImplementedError


class LinearProbe(FittedHead):
    """Logistic regression; its penalty is chosen by cross-validation where each class has 4 labels or more."""

    def fit(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        counts = torch.bincount(labels, minlength=self.num_classes)
        if int((counts > 0).sum()) < 2:
            raise InputError("linear_probe: needs labelled images of two classes or more")
        fewest = int(counts[counts > 0].min())
        model = LogisticRegression(C=USUAL_STRENGTH, max_iter=1000)
        search = GridSearchCV(model, {"C": STRENGTHS}, cv=min(FOLDS, fewest)) if fewest >= ENOUGH else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = (search or model).fit(features.numpy(), labels.numpy())
        model = model.best_estimator_ if search else model
        weight, bias = torch.zeros(self.num_classes, features.shape[1]), torch.full((self.num_classes,), _NEVER)
        coef, intercept = torch.from_numpy(model.coef_).float(), torch.from_numpy(model.intercept_).float()
        if len(coef) == 1:  # of two classes
            coef, intercept = torch.cat([-coef, coef]) / 2, torch.cat([-intercept, intercept]) / 2
        weight[model.classes_], bias[model.classes_] = coef, intercept
        return weight, bias


class ClassMean(FittedHead):
    """The class whose mean feature is nearest: logits are half the negative squared distances, times 64."""

    def fit(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        onto = F.one_hot(labels, self.num_classes).float()
        counts = onto.sum(0)
        means = onto.t() @ features / counts.clamp_min(1)[:, None]
        return 64 * means, torch.where(counts > 0, -32 * (means**2).sum(1), _NEVER)
