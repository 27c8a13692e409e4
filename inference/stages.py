"""The stages of a classification, each measured by itself: read, decode and forward, without Ray and without a sink.

A plan that is kept comes in, the core-seconds that a tile takes in each stage go out. As many processes as the run has
workers go through its chunks together, all in the same stage at a time, so that what they take from each other
(memory, caches, clock rate) is counted as it is in the run.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from inference.forward import Engine
from inference.plan import Chunk, open_plan
from inference.readers import read_chunk
from training.bundle import load_bundle
from training.decode import decode_tiles

STAGES = ("read", "decode", "forward")

Given = TypeVar("Given")
Made = TypeVar("Made")


def measure_stages(bundle: str, out: str, workers: int) -> dict[str, float]:
    """Core-seconds a tile of each of :data:`STAGES`, over all tiles of the plan in ``out``, in ``workers`` processes.

    Each has as many threads as the plan gives an actor, and a GPU of its own where it is for GPUs; then ``forward``
    is in seconds of a GPU. A chunk is held in memory, encoded and as pixels.
    """
    context = multiprocessing.get_context("spawn")  # a process that has threads, as those of PyTorch, must not fork
    with context.Manager() as manager, ProcessPoolExecutor(workers, context) as pool:
        together = manager.Barrier(workers).wait
        found = list(pool.map(partial(_measure, bundle, out, workers, together), range(workers)))
    tiles = sum(one["tiles"] for one in found)
    return {stage: sum(one[stage] for one in found) / tiles for stage in STAGES}


def _measure(bundle: str, out: str, workers: int, together: Callable[[], object], rank: int) -> dict[str, float]:
    """Tiles, and seconds of each stage, of every ``workers``-th chunk; ``together`` waits for the other processes."""
    plan = open_plan(out)
    assert plan
    terms = plan.terms
    torch.set_num_threads(terms.threads)
    if terms.device == "cuda":
        torch.cuda.set_device(rank)
    judge, info = load_bundle(bundle)
    engine = Engine(terms.engine, judge, info, terms.device, terms.batch_size, terms.threads)
    shape = (terms.batch_size, info.channels, info.tile_size, info.tile_size)
    engine(torch.zeros(shape, dtype=torch.uint8))  # compiles, allocates
    done = dict.fromkeys(("tiles", *STAGES), 0.0)

    def timed(stage: str, work: Callable[[Given], Made], given: Given) -> Made:
        together()
        began = time.perf_counter()
        made = work(given)
        done[stage] += time.perf_counter() - began
        return made

    def read(chunks: list[Chunk]) -> list[bytes]:
        return [tile.data or b"" for chunk in chunks for tile in read_chunk(chunk)]

    def decode(tiles: list[bytes]) -> list[Tensor]:
        starts = range(0, len(tiles), terms.batch_size)
        batches = (tiles[start : start + terms.batch_size] for start in starts)
        return [decode_tiles(batch, info.tile_size, info.bands)[0] for batch in batches]

    for first in range(0, plan.chunks, workers):
        mine = plan.read(first + rank, first + rank + 1)  # none at the end, where others have the last ones
        tiles = timed("read", read, mine)
        pixels = timed("decode", decode, tiles)
        timed("forward", lambda batches: [engine(batch) for batch in batches], pixels)
        done["tiles"] += len(tiles)
    return done
