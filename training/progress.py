"""Where a training run is and what it has seen: plain values that a checkpoint keeps, and the sums that ranks share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Progress:
    """Where a run is, and what it has seen of the current epoch; plain values that a checkpoint keeps."""

    epoch: int = 0
    step: int = 0  # of the epoch
    best_accuracy: float = -1.0
    epochs_since_best: int = 0
    least_loss: float = math.inf  # of validation
    epochs_since_least: int = 0
    drops: int = 0  # of the learning rate, on a plateau
    losses: list[float] = field(default_factory=list)  # of each step of the epoch, over the global batch
    correct: int = 0
    seen: int = 0
    seconds: float = 0.0  # of the epoch
    waited: float = 0.0  # for data, rank 0

    def after_epoch(self, val_loss: float, val_accuracy: float, patience: int) -> Progress:
        """Where the run is once its epoch is validated; NaN, for an empty split, counts as getting better.

        The loss is on a plateau after ``patience`` epochs without a lower one; then ``drops`` grows by one.
        """
        better = not val_accuracy <= self.best_accuracy
        lower = not val_loss >= self.least_loss
        stale = 0 if lower else self.epochs_since_least + 1
        drop = stale >= patience
        return Progress(
            epoch=self.epoch + 1,
            best_accuracy=val_accuracy if better else self.best_accuracy,
            epochs_since_best=0 if better else self.epochs_since_best + 1,
            least_loss=val_loss if lower else self.least_loss,
            epochs_since_least=0 if drop else stale,
            drops=self.drops + drop,
        )


class Pending:
    """Losses and right answers of the last steps, left on the device until they are reduced together."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what was added."""
        self.losses: list[Tensor] = []
        self.correct: list[Tensor] = []
        self.seen = 0

    def add(self, loss: Tensor, correct: Tensor, global_count: int) -> None:
        """Take over one step: 0-d tensors of this rank, and the tiles of the global batch."""
        self.losses.append(loss)
        self.correct.append(correct)
        self.seen += global_count

    def reduce(self, device: torch.device, wish: float = 0.0) -> tuple[list[float], int, float]:
        """The loss of each step and the right answers of all, summed over ranks (every rank must call it).

        Last comes the sum of the ``wish`` of each rank, a small whole number, on which all can then act together.
        """
        wished = torch.tensor(wish, device=device)
        sums = torch.stack([*self.losses, torch.stack(self.correct).sum(), wished]).to(device, torch.float64)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        *losses, correct, wishes = sums.tolist()
        return losses, round(correct), wishes
