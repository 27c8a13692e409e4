"""Which tiles a rank sees at a step: a pure function of (seed, epoch, step, rank, world size).

The order of an epoch is a permutation; global batch ``step`` is a fixed slice of it; ranks split that slice. So any
number of workers, and any resume, sees the same global sequence of tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.randomness import UInt64, keys, permutation

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sampler:
    """The training order of ``tiles`` tiles in global batches of ``batch_size``; an epoch's last may be smaller."""

    tiles: int
    batch_size: int
    seed: int

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return -(-self.tiles // self.batch_size)

    def epoch(self, epoch: int) -> Epoch:
        """The order of one epoch."""
        return Epoch(self, epoch, permutation(self.seed, epoch, self.tiles))


@dataclass(frozen=True)
class Epoch:
    """One epoch's order; ``order`` is int64 ``[tiles]``."""

    sampler: Sampler
    number: int
    order: Positions

    def batch(self, step: int) -> Positions:
        """Positions of global batch ``step`` of this epoch, counted from 0."""
        size = self.sampler.batch_size
        return self.order[step * size : (step + 1) * size]

    def share(self, step: int, rank: int, world_size: int) -> tuple[Positions, UInt64]:
        """What ``rank`` takes of global batch ``step``: positions, and the key of each tile for augmentation and
        dropout.

        Shares are contiguous, differ by at most one tile, and may be empty when a batch is smaller than the world.
        """
        batch = self.batch(step)
        part = rank_slice(len(batch), rank, world_size)
        return batch[part], keys(self.sampler.seed, self.number, step, 1, count=len(batch))[part]


def rank_slice(count: int, rank: int, world_size: int) -> slice:
    """The contiguous part of ``count`` things that is ``rank``'s; parts differ by at most one and cover all."""
    return slice(rank * count // world_size, (rank + 1) * count // world_size)
