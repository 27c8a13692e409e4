"""Optimizer and learning rate of a recipe; the rate is a function of where the run is, so it has no state to save."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from configs.schema import OptimizerConfig, ScheduleConfig

RISE, START, END = 0.3, 1 / 25, 1e-4
"""Shape of ``one_cycle``: share of the steps that rise, and the rates at its ends as shares of the full one."""


def make_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a recipe over all parameters of ``model``, in torch's fused form, the quickest on any device."""
    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
    if config.name == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=config.momentum, **common)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(model.parameters(), **common)


def rate(schedule: ScheduleConfig, step: int, steps_per_epoch: int, epochs: int, drops: int = 0) -> float:
    """The share of the full learning rate at ``step``, counted from the start of the run.

    ``drops`` is how often a plateau lowered it so far. One-cycle is that of Smith and Topin ("Super-convergence",
    2018) with cosine flanks, as in torch's ``OneCycleLR``; it brings its own rise, so ``warmup`` does not apply.
    """
    steps = steps_per_epoch * epochs
    if schedule.name == "one_cycle":
        top = max(1.0, RISE * steps - 1)
        if step <= top:
            return _cosine(START, 1, step / top)
        return _cosine(1, END, (step - top) / max(1.0, steps - 1 - top))
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if schedule.name == "cosine":
        return _cosine(1, 0, (step - schedule.warmup) / max(1, steps - schedule.warmup))
    if schedule.name == "step":
        return float(schedule.factor ** (step // steps_per_epoch // schedule.every_epochs))
    if schedule.name == "plateau":
        return float(schedule.factor**drops)
    return 1.0


def class_weights(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Weights float32 ``[classes]`` in inverse proportion to how often a class is in ``labels``; their mean over
    ``labels`` is 1. A class without a tile has weight 0.
    """
    counts = torch.bincount(labels, minlength=classes).double()
    present = counts > 0
    weights = torch.where(present, len(labels) / (present.sum() * counts.clamp(min=1)), 0.0)
    return weights.float()


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
