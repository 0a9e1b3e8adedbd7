"""Evaluates a net on images that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from muscle_plugin import distributed


@torch.no_grad()
def predict(
    net: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    num_classes: int,
    device: torch.device,
    precision: Callable[[], AbstractContextManager[Any]],
    output: str = "logits",
) -> tuple[Tensor, Tensor]:
    """(M, C) float32 logits of a net in eval mode, and (M,) labels, of all processes' images.

    Args:
        batches: ``x_lb``, the images, and ``y_lb``, their labels.
        precision: makes the context of a forward pass.
        output: which of the net's outputs are the logits.
    """
    was_training = net.training
    net.eval()
    # there may be fewer images than processes
    logits = [torch.empty(0, num_classes, device=device)]
    labels = [torch.empty(0, dtype=torch.int64, device=device)]
    for batch in batches:
        with precision():
            logits.append(net(batch["x_lb"])[output].float())
        labels.append(batch["y_lb"])
    net.train(was_training)
    return distributed.gather_parts(torch.cat(logits)), distributed.gather_parts(torch.cat(labels))
