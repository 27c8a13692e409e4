"""Optimizer and learning rate of a recipe; the rate is a pure function of the step, so it has no state to save."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from configs.schema import OptimizerConfig, ScheduleConfig


def make_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a recipe over all parameters of ``model``."""
    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.name == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=config.momentum, **common)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(model.parameters(), **common)


def rate(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The share of the full learning rate at global ``step`` of ``steps``: a linear warm-up, then the schedule."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if schedule.name == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - schedule.warmup) / max(1, steps - schedule.warmup)))
