"""The parts of a training run, each measured by itself on every rank: loader without model, model without loader.

Plain PyTorch; :mod:`training.bench` starts it and adds up what the ranks found::

    torchrun --nproc-per-node 2 -m training.parts train recipe.json OUT

leaves ``OUT/rank-0.json`` and ``OUT/rank-1.json``. The parts are those of a real :class:`training.loop.Trainer`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from configs.schema import load_recipe
from training.decode import decode_tiles
from training.loop import Trainer
from training.process import process_group
from training.sampler import Positions, rank_slice

BATCHES = 64
"""Different batches that the model is given in turn."""

WARM_UP_STEPS = 10
"""Steps of the model before the measured ones."""

PASSES = 5
"""Measured passes over tiles that are in the cache."""

Figures = dict[str, float]
"""What one rank measured: seconds, tiles, tiles/s or bytes, by name."""


def measure_loader(trainer: Trainer) -> Figures:
    """Tiles/s of this rank's batches with nobody to use them: ``first`` in the first epoch, ``loader`` from the cache.

    A rank meets other tiles in each epoch, so its cache is filled with the whole split between the two.
    """
    loader, epochs = trainer.train_loader, iter(range(1 + PASSES))

    def drain() -> int:
        return sum(len(batch.labels) for batch in loader.epoch(trainer.sampler.epoch(next(epochs))))

    first = _rate(trainer, drain)
    for positions in _batches(trainer, np.arange(len(loader.reader))):
        loader.tiles.load(positions)
    return {"first": first, "loader": _rate(trainer, lambda: sum(drain() for _ in range(PASSES)))}


def measure_ingest(trainer: Trainer) -> Figures:
    """What :func:`measure_loader` finds, and its parts in tiles/s, one after the other on this rank's share of tiles.

    ``read`` is reading by offset with the check of each digest, ``decode`` is images to pixels, ``gather`` is taking a
    batch out of the cache that the recipe asks for; ``read_bytes`` is in bytes/s.
    """
    loader, count = trainer.train_loader, len(trainer.train_loader.reader)
    mine = np.random.default_rng(0).permutation(count)[rank_slice(count, trainer.rank, trainer.world_size)]
    batches, encoded = list(_batches(trainer, mine)), list[list[bytes]]()

    def read() -> int:
        encoded.extend(loader.reader.read(positions.tolist()) for positions in batches)
        return len(mine)

    def decode() -> int:
        return sum(len(decode_tiles(batch, trainer.index.tile_size, trainer.index.bands)[0]) for batch in encoded)

    def gather() -> int:
        return sum(len(loader.tiles.load(positions)) for positions in batches * PASSES)

    rates = {"read": _rate(trainer, read), "decode": _rate(trainer, decode)}
    rates["read_bytes"] = rates["read"] * sum(len(data) for batch in encoded for data in batch) / len(mine)
    whole = measure_loader(trainer)
    return whole | rates | {"gather": _rate(trainer, gather)}


def measure_model(trainer: Trainer) -> Figures:
    """Tiles/s of this rank in whole training steps on batches that are there already: augmentation, DDP and update."""
    learner, recipe = trainer.learner, trainer.recipe
    learner.begin_epoch(recipe.epochs - 1)  # with the backbone free, where a recipe frees it
    loaded = islice(trainer.train_loader.epoch(trainer.sampler.epoch(0)), BATCHES)
    batches = [batch for batch in loaded if batch.global_count == recipe.batch_size]

    def take(steps: int) -> int:
        taken = [batches[step % len(batches)] for step in range(steps)]
        for batch in taken:
            learner.step(batch, recipe.optimizer.learning_rate)
        return sum(len(batch.labels) for batch in taken)

    take(WARM_UP_STEPS)
    return {"model": _rate(trainer, lambda: take(2 * trainer.sampler.steps))}


PARTS: dict[str, Callable[[Trainer], Figures]] = {
    "ingest": measure_ingest,
    "train": lambda trainer: measure_loader(trainer) | measure_model(trainer),
}


def _rate(trainer: Trainer, work: Callable[[], int]) -> float:
    """Tiles/s of ``work``, which returns its tiles, begun on all ranks together."""
    if trainer.world_size > 1:
        dist.barrier()
    started = _now(trainer.device)
    tiles = work()
    return tiles / (_now(trainer.device) - started)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _batches(trainer: Trainer, positions: Positions) -> Iterator[Positions]:
    """``positions`` in parts of the size of this rank's batches."""
    size = max(1, trainer.recipe.batch_size // trainer.world_size)
    for start in range(0, len(positions), size):
        yield positions[start : start + size]


def main(part: str, recipe: str, out: str) -> None:
    """Measure ``part`` and leave this rank's figures in ``out``."""
    with process_group() as device:
        trainer = Trainer(load_recipe(recipe), device)
        figures = PARTS[part](trainer)
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / f"rank-{trainer.rank}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
