"""Tile archives become chunks of work, and a chunk becomes tiles again.

A chunk is a byte range of one tar. :func:`plan` finds the chunks from headers alone, ``plan.parquet`` keeps them in the
output folder, :func:`read_chunk` gives the encoded tiles of one. Nothing is extracted to disk; no name is trusted.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import IO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from cluster import storage
from configs.errors import TilefleetError, UsageError
from inference import sink
from training.decode import MAX_ENCODED_BYTES, is_image_name
from training.shards import Member, scan_tar

PLAN = "plan.parquet"
CHUNK_BYTES = 64 << 20
"""Largest byte range of a chunk; a single tile may need more."""

SCANNERS = 8
"""Archives scanned at once: hides the delay of object storage."""

PLAN_SCHEMA = pa.schema(
    [
        ("chunk", pa.string()),
        ("archive", pa.string()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("tiles", pa.int64()),
        ("archive_bytes", pa.int64()),
    ]
)

Progress = Callable[[str, int, int], None]
"""Called with the stage, how much of it is done, and the total."""


@dataclass(frozen=True)
class Chunk:
    """The tiles whose headers and data lie in bytes ``start`` to ``end`` of ``archive``; ``id`` names its part file."""

    id: str
    archive: str
    start: int
    end: int
    tiles: int
    archive_bytes: int


@dataclass(frozen=True)
class BadArchive:
    """An archive that is damaged or of no use; what can be reached of it is planned all the same."""

    archive: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """Every tile that can be reached, in exactly one chunk, and the archives that are not whole."""

    chunks: list[Chunk]
    bad: list[BadArchive]

    @property
    def tiles(self) -> int:
        """Tiles in all chunks, which is the number of rows to come."""
        return sum(chunk.tiles for chunk in self.chunks)


class Terms(BaseModel):
    """What the rows of a run depend on; kept with the plan, so that a resume cannot mix two runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle_digest: str
    archives: tuple[str, ...]
    tiles_per_chunk: int
    batch_size: int
    probabilities: bool
    engine: str
    threads: int

    def differences(self, other: Terms) -> list[str]:
        """Names of what was asked for differently; engine and threads are not asked for but found."""
        asked = [name for name in Terms.model_fields if name not in ("engine", "threads")]
        return [name for name in asked if getattr(self, name) != getattr(other, name)]


class Range(NamedTuple):
    """Bytes of a tar and the tiles in them."""

    start: int
    end: int
    tiles: int


class Tile(NamedTuple):
    """One tile of a chunk: its encoded image, or why there is none (``cause`` or ``cause: detail``)."""

    tile_id: str
    data: bytes | None
    error: str | None


def list_archives(locations: Sequence[str]) -> list[str]:
    """Tar files behind files, folders (searched through) and globs: absolute, sorted, each once.

    In a URI, ``*`` also matches ``/``. Raises :class:`UsageError` for a location without any.
    """
    if not locations:
        raise UsageError("no archive given: name tar files, folders that hold them, or globs")
    return sorted({storage.absolute(tar) for location in locations for tar in _expand(storage.absolute(location))})


def plan(archives: Sequence[str], tiles_per_chunk: int = 1000, progress: Progress | None = None) -> Plan:
    """Chunks of all ``archives``, numbered in their order; reads headers only."""
    chunks: list[Chunk] = []
    bad: list[BadArchive] = []
    with ThreadPoolExecutor(SCANNERS) as pool:
        scans = pool.map(partial(_scan, tiles_per_chunk=tiles_per_chunk), archives)
        for done, (archive, (ranges, size, reason)) in enumerate(zip(archives, scans, strict=True), 1):
            for found in ranges:
                chunks.append(Chunk(f"{len(chunks):06d}", archive, *found, size))
            if reason:
                bad.append(BadArchive(archive, reason))
            if progress:
                progress("plan", done, len(archives))
    return Plan(chunks, bad)


def split(members: Sequence[Member], archive_bytes: int, tiles_per_chunk: int) -> list[Range]:
    """Runs of tiles in one tar, in order, with at most ``tiles_per_chunk`` tiles and :data:`CHUNK_BYTES` bytes each.

    Of a tile too large to be decoded only the headers are in a range: its row says why, its data is never read.
    """
    ranges: list[Range] = []
    stops = [after.start for _, after in pairwise(members)] + [archive_bytes]
    for member, stop in zip(members, stops, strict=False):  # no members leave one stop over
        if not is_image_name(member.name):
            continue
        end = member.offset if member.size > MAX_ENCODED_BYTES else min(member.end, stop)
        last = ranges[-1] if ranges else None
        if last and last.tiles < tiles_per_chunk and end - last.start <= CHUNK_BYTES:
            ranges[-1] = Range(last.start, end, last.tiles + 1)
        else:
            ranges.append(Range(member.start, end, 1))
    return ranges


def read_chunk(chunk: Chunk) -> list[Tile]:
    """The tiles of ``chunk`` in archive order, exactly ``chunk.tiles`` of them, read in one piece.

    Raises :class:`TilefleetError` where the archive is gone or is not the one that was planned.
    """
    try:
        size = storage.size(chunk.archive)
        data = storage.read_bytes(chunk.archive, chunk.start, chunk.end - chunk.start)
    except OSError as error:
        raise TilefleetError(
            f"{chunk.archive}: cannot be read ({error.strerror or error}); "
            "make it readable and run the same command again"
        ) from error
    members = scan_tar(io.BytesIO(data)).members
    tiles = [_tile(member, data) for member in members if is_image_name(member.name)]
    if size != chunk.archive_bytes or len(tiles) != chunk.tiles:
        raise TilefleetError(
            f"{chunk.archive}: changed since it was planned; put the old file back, or classify into a new folder"
        )
    return tiles


def write_plan(out: str, plan: Plan, terms: Terms) -> None:
    """Keep the plan as ``plan.parquet``: a row a chunk, and terms and bad archives as JSON in the schema's metadata."""
    notes = terms.model_dump() | {"bad_archives": [vars(bad) for bad in plan.bad]}
    rows = [{"chunk": chunk.id} | vars(chunk) for chunk in plan.chunks]
    schema = PLAN_SCHEMA.with_metadata({key: json.dumps(value) for key, value in notes.items()})
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer)
    storage.write_bytes(storage.join(out, PLAN), buffer.getvalue())


def read_plan(out: str) -> tuple[Plan, Terms] | None:
    """The plan kept in ``out`` and its terms, or None where there is none; raises where it is damaged."""
    location = storage.join(out, PLAN)
    if not storage.exists(location):
        return None
    try:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(location)))
        notes = {key.decode(): json.loads(value) for key, value in (table.schema.metadata or {}).items()}
        bad = [BadArchive(**entry) for entry in notes.pop("bad_archives")]
        chunks = [Chunk(row.pop("chunk"), **row) for row in table.to_pylist()]
        return Plan(chunks, bad), Terms.model_validate(notes)
    except (OSError, KeyError, TypeError, ValueError) as error:  # pyarrow's and pydantic's errors are among them
        raise TilefleetError(f"{location}: damaged or of another version; classify into a new folder") from error


def finished(out: str) -> set[str]:
    """Ids of the chunks that have a part file; found by listing, nothing is opened."""
    chunks = (sink.chunk_of(location) for location in storage.list_files(storage.join(out, sink.PREDICTIONS)))
    return {chunk for chunk in chunks if chunk is not None}


def _expand(location: str) -> list[str]:
    if storage.exists(location):
        files = _files(location)
    elif not any(wildcard in location for wildcard in "*?["):
        raise UsageError(f"{location}: no such file or folder")
    elif storage.is_uri(location):
        folder = re.split(r"[*?\[]", location, maxsplit=1)[0].rpartition("/")[0]
        below = storage.list_files(folder, recursive=True)
        files = [name for name in below if fnmatchcase(name, location)]
    else:
        pattern = Path(location)
        matches = Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))
        files = [name for match in matches for name in _files(str(match))]
    tars = [name for name in files if name.lower().endswith(".tar") and not Path(name).name.startswith(".")]
    if not tars:
        raise UsageError(f"{location}: no .tar archive there; pack the tiles into uncompressed tar files")
    return tars


def _files(location: str) -> list[str]:
    return storage.list_files(location, recursive=True) if storage.is_dir(location) else [location]


def _scan(archive: str, tiles_per_chunk: int) -> tuple[list[Range], int, str | None]:
    try:
        size = storage.size(archive)
        with _open(archive) as stream:
            scan = scan_tar(stream)
    except OSError as error:
        return [], 0, f"cannot be read ({error.strerror or error})"
    ranges = split(scan.members, size, tiles_per_chunk)
    return ranges, size, scan.damage or (None if ranges else "holds no images")


def _open(archive: str) -> IO[bytes]:
    stream = storage.open_input(archive)
    if not storage.is_uri(archive):
        return stream
    return io.BufferedReader(stream, buffer_size=4 << 20)  # type: ignore[type-var]  # one request a header is too many


def _tile(member: Member, data: bytes) -> Tile:
    name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    tile_id = name.rpartition(".")[0]
    if member.size > MAX_ENCODED_BYTES:
        return Tile(tile_id, None, f"image file over the limit: {member.size} bytes, {MAX_ENCODED_BYTES} allowed")
    if member.refused:
        return Tile(tile_id, None, member.refused)
    return Tile(tile_id, data[member.offset : member.offset + member.size], None)
