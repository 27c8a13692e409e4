"""Pictures of tiles for pages: small JPEGs in data URIs, made from the shards or archives that the tiles came from.

What was classified may be millions of tiles in archives that are far away, huge or gone: only chunks with a tile to
show are read, within limits of time and bytes, and what is not shown is told.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from configs.errors import TilefleetError
from inference.ahead import in_order
from inference.plan import Chunk, PlanFile
from inference.readers import read_chunk
from inference.tally import Example
from training.decode import decode_image, picture
from training.encoded import Bands, TileError
from training.shards import TileReader, fingerprint

PICTURE_PIXELS = 128
"""Longest side of a tile's picture on a page; larger tiles are made smaller."""

READ_SECONDS, CHUNK_SECONDS = 30.0, 5.0
"""How long archives are read for the pictures of one page, and one chunk of them."""

STREAM_BYTES = 1 << 30
"""A larger compressed tar is not read for pictures: it would be read from its start for every one."""

READERS = 2
"""Chunks read at once; each may hold :data:`inference.scan.CHUNK_BYTES`."""


def from_shards(tiles: Sequence[Example], evaluation: dict[str, Any] | None) -> tuple[dict[Example, str], list[str]]:
    """Pictures of tiles of the split that was evaluated, and why some are missing."""
    if evaluation is None:
        return {}, []
    shards = evaluation["shards"]
    try:
        if fingerprint(shards) != evaluation["data_fingerprint"]:
            return {}, [f"{shards}: packed anew since the evaluation, so its tiles are not shown"]
        reader = TileReader(shards, evaluation["split"])
        positions = {tile_id: position for position, tile_id in enumerate(reader.tile_ids)}
        found = {tile: _picture(reader.read([positions[tile.tile_id]])[0], reader.bands) for tile in tiles}
    except (OSError, TilefleetError) as error:
        return {}, [f"The tiles cannot be shown, as their shards are gone or changed ({error})"]
    return {tile: shown for tile, shown in found.items() if shown}, []


def from_archives(rankings: Sequence[Sequence[Example]], plan: PlanFile) -> tuple[dict[Example, str], list[str]]:
    """Pictures of classified tiles, the first of each of ``rankings`` first, and why some are missing."""
    wanted: dict[int, dict[int, Example]] = {}
    for rank in zip_longest(*rankings):
        for tile in rank:
            if tile:
                wanted.setdefault(tile.chunk, {})[tile.row] = tile
    last = time.monotonic() + READ_SECONDS
    pictures: dict[Example, str] = {}
    reasons: dict[str, None] = {}
    left_out = 0

    def read(number: int) -> tuple[dict[Example, str], str | None]:
        now = time.monotonic()
        if now > last:
            return {}, None
        [chunk] = plan.read(number, number + 1)
        return _from_chunk(chunk, wanted[number], plan.terms.bands, min(last, now + CHUNK_SECONDS))

    for tiles, (found, reason) in zip(wanted.values(), in_order(read, wanted, READERS), strict=True):
        pictures |= found
        if reason:
            reasons[reason] = None
        else:
            left_out += len(tiles) - len(found)
    notes = list(reasons)
    if left_out:
        limits = f"{CHUNK_SECONDS:.0f} s a chunk or {READ_SECONDS:.0f} s in all"
        notes.append(f"{left_out} pictures are left out: reading them from the archives would take over {limits}")
    return pictures, notes


def _from_chunk(
    chunk: Chunk, tiles: dict[int, Example], bands: Bands | None, last: float
) -> tuple[dict[Example, str], str | None]:
    """Pictures of ``tiles``, given by row, until the monotonic time ``last``; and why one cannot be had."""
    if chunk.kind == "stream" and chunk.archive_bytes > STREAM_BYTES:
        return {}, f"{chunk.archive}: too large a compressed tar to be read again for pictures of its tiles"
    rows: Sequence[int] = range(chunk.tiles or max(tiles) + 1)  # at the end of a tar its bytes are let go
    if chunk.members is not None:
        rows = sorted(tiles)
        chunk = replace(chunk, members=tuple(chunk.members[row] for row in rows))
    pictures: dict[Example, str] = {}
    reason = None
    try:
        for found, row in zip(read_chunk(chunk), rows, strict=False):
            if tile := tiles.get(row):
                shown = _picture(found.data or b"", bands) if found.tile_id == tile.tile_id else None
                if shown:
                    pictures[tile] = shown
                else:
                    reason = f"{chunk.archive}: {tile.tile_id} is gone or changed since it was classified"
            if time.monotonic() > last:
                break
    except TilefleetError as error:
        reason = str(error).partition(";")[0]
    return pictures, reason


def _picture(data: bytes, bands: Bands | None) -> str | None:
    """An encoded tile as a small JPEG in a data URI: decoded first, so that nothing but pixels gets to the page."""
    try:
        image = picture(decode_image(data, bands))
    except TileError:
        return None
    image.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
