"""Batch normalisation with the statistics of the global batch, for any number of workers, on CPU and GPU alike.

``torch.nn.SyncBatchNorm`` runs on GPUs only, and it would count the blank tile of a worker that has none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose training statistics are those of all workers' tiles; its state dict is the same.

    Ioffe and Szegedy, "Batch normalization", 2015. Set :attr:`present` (float32 ``[B]``: 1 for a tile, 0 for a blank)
    before each training step, as :func:`set_presence` does. Of a batch taken in parts, each has its own statistics.
    """

    present: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is ``[B, C, H, W]``; returns the same shape, type and layout."""
        if not self.training:
            return super().forward(x)
        if self.present is None:
            raise RuntimeError("presence must be set before a training step")
        values = x.float()
        var, mean = torch.var_mean(values, (0, 2, 3), correction=0)
        # Squares of means are taken from means of squares in float64, where little is lost.
        count, mean, var = self.present.double().sum() * x[0, 0].numel(), mean.double(), var.double()
        sums = torch.cat([count * mean, count * (var + mean.square()), count.view(1)])
        if dist.is_initialized() and dist.get_world_size() > 1:
            sums = _Sum.apply(sums)
        count = sums[-1]
        mean, square = (sums[:-1] / count.clamp(min=1)).chunk(2)
        var = (square - mean.square()).clamp(min=0)
        self._remember(mean.detach(), var.detach(), count.detach())
        scale = self.weight * (var + self.eps).rsqrt().float()
        shift = self.bias - mean.float() * scale
        return torch.addcmul(shift.view(1, -1, 1, 1), values, scale.view(1, -1, 1, 1)).to(x.dtype)

    def _remember(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Move the running statistics by ``momentum``, as torch does, but not for a part in which there is no tile."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        share = (self.momentum or 0) * (count > 0).float()
        self.running_mean.lerp_(mean.float(), share)
        self.running_var.lerp_((var * count / (count - 1).clamp(min=1)).float(), share)
        self.num_batches_tracked.add_(count > 0)


class _Sum(torch.autograd.Function):
    """The sum over all workers. What one of them holds is in the loss of each, so gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def replace_batch_norm(model: nn.Module) -> nn.Module:
    """Put :class:`GlobalBatchNorm2d` in the place of every ``nn.BatchNorm2d`` of ``model``, changed and returned."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                shared = GlobalBatchNorm2d(child.num_features, child.eps, child.momentum)
                shared.load_state_dict(child.state_dict())
                setattr(module, name, shared)
    return model


def set_presence(model: nn.Module, present: Tensor) -> None:
    """Tell every :class:`GlobalBatchNorm2d` of ``model`` which tiles of the coming batch are real."""
    for module in model.modules():
        if isinstance(module, GlobalBatchNorm2d):
            module.present = present
