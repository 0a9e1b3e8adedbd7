"""Evaluates a net on images that it was not trained on: its predictions, and metrics of them for 2 classes or more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from muscle_plugin import distributed

if TYPE_CHECKING:
    from muscle_plugin.training.host import Host


@torch.no_grad()
def predict(host: Host, net: nn.Module, batches: Iterable[dict[str, Tensor]], output: str) -> tuple[Tensor, Tensor]:
    """(M, C) float32 logits, the ``output`` of a net in eval mode, and (M,) labels, of all processes' images."""
    was_training = net.training
    net.eval()
    # there may be fewer images than processes
    logits = [torch.empty(0, host.num_classes, device=host.device)]
    labels = [torch.empty(0, dtype=torch.int64, device=host.device)]
    for batch in batches:
        with host.amp_cm():
            logits.append(net(batch["x_lb"])[output].float())
        labels.append(batch["y_lb"])
    net.train(was_training)
    return distributed.gather_parts(torch.cat(logits)), distributed.gather_parts(torch.cat(labels))


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
    """What one evaluation reports of (N, C) logits and (N,) labels: ``loss`` and ``entropy`` (means over images, nats), those
    of :func:`classification_metrics`, ``top_class_share`` (of the images, those given the class most often given), and
    ``top-5-acc`` where C > 5.

    Args:
        unlabelled_class: (N,) bool, whether an image's class gives no label in training (is sequestered); with it accuracy
            and entropy over either kind of class are reported too (paper, Figure 3).
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
