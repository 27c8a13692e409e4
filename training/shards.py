"""The shard contract: what ``pack`` leaves behind, how it is read by offset, how damage is found.

A shard set is a folder with ``index.json``, ``tiles.parquet`` and ``{train,val,test}/shard-000000.tar``. Every tile is
checked against its sha256 as it is read. ``tilefleet verify`` finds each damaged shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from cluster import storage
from configs.errors import TilefleetError, UsageError
from configs.schema import Sealed
from training.encoded import Bands, channels
from training.tars import Member as Member  # inference reads tars through this module
from training.tars import scan_tar as scan_tar

INDEX = "index.json"
TILES = "tiles.parquet"
VERSION = 2
MARKER = ".packing"  # stands in a set that is not finished
REQUESTS = 16
"""Tiles that a reader asks object storage for at the same time."""

SPLITS = ("train", "val", "test")
TILES_SCHEMA = pa.schema(
    [
        ("tile_id", pa.string()),
        ("split", pa.string()),
        ("shard", pa.string()),  # relative to the set, as in index.json
        ("offset", pa.int64()),  # of the image bytes in the tar
        ("size", pa.int64()),  # of the image bytes
        ("label", pa.int32()),  # position in the index's classes
        ("sha256", pa.string()),  # of the image bytes
        ("source", pa.string()),  # where the tile came from, relative to the packed source
    ]
)


class Shard(BaseModel):
    """One tar of a shard set; ``name`` is relative to the set, such as ``train/shard-000000.tar``."""

    model_config = ConfigDict(extra="forbid")

    name: str
    tiles: int
    bytes: int
    sha256: str


class Index(Sealed):
    """``index.json``. ``mean`` and ``std`` are those of the train split, per channel, on pixels scaled to 0..1.

    ``bands`` are the channels that were chosen; None: red, green and blue.
    """

    version: int = VERSION
    classes: list[str]
    tile_size: int
    bands: Bands | None = None
    mean: list[float]
    std: list[float]
    splits: dict[str, list[Shard]]
    tiles_sha256: str
    packed: dict[str, Any]

    @property
    def channels(self) -> int:
        """Channels of a tile's pixels."""
        return channels(self.bands)

    def tiles(self, split: str) -> int:
        """Tiles in ``split``."""
        return sum(shard.tiles for shard in self.splits.get(split, []))

    def require(self, root: str | Path, split: str) -> None:
        """Raise :class:`UsageError` where ``split`` of this set at ``root`` has no tile."""
        if not self.tiles(split):
            held = ", ".join(name for name in self.splits if self.tiles(name)) or "none"
            raise UsageError(f"{root}: no tiles in split {split!r}; splits with tiles: {held}")


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a file; ``str()`` gives the line a user sees."""

    location: str
    what: str

    def __str__(self) -> str:
        return f"{self.location}: {self.what}"


def load_index(root: str | Path) -> Index:
    """The index of a shard set; raises where there is none or it is damaged."""
    location = storage.join(root, INDEX)
    if not storage.exists(root):
        raise UsageError(f"{root}: no such shard set")
    if not storage.exists(location):
        if storage.exists(storage.join(root, MARKER)):
            raise TilefleetError(f"{root}: packing was stopped before its end; run the same `tilefleet pack` again")
        raise TilefleetError(f"{root}: not a shard set, {INDEX} is missing; make one with `tilefleet pack`")
    try:
        index = Index.model_validate_json(storage.read_bytes(location))
    except ValidationError as error:
        raise TilefleetError(f"{location}: damaged ({error.error_count()} fields wrong); pack again") from error
    if index.version != VERSION:
        raise TilefleetError(
            f"{location}: a shard set of version {index.version}, this is for version {VERSION}; pack again"
        )
    if not index.is_intact():
        raise TilefleetError(f"{location}: changed since it was packed; use another copy or pack again")
    return index


def save_index(root: str | Path, index: Index) -> Index:
    """Write ``index.json`` with its digest; returns the index as written."""
    index = index.sealed()
    storage.write_bytes(storage.join(root, INDEX), index.model_dump_json(indent=1).encode())
    return index


def fingerprint(root: str | Path) -> str:
    """sha256 of ``index.json``; equal for equal shard sets, as the index holds the digest of every file."""
    return hashlib.sha256(storage.read_bytes(storage.join(root, INDEX))).hexdigest()


def load_tiles(root: str | Path, split: str | None = None) -> pa.Table:
    """The rows of ``tiles.parquet`` in shard order, of one split or of all (:data:`TILES_SCHEMA`)."""
    return _load_tiles(root, load_index(root), split)


def _load_tiles(root: str | Path, index: Index, split: str | None) -> pa.Table:
    location = storage.join(root, TILES)
    if not storage.exists(location):
        raise TilefleetError(f"{location}: missing; copy the shard set again or pack again")
    data = storage.read_bytes(location)
    if hashlib.sha256(data).hexdigest() != index.tiles_sha256:
        raise TilefleetError(f"{location}: changed since it was packed; copy the shard set again or pack again")
    table = pq.read_table(pa.BufferReader(data))
    return table if split is None else table.filter(pc.equal(table["split"], split))


class TileReader:
    """Reads tiles of one split by position, each checked against its digest.

    ``labels`` is an int32 numpy array ``[tiles]``; positions are those of :func:`load_tiles`, ``bands`` the index's.
    """

    def __init__(self, root: str | Path, split: str) -> None:
        index = load_index(root)
        table = _load_tiles(root, index, split)
        self.root = root
        self.bands = index.bands
        self.tile_ids: list[str] = table["tile_id"].to_pylist()
        self.labels = table["label"].to_numpy()
        self._shards: list[str] = table["shard"].to_pylist()
        self._offsets = table["offset"].to_numpy()
        self._sizes = table["size"].to_numpy()
        self._digests: list[str] = table["sha256"].to_pylist()

    def __len__(self) -> int:
        return len(self.tile_ids)

    def read(self, positions: Sequence[int]) -> list[bytes]:
        """Encoded images in the order of ``positions``; raises where a shard is missing, cut or changed."""
        if not storage.is_uri(self.root):
            return [self._read_one(position) for position in positions]
        with ThreadPoolExecutor(REQUESTS) as pool:  # of object storage each tile is a request, so many run at a time
            return list(pool.map(self._read_one, positions))

    def _read_one(self, position: int) -> bytes:
        location = storage.join(self.root, self._shards[position])
        try:
            data = storage.read_bytes(location, int(self._offsets[position]), int(self._sizes[position]))
        except FileNotFoundError as error:
            raise TilefleetError(f"{location}: shard is missing; copy it again or pack again") from error
        if hashlib.sha256(data).hexdigest() != self._digests[position]:
            raise TilefleetError(
                f"{location}: tile {self.tile_ids[position]} changed since it was packed; `tilefleet verify` tells more"
            )
        return data


def is_set(location: str | Path) -> bool:
    """Whether ``pack`` made what is there, or is about to."""
    return any(storage.exists(storage.join(location, name)) for name in (INDEX, MARKER))


def verify(location: str | Path) -> list[Problem]:
    """Everything wrong with a shard set; empty where all is whole."""
    return list(_verify_set(storage.absolute(location)))


def _verify_set(root: str) -> Iterator[Problem]:
    try:
        index = load_index(root)
        table = load_tiles(root)
    except TilefleetError as error:
        yield Problem(root, str(error).removeprefix(f"{root}: "))
        return
    known = {shard.name: shard for shards in index.splits.values() for shard in shards}
    for location in storage.list_files(root, recursive=True):
        name = location[len(root.rstrip("/")) + 1 :]
        if name.endswith(".tar") and name not in known:
            yield Problem(location, "extra shard that the index does not name")
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        rows.setdefault(row["shard"], []).append(row)
    for name in rows.keys() - known.keys():
        yield Problem(storage.join(root, TILES), f"lists tiles of {name}, which the index does not name")
    for name, shard in known.items():
        yield from _verify_shard(storage.join(root, name), shard, rows.get(name, []), len(index.classes))


def _verify_shard(location: str, shard: Shard, rows: list[dict[str, Any]], classes: int) -> Iterator[Problem]:
    if not storage.exists(location):
        yield Problem(location, "missing")
        return
    data = storage.read_bytes(location)
    if len(data) != shard.bytes:
        yield Problem(location, f"{len(data)} bytes, {shard.bytes} were packed")
        return
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        yield Problem(location, "its bytes changed since it was packed")
        return
    if len(rows) != shard.tiles:
        yield Problem(location, f"{len(rows)} tiles listed in {TILES}, {shard.tiles} in {INDEX}")
    for row in rows:
        tile = data[row["offset"] : row["offset"] + row["size"]]
        if hashlib.sha256(tile).hexdigest() != row["sha256"] or not 0 <= row["label"] < classes:
            yield Problem(location, f"{TILES} disagrees about tile {row['tile_id']}")
