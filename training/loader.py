"""Batches for one rank, prepared by a thread while the model works on the one before.

Encoded tiles are read by offset, checked, decoded and handed over as uint8, or taken from the cache that fits (see
:mod:`training.cache`); everything after that happens on the model's device.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from configs.schema import Cache
from training.cache import keep_tiles
from training.randomness import UInt64
from training.sampler import Epoch, Positions
from training.shards import TileReader

AHEAD = 2
"""Batches kept ready."""

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Batch:
    """A rank's part of one global batch.

    ``pixels`` uint8 ``[b, channels, size, size]``, ``labels`` int64 ``[b]``, ``keys`` int64 ``[b]``; ``global_count``
    is the number of tiles in the global batch, ``waited`` the seconds that the consumer stood still for it.
    ``partners`` are the tiles that mixup adds to those of the batch, one to each.
    """

    step: int
    pixels: Tensor
    labels: Tensor
    keys: Tensor
    positions: Positions
    global_count: int
    waited: float = 0.0
    partners: Batch | None = None


class RankLoader:
    """Makes the batches of one rank from the tiles of one split, for a model on ``device``."""

    def __init__(
        self,
        reader: TileReader,
        tile_size: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        device: torch.device = CPU,
        cache: Cache = "auto",
    ) -> None:
        self.reader = reader
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.tiles = keep_tiles(reader, tile_size, device, cache)

    def epoch(self, epoch: Epoch, first_step: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from ``first_step`` on, in order."""
        return _ahead(lambda step: self._batch(epoch, step), first_step, epoch.sampler.steps)

    def pass_once(self, batch_size: int) -> Iterator[Batch]:
        """Every tile of the split once over all ranks, in the set's order, for evaluation."""
        count = len(self.reader)
        mine = np.arange(count, dtype=np.int64)[self.rank :: self.world_size]

        def make(step: int) -> Batch:
            return self._load(step, mine[step * batch_size : (step + 1) * batch_size], None, count)

        return _ahead(make, 0, -(-len(mine) // batch_size))

    def _batch(self, epoch: Epoch, step: int) -> Batch:
        positions, keys = epoch.share(step, self.rank, self.world_size)
        batch = self._load(step, positions, keys, len(epoch.batch(step)))
        if not epoch.sampler.pairs:
            return batch
        positions, keys = epoch.partners(step, self.rank, self.world_size)
        return replace(batch, partners=self._load(step, positions, keys, batch.global_count))

    def _load(self, step: int, positions: Positions, keys: UInt64 | None, global_count: int) -> Batch:
        pixels = self.tiles.load(positions)
        if self.device.type == "cuda" and not pixels.is_cuda:
            pixels = pixels.pin_memory()
        return Batch(
            step,
            pixels,
            torch.from_numpy(self.reader.labels[positions].astype(np.int64)),
            torch.from_numpy((keys if keys is not None else np.zeros(len(positions), np.uint64)).view(np.int64)),
            positions,
            global_count,
        )


def _ahead(make: Callable[[int], Batch], first: int, end: int) -> Iterator[Batch]:
    """Run ``make(step)`` for each step in a thread that stays :data:`AHEAD` batches before the consumer."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(AHEAD)
    stop = threading.Event()

    def put(item: Batch | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for step in range(first, end):
                if not put(make(step)):
                    return
            put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=produce, name="loader", daemon=True)
    thread.start()
    try:
        while True:
            before = time.perf_counter()
            item = ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield replace(item, waited=time.perf_counter() - before)
    finally:
        stop.set()
        thread.join()
