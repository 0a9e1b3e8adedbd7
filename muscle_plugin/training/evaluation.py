"""Evaluates a net on images that it was not trained on: its predictions, and metrics of them for 2 classes or more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from sklearn.metrics import precision_recall_fscore_support
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


def in_top(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """(N,) bool: whether the true class is among the k of highest logit. Of equal logits the later class ranks higher,
    as in scikit-learn's ``top_k_accuracy_score``."""
    own = logits.gather(1, labels.unsqueeze(1))
    later = torch.arange(logits.shape[1], device=logits.device) > labels.unsqueeze(1)
    return ((logits > own) | ((logits == own) & later)).sum(1) < k


def prediction_metrics(logits: Tensor, labels: Tensor, unlabelled_class: Tensor | None = None) -> dict[str, float]:
    """What one evaluation reports of (N, C) logits and (N,) labels: ``loss`` and ``entropy`` (means over images, nats);
    accuracies, precision, recall and F1 as fractions, by scikit-learn as in USB, averages over the classes that occur;
    ``top_class_share`` (of the images, those given the class most often given); and ``top-5-acc`` where C > 5.

    Args:
        unlabelled_class: (N,) bool, whether an image's class gives no label in training (is sequestered); with it accuracy
            and entropy over either kind of class are reported too (paper, Figure 3).
    """
    logits, labels = logits.cpu(), labels.cpu()
    predictions = logits.argmax(1)
    log_p = F.log_softmax(logits, 1)
    entropy = -(log_p.exp() * log_p).sum(1)
    by_class = precision_recall_fscore_support(labels, predictions, zero_division=0)
    precision, recall, f1, support = map(torch.from_numpy, by_class)
    metrics = {
        "loss": float(F.nll_loss(log_p, labels)),
        "entropy": float(entropy.mean()),
        "top-1-acc": int((predictions == labels).sum()) / len(labels),
        "balanced_acc": float(recall[support > 0].mean()),
        "precision": float(precision.mean()),
        "recall": float(recall.mean()),
        "F1": float(f1.mean()),
        "top_class_share": int(predictions.bincount().max()) / len(labels),
    }
    if logits.shape[1] > 5:
        metrics["top-5-acc"] = int(in_top(logits, labels, 5).sum()) / len(labels)
    if unlabelled_class is not None:
        correct = (predictions == labels).float()
        for name, group in (("labelled_classes", ~unlabelled_class), ("unlabelled_classes", unlabelled_class)):
            metrics[f"{name}/top-1-acc"] = float(correct[group].mean())
            metrics[f"{name}/entropy"] = float(entropy[group].mean())
    return metrics
