"""The shard contract: what ``pack`` leaves behind, how it is read by offset, how damage is found.

A shard set is a folder with ``index.json``, ``tiles.parquet`` and ``{train,val,test}/shard-000000.tar``. Every tile is checked
against its sha256 as it is read. ``tilefleet verify`` finds each damaged shard, and each damaged tar of any other origin.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from cluster import storage
from configs.errors import TilefleetError, UsageError
from training.decode import TileError, decode_image, is_image_name

INDEX = "index.json"
TILES = "tiles.parquet"
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


class Index(BaseModel):
    """``index.json``. ``mean`` and ``std`` are those of the train split, per channel, on pixels scaled to 0..1."""

    model_config = ConfigDict(extra="forbid")

    version: int = 1
    classes: list[str]
    tile_size: int
    mean: list[float]
    std: list[float]
    splits: dict[str, list[Shard]]
    tiles_sha256: str
    packed: dict[str, Any]

    def tiles(self, split: str) -> int:
        """Tiles in ``split``."""
        return sum(shard.tiles for shard in self.splits.get(split, []))


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a file; ``str()`` gives the line a user sees."""

    location: str
    what: str

    def __str__(self) -> str:
        return f"{self.location}: {self.what}"


@dataclass(frozen=True)
class Member:
    """One file in a tar. ``start`` and ``end`` bound its headers and padded data; ``offset`` and ``size`` its bytes."""

    name: str
    start: int
    offset: int
    size: int
    end: int
    refused: str | None


@dataclass(frozen=True)
class TarScan:
    """All members of a tar that can be reached, and what is wrong with the rest of it (None for a whole tar)."""

    members: list[Member]
    damage: str | None


def load_index(root: str | Path) -> Index:
    """The index of a shard set; raises where there is none or it is damaged."""
    location = storage.join(root, INDEX)
    if not storage.exists(root):
        raise UsageError(f"{root}: no such shard set")
    if not storage.exists(location):
        raise TilefleetError(f"{root}: not a shard set, {INDEX} is missing; make one with `tilefleet pack`")
    try:
        return Index.model_validate_json(storage.read_bytes(location))
    except ValidationError as error:
        raise TilefleetError(f"{location}: damaged ({error.error_count()} fields wrong); pack again") from error


def fingerprint(root: str | Path) -> str:
    """sha256 of ``index.json``; equal for equal shard sets, as the index holds the digest of every file."""
    return hashlib.sha256(storage.read_bytes(storage.join(root, INDEX))).hexdigest()


def load_tiles(root: str | Path, split: str | None = None) -> pa.Table:
    """The rows of ``tiles.parquet`` in shard order, of one split or of all (:data:`TILES_SCHEMA`)."""
    data = storage.read_bytes(storage.join(root, TILES))
    if hashlib.sha256(data).hexdigest() != load_index(root).tiles_sha256:
        raise TilefleetError(f"{storage.join(root, TILES)}: changed since it was packed; run `tilefleet verify {root}`")
    table = pq.read_table(pa.BufferReader(data))
    return table if split is None else table.filter(pc.equal(table["split"], split))


class TileReader:
    """Reads tiles of one split by position, each checked against its digest.

    ``labels`` is an int32 numpy array ``[tiles]``; positions are those of :func:`load_tiles`.
    """

    def __init__(self, root: str | Path, split: str) -> None:
        table = load_tiles(root, split)
        self.root = root
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
        return [self._read_one(int(position)) for position in positions]

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


def scan_tar(stream: IO[bytes]) -> TarScan:
    """List the files of a seekable, uncompressed tar without reading their data.

    Unlike stock readers it says so when the tar is cut or a header is damaged, at whatever byte. Members that must
    not be trusted (links, devices, absolute names, names with ``..``) are listed with ``refused`` set.
    """
    total = stream.seek(0, 2)
    stream.seek(0)
    if total == 0:
        return TarScan([], "archive is empty (0 bytes)")
    members: list[Member] = []
    end = 0
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while info := tar.next():
                end = info.offset_data + (-(-info.size // 512) * 512 if info.isreg() else 0)
                if not info.isdir():
                    refused = _why_refused(info) or (
                        "cut short inside its data" if info.offset_data + info.size > total else None
                    )
                    members.append(Member(info.name, info.offset, info.offset_data, info.size, end, refused))
                tar.members = []  # type: ignore[attr-defined]  # else memory grows with the archive
    except tarfile.TarError as error:
        if not members:
            return TarScan([], f"not a tar archive, or its first header is damaged ({error})")
    except (OSError, UnicodeError, ValueError, OverflowError) as error:
        return TarScan(members, f"damaged after byte {end} ({error})")
    if end > total:
        return TarScan(members, f"cut short at byte {total}, inside {members[-1].name}" if members else "cut short")
    stream.seek(end)
    mark = stream.read(1024)
    if mark == bytes(1024):
        return TarScan(members, None)
    if len(mark) < 512 or not mark.strip(b"\0"):
        return TarScan(members, f"cut short at byte {total}: the end mark is missing")
    return TarScan(members, f"damaged header at byte {end}; {total - end} bytes after it cannot be reached")


def verify(location: str | Path) -> list[Problem]:
    """Everything wrong with a shard set, a tar or a folder of tars of any origin; empty where all is whole."""
    if not storage.exists(location):
        raise UsageError(f"{location}: no such file or folder")
    if not storage.is_dir(location):
        return list(_verify_tar(str(location)))
    if storage.exists(storage.join(location, INDEX)):
        return list(_verify_set(str(location)))
    tars = [name for name in storage.list_files(location, recursive=True) if name.lower().endswith(".tar")]
    if not tars:
        return [Problem(str(location), f"holds neither {INDEX} nor a tar archive")]
    return [problem for tar in tars for problem in _verify_tar(tar)]


def _verify_set(root: str) -> Iterator[Problem]:
    try:
        index = load_index(root)
        table = load_tiles(root)
    except (TilefleetError, pa.ArrowInvalid, OSError) as error:
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


def _verify_tar(location: str) -> Iterator[Problem]:
    with storage.open_input(location) as stream:
        scan = scan_tar(stream)
        if scan.damage:
            yield Problem(location, scan.damage)
        images = 0
        for member in scan.members:
            if member.refused:
                yield Problem(location, f"member {member.name!r} {member.refused}")
            elif is_image_name(member.name):
                images += 1
                stream.seek(member.offset)
                try:
                    decode_image(stream.read(member.size))
                except TileError as error:
                    yield Problem(location, f"member {member.name!r}: {error}")
        if not images and not scan.damage:
            yield Problem(location, "holds no images")


def _why_refused(info: tarfile.TarInfo) -> str | None:
    if info.issym() or info.islnk():
        return "is a link; links are not followed"
    if not info.isreg():
        return "is not a regular file"
    path = PurePosixPath(info.name)
    if path.is_absolute():
        return "has an absolute name"
    if ".." in path.parts:
        return "has a name that leaves the archive"
    return None
