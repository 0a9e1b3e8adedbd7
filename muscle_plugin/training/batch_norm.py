"""Batch statistics over the images of all processes."""

from __future__ import annotations

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from muscle_plugin import distributed
from muscle_plugin.errors import InputError


class _OnCPU(nn.SyncBatchNorm):
    """PyTorch's ``SyncBatchNorm`` where it does not run; for the same number of images in every process."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or distributed.world_size() == 1:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum or 0.0,
                self.eps,
            )  # fmt: skip
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        others = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        mean = distributed.mean(x.mean(others))
        centred = x - mean.view(shape)
        variance = distributed.mean((centred**2).mean(others))
        n = x.numel() // x.shape[1] * distributed.world_size()
        with torch.no_grad():
            self.num_batches_tracked += 1
            share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance * n / max(n - 1, 1), share)
        out = centred * (variance + self.eps).rsqrt().view(shape)
        return out * self.weight.view(shape) + self.bias.view(shape) if self.affine else out


def synchronise_batch_norm(net: nn.Module, device: torch.device) -> nn.Module:
    """The net with its batch norms' statistics taken over all processes: PyTorch's ``SyncBatchNorm``.

    Raises:
        InputError: the net has a kind of batch norm that only a GPU can synchronise.
    """
    net = convert_sync_batchnorm(net)
    if device.type == "cuda":
        return net
    for name, module in net.named_modules():
        if type(module) is nn.SyncBatchNorm:
            module.__class__ = _OnCPU
        elif isinstance(module, nn.SyncBatchNorm):
            raise InputError(f"sync_bn: {type(module).__name__} ({name}) needs GPUs; give --sync_bn false")
    return net
