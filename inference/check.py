"""What is wrong with archives of any kind, before a model sees them: each is read whole and each image decoded.

In goes a location as ``classify`` takes it, or a shard set, out come problems. Nothing is written.

Command: ``tilefleet verify SHARDS_OR_ARCHIVE``
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from inference.ahead import in_order
from inference.archive import list_archives
from inference.plan import Progress, make_chunk
from inference.readers import Tile, read_chunk
from inference.scan import Source, scan, sources
from inference.zips import Damaged
from training.encoded import TileError
from training.shards import Problem, is_set, verify

CHUNK_TILES = 1000


def find_problems(location: str, progress: Progress | None = None) -> Iterator[Problem]:
    """Everything wrong with a shard set or with the archives at ``location``, as it is found.

    A set that ``pack`` made is held against its index, all else is read as ``classify`` reads it. ``progress`` is
    called with (``verify``, archives done, archives). Raises :class:`UsageError` where there is no archive.
    """
    if is_set(location):
        yield from verify(location)
        return
    archives = list_archives([location])
    done = 0
    for source in sources(archives):
        yield from _check(source)
        done += len(source.images) or 1
        if progress:
            progress("verify", done, len(archives))


def _check(source: Source) -> Iterator[Problem]:
    found = scan(source, CHUNK_TILES)
    reason, chunks = found.damage, 0
    try:
        for one in found.ranges:
            chunks += 1
            tiles = read_chunk(make_chunk("", source, found, one))
            for tile_id, error in in_order(_why_not, tiles, os.cpu_count() or 1):
                if error:
                    yield Problem(source.archive, f"{tile_id}: {error}")
            reason = reason or tiles.damage
    except Damaged as error:
        reason = str(error)
    if reason := reason or (None if chunks else "holds no images"):
        yield Problem(source.archive, reason)


def _why_not(tile: Tile) -> tuple[str, str | None]:
    from training.decode import check_image

    if tile.data is None:
        return tile.tile_id, tile.error
    try:
        check_image(tile.data)
    except TileError as error:
        return tile.tile_id, str(error)
    return tile.tile_id, None
