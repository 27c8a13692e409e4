"""Which tiles a rank sees at a step: a pure function of (seed, epoch, step, rank, world size).

The order of an epoch is a permutation; global batch ``step`` is a fixed slice of it; ranks split that slice. So any
number of workers, and any resume, sees the same global sequence of tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from configs.schema import Recipe
from training.randomness import UInt64, keys, permutation
from training.shards import Index

Positions = npt.NDArray[np.int64]


_AUGMENT, _PARTNERS, _WINDOWS = 1, 2, 3
"""What a key is for, at the end of its path, so that no two uses share one."""


@dataclass(frozen=True)
class Sampler:
    """The training order of ``tiles`` tiles in global batches of ``batch_size``; an epoch's last may be smaller.

    With a ``window`` the tiles of that many shards are mixed at a time, and the shards in each epoch anew; ``shards``
    is the tiles of each, in the order of the set. With ``pairs`` each tile has a partner for mixup.
    """

    tiles: int
    batch_size: int
    seed: int
    window: int | None = None
    shards: tuple[int, ...] = ()
    pairs: bool = False

    @classmethod
    def of(cls, recipe: Recipe, index: Index) -> Sampler:
        """The training order of a recipe on its shard set."""
        return cls(
            index.tiles("train"),
            recipe.batch_size,
            recipe.seed,
            recipe.shuffle_window,
            tuple(shard.tiles for shard in index.splits.get("train", [])),
            recipe.augment.mixup > 0,
        )

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return -(-self.tiles // self.batch_size)

    def epoch(self, epoch: int) -> Epoch:
        """The order of one epoch."""
        if self.window is None:
            return Epoch(self, epoch, permutation(self.seed, epoch, count=self.tiles))
        place = np.argsort(permutation(self.seed, epoch, 0, _WINDOWS, count=len(self.shards)))
        window = np.repeat(place // self.window, self.shards)  # of each tile
        return Epoch(self, epoch, np.lexsort((keys(self.seed, epoch, count=self.tiles), window)).astype(np.int64))


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
        return batch[part], self._keys(step, len(batch))[part]

    def partners(self, step: int, rank: int, world_size: int) -> tuple[Positions, UInt64]:
        """The partner of each tile of :meth:`share`, with its key: the tiles of the global batch in another order."""
        batch = self.batch(step)
        order = permutation(self.sampler.seed, self.number, step, _PARTNERS, count=len(batch))
        order = order[rank_slice(len(batch), rank, world_size)]
        return batch[order], self._keys(step, len(batch))[order]

    def _keys(self, step: int, count: int) -> UInt64:
        return keys(self.sampler.seed, self.number, step, _AUGMENT, count=count)


def rank_slice(count: int, rank: int, world_size: int) -> slice:
    """The contiguous part of ``count`` things that is ``rank``'s; parts differ by at most one and cover all."""
    return slice(rank * count // world_size, (rank + 1) * count // world_size)
