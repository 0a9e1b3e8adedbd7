"""Classification metrics from a confusion matrix, for any number of classes from 2."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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


def in_top(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """(N,) bool: whether the true class is among the k of highest logit. Of equal logits the later class ranks higher,
    as in scikit-learn's ``top_k_accuracy_score``."""
    own = logits.gather(1, labels.unsqueeze(1))
    later = torch.arange(logits.shape[1], device=logits.device) > labels.unsqueeze(1)
    return ((logits > own) | ((logits == own) & later)).sum(1) < k


def prediction_metrics(logits: Tensor, labels: Tensor, unlabelled_class: Tensor | None = None) -> dict[str, float]:
    """What one evaluation reports.

    Args:
        logits: (N, C) float.
        labels: (N,) int64.
        unlabelled_class: (N,) bool, whether the image's class is sequestered: gives no label in training.

    Returns:
        ``loss`` and ``entropy`` (means over images, nats), those of :func:`classification_metrics`, ``top_class_share`` (of
        the images, those given the class most often given), ``top-5-acc`` where C > 5, and accuracy and entropy over either
        kind of class, if told apart.
    """
    c = logits.shape[1]
    predictions = logits.argmax(1)
    log_p = F.log_softmax(logits, 1)
    entropy = -(log_p.exp() * log_p).sum(1)
    confusion = confusion_matrix(labels, predictions, c)
    metrics = {
        "loss": float(F.nll_loss(log_p, labels)),
        "entropy": float(entropy.mean()),
        **classification_metrics(confusion),
        "top_class_share": float(confusion.sum(0).max()) / max(1, len(labels)),
    }
    if c > 5:
        metrics["top-5-acc"] = int(in_top(logits, labels, 5).sum()) / max(1, len(labels))
    if unlabelled_class is not None:
        correct = (predictions == labels).float().cpu()
        entropy = entropy.cpu()
        for name, group in (("labelled_classes", ~unlabelled_class), ("unlabelled_classes", unlabelled_class)):
            metrics[f"{name}/top-1-acc"] = float(correct[group].mean())
            metrics[f"{name}/entropy"] = float(entropy[group].mean())
    return metrics
