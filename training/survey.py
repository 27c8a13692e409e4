"""The first pass of packing: every tile is read and decoded once, and a few facts of each are kept.

In goes a source, out comes a :class:`Survey`: what its pixels are, exactly enough to find equal tiles and the mean and
deviation of any choice of them, and which images are damaged.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import sqrt
from typing import TypeVar

import numpy as np

from training.decode import decode_image, image_extension, resize
from training.encoded import Bands, TileError
from training.sources import RawTile, Source

Progress = Callable[[str, int, int], None]
"""Told the stage (``read`` or ``write``), the tiles done and the tiles in all."""

_CHUNK = 64  # tiles a thread takes at a time

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Facts:
    """What is kept of a tile; ``sums`` and ``squares`` are exact, over its pixels, one number a channel."""

    sha256: str  # of the encoded bytes
    content: bytes  # sha256 of the pixels and their shape, after resizing
    sums: tuple[int, ...]
    squares: tuple[int, ...]
    pixels: int
    height: int  # this and the width are those of the source
    width: int
    extension: str
    room: int  # bytes in a shard, about


@dataclass(frozen=True)
class Survey:
    """A source that was read through: ``tiles`` and ``facts`` belong together by position."""

    raw: Source
    size: int | None
    tiles: list[RawTile]
    facts: list[Facts]
    damaged: list[dict[str, str]]


def survey(raw: Source, size: int | None, workers: int, report: Progress, bands: Bands | None = None) -> Survey:
    """Read and decode every tile once, on ``workers`` threads; ``size`` is what all will be resized to, if any."""

    def study(tiles: list[RawTile]) -> list[Facts | str]:
        return [_study(raw, tile, size, bands) for tile in tiles]

    found = Survey(raw, size, [], [], [])
    chunks = [raw.tiles[i : i + _CHUNK] for i in range(0, len(raw.tiles), _CHUNK)]
    with ThreadPoolExecutor(workers) as threads:
        for chunk, results in zip(chunks, in_order(threads, study, chunks, 2 * workers), strict=True):
            for tile, result in zip(chunk, results, strict=True):
                if isinstance(result, str):
                    found.damaged.append({"source": tile.source, "reason": result})
                else:
                    found.tiles.append(tile)
                    found.facts.append(result)
            report("read", len(found.tiles) + len(found.damaged), len(raw.tiles))
    return found


def _study(raw: Source, tile: RawTile, size: int | None, bands: Bands | None) -> Facts | str:
    """The facts of a tile, or why it cannot be used."""
    try:
        data = raw.read(tile)
        image = decode_image(data, bands)
        extension = image_extension(data)
    except TileError as error:
        return str(error)
    height, width = image.shape[-2:]
    fits = size is None or (height, width) == (size, size)
    pixels = np.ascontiguousarray((image if size is None else resize(image, size)).numpy())
    return Facts(
        sha256=hashlib.sha256(data).hexdigest(),
        content=hashlib.sha256(repr(pixels.shape).encode() + pixels.data).digest(),
        sums=tuple(pixels.sum((1, 2), dtype=np.int64).tolist()),
        squares=tuple(np.einsum("chw,chw->c", pixels, pixels, dtype=np.int64).tolist()),
        pixels=pixels[0].size,
        height=height,
        width=width,
        extension=extension,
        room=4096 + (len(data) if fits else pixels.size),
    )


def mean_std(facts: Sequence[Facts]) -> tuple[list[float], list[float]]:
    """Per channel, on pixels scaled to 0..1; from exact sums, so the order of the tiles does not show."""
    count = sum(fact.pixels for fact in facts)
    channels = range(len(facts[0].sums))
    sums = [sum(fact.sums[channel] for fact in facts) for channel in channels]
    squares = [sum(fact.squares[channel] for fact in facts) for channel in channels]
    mean = [total / (255 * count) for total in sums]
    std = [sqrt(count * square - total**2) / (255 * count) for total, square in zip(sums, squares, strict=True)]
    return mean, [value or 1.0 for value in std]  # a channel that never varies is divided by 1


def usual_size(facts: Sequence[Facts]) -> int:
    """The most frequent longer side in pixels; the larger of two that are equally frequent."""
    counts = Counter(max(fact.height, fact.width) for fact in facts)
    return max(counts, key=lambda side: (counts[side], side))


def in_order(
    threads: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], window: int
) -> Iterator[Result]:
    """``work`` of each item in their order, with at most ``window`` of them begun and not yet taken."""
    pending: deque[Future[Result]] = deque()
    for item in items:
        pending.append(threads.submit(work, item))
        if len(pending) == window:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
