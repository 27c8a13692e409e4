"""Where a training run is and what it has seen: plain values that a checkpoint keeps, and the sums that ranks share."""

from __future__ import annotations

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
    losses: list[float] = field(default_factory=list)  # of each step of the epoch, over the global batch
    correct: int = 0
    seen: int = 0
    seconds: float = 0.0  # of the epoch
    waited: float = 0.0  # for data, rank 0


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

    def reduce(self, device: torch.device) -> tuple[list[float], int]:
        """The loss of each step and the right answers of all, summed over ranks (every rank must call it)."""
        sums = torch.stack([*self.losses, torch.stack(self.correct).sum()]).to(device, torch.float64)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        *losses, correct = sums.tolist()
        return losses, round(correct)
