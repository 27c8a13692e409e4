"""Runs that are equal to the bit on a GPU too: torch's deterministic algorithms, for the time of a run.

On a CPU runs with the same number of threads and workers are equal to the bit without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Make torch choose deterministic algorithms inside the block, and undo it after.

    cuBLAS reads its variable when a process first multiplies matrices on a GPU, so the block must hold that too.
    """
    if not wanted:
        yield
        return
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags, workspace = (cudnn.deterministic, cudnn.benchmark), os.environ.get(CUBLAS)
    os.environ.setdefault(CUBLAS, ":4096:8")
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = flags
        if workspace is None:
            del os.environ[CUBLAS]


class MatrixPool2d(nn.AdaptiveAvgPool2d):
    """``nn.AdaptiveAvgPool2d`` as two matrix products; torch's own has no deterministic gradient on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is ``[B, C, H, W]``; returns ``[B, C, *output_size]``."""
        size = self.output_size
        rows, columns = size if isinstance(size, tuple) else (size, size)
        down = _bins(x.shape[2], rows or x.shape[2]).to(x)
        along = _bins(x.shape[3], columns or x.shape[3]).to(x)
        pooled: Tensor = down @ x @ along.T
        return pooled


def replace_pooling(model: nn.Module) -> nn.Module:
    """Put :class:`MatrixPool2d` in the place of every ``nn.AdaptiveAvgPool2d`` of ``model``, changed and returned."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.AdaptiveAvgPool2d:
                setattr(module, name, MatrixPool2d(child.output_size))
    return model


def _bins(inputs: int, outputs: int) -> Tensor:
    """float32 ``[outputs, inputs]``: the mean over the inputs from ``floor(i * inputs / outputs)`` on, before
    ``ceil((i + 1) * inputs / outputs)``, for each output ``i``, as torch cuts them.
    """
    weights = torch.zeros(outputs, inputs)
    for i in range(outputs):
        first, end = i * inputs // outputs, -(-(i + 1) * inputs // outputs)
        weights[i, first:end] = 1 / (end - first)
    return weights
