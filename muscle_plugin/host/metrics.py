"""Classification metrics from a confusion matrix, for any number of classes from 2."""

from __future__ import annotations

import torch
from torch import Tensor


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """(C, C) int64 counts, rows true and columns predicted, on the device of the labels."""
    return torch.bincount(labels * num_classes + predictions, minlength=num_classes**2).view(num_classes, num_classes)


def classification_metrics(confusion: Tensor) -> dict[str, float]:
    """Top-1 accuracy, balanced accuracy, and macro precision, recall and F1, as fractions.

    Averages run over the classes that occur, as labels or (for precision, recall and F1) as predictions: what
    scikit-learn computes with ``zero_division=0``, and USB with it.
    """
    counts = confusion.double().cpu()
    correct, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    recall = correct / true.clamp_min(1)
    precision = correct / predicted.clamp_min(1)
    f1 = 2 * correct / (true + predicted).clamp_min(1)
    present = (true + predicted) > 0
    return {
        "top-1-acc": float(correct.sum() / counts.sum().clamp_min(1)),
        "balanced_acc": float(recall[true > 0].mean()),
        "precision": float(precision[present].mean()),
        "recall": float(recall[present].mean()),
        "F1": float(f1[present].mean()),
    }
