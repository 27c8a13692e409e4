"""The plan of a run: every tile that can be reached, in exactly one chunk, kept as ``plan.parquet``.

:func:`write_plan` goes through the archives and writes rows as they are found, :func:`open_plan` reads its totals, and
any chunk by one row group. Neither holds more than some thousand chunks, however many there are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from cluster import storage
from configs.errors import TilefleetError
from inference.ahead import in_order
from inference.scan import Kind, Range, Scan, Source, scan, sources
from inference.streams import opened
from inference.zips import Damaged
from training.encoded import Bands

PLAN = "plan.parquet"
SCANNERS = 8
"""Archives scanned at once: hides the delay of object storage."""

ROW_GROUP = 64
"""Chunks in a row group of the plan."""

MAX_SAMPLE = 16
"""Most chunks in the sample by which the terms are decided."""

PLAN_SCHEMA = pa.schema(
    [
        ("chunk", pa.string()),
        ("archive", pa.string()),
        ("kind", pa.string()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("tiles", pa.int64()),  # null for a compressed tar, which is not read to be planned
        ("archive_bytes", pa.int64()),
        ("members", pa.list_(pa.string())),  # only of files by name
    ]
)

Progress = Callable[[str, int, int], None]
"""Called with the stage, how much of it is done, and the total."""


@dataclass(frozen=True)
class Chunk:
    """Some consecutive tiles of one archive; ``id`` names its part file.

    ``start`` and ``end`` bound its headers and data in a ``tar``, its rows of the central directory in a ``zip``, and
    count its files among those of a folder or list (``files``), which ``members`` names; a compressed tar (``stream``)
    is one chunk whole. ``tiles`` is None where only reading counts them.
    """

    id: str
    archive: str
    kind: Kind
    start: int
    end: int
    tiles: int | None
    archive_bytes: int
    members: tuple[str, ...] | None = None


@dataclass(frozen=True)
class BadArchive:
    """An archive that is damaged or of no use; what can be reached of it is planned all the same."""

    archive: str
    reason: str


class Terms(BaseModel):
    """What the rows of a run depend on; kept with the plan, so that a resume cannot mix two runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle_digest: str
    archives: tuple[str, ...]
    tiles_per_chunk: int
    batch_size: int
    probabilities: bool
    bands: Bands | None = None
    engine: str
    device: str = "cpu"
    threads: int
    trials: dict[str, Any] = {}
    """What was measured of each engine, see :class:`inference.engines.Trial`."""
    decode: str = "cpu"
    """Who decodes: ``cpu``, ``gpu`` or ``pool``; plans that do not say so are older, and it was ``cpu`` for all."""
    decode_trials: dict[str, Any] = {}
    """What was measured of each of them, in the same form."""

    def differences(self, saved: Terms) -> list[str]:
        """Names of what is asked for here and was otherwise in a ``saved`` run; ``auto`` is any."""
        found = {"device", "threads", "trials", "decode_trials"}
        found |= {name for name in ("engine", "decode") if getattr(self, name) == "auto"}
        asked = [name for name in Terms.model_fields if name not in found]
        return [name for name in asked if getattr(self, name) != getattr(saved, name)]


@dataclass(frozen=True)
class PlanInfo:
    """What is known of all chunks together: their number, and the ``tiles`` in those whose tiles were counted."""

    terms: Terms
    bad: list[BadArchive]
    chunks: int
    tiles: int


@dataclass(frozen=True)
class PlanFile(PlanInfo):
    """A plan as it is kept; iteration gives its chunks, holding one row group at a time."""

    location: str
    footer: Any
    """Of the Parquet file, as pyarrow has it; pickles, so that a worker can be sent the plan."""

    def __iter__(self) -> Iterator[Chunk]:
        return self._chunks(0, self.chunks)

    def read(self, first: int, last: int) -> list[Chunk]:
        """The chunks of number ``first`` to ``last - 1``; their row groups alone are read."""
        return list(self._chunks(first, last))

    def _chunks(self, first: int, last: int) -> Iterator[Chunk]:
        first, last = max(0, first), min(last, self.chunks)
        if first >= last:
            return
        with _damage_named(self.location), opened(self.location) as stream:
            file = pq.ParquetFile(stream, metadata=self.footer)
            for group in range(first // ROW_GROUP, (last - 1) // ROW_GROUP + 1):
                start = group * ROW_GROUP
                wanted = slice(max(0, first - start), min(last - start, ROW_GROUP))
                rows = file.read_row_group(group).slice(wanted.start, wanted.stop - wanted.start)
                yield from map(_chunk, rows.to_pylist())


def chunk_id(number: int) -> str:
    """The id of a chunk from its number, which is its place in the plan; ids sort as numbers do."""
    return f"{number:08d}"


def make_chunk(name: str, source: Source, found: Scan, tiles: Range) -> Chunk:
    """The chunk called ``name`` of ``tiles``, which are among those ``found`` in ``source``."""
    place = (tiles.start, tiles.end, tiles.tiles)
    return Chunk(name, source.archive, found.kind, *place, found.bytes, tiles.members)


def write_plan(
    out: str,
    archives: Sequence[str],
    decide: Callable[[list[Chunk]], Terms],
    tiles_per_chunk: int = 1000,
    progress: Progress | None = None,
) -> PlanInfo:
    """Go through ``archives``, as :func:`inference.archive.list_archives` gives them, and keep the plan in ``out``.

    Chunks are numbered in the order of the archives. ``decide`` is given some chunks from all over the plan and returns
    the terms. Raises :class:`TilefleetError`, and leaves no plan, where there is not one tile, or where object storage
    fails, as then nobody knows what an archive holds.
    """

    def look(source: Source) -> tuple[Source, Scan]:
        return source, scan(source, tiles_per_chunk)

    sample = _Sample()
    bad: list[BadArchive] = []
    chunks = tiles = done = 0
    with storage.writing(storage.join(out, PLAN)) as file, _Rows(file) as rows:
        for source, found in in_order(look, sources(archives), SCANNERS):
            before, reason = chunks, found.damage
            try:
                for one in found.ranges:
                    chunk = make_chunk(chunk_id(chunks), source, found, one)
                    rows.add(chunk)
                    sample.add(chunk)
                    chunks, tiles = chunks + 1, tiles + (one.tiles or 0)
            except Damaged as error:
                reason = str(error)
            if reason := reason or (None if chunks > before else "holds no images"):
                bad.append(BadArchive(source.archive, reason))
            done += len(source.images) or 1
            if progress:
                progress("plan", done, len(archives))
        if not chunks:
            more = f", and {len(bad) - 1} more archives are no better" if len(bad) > 1 else ""
            raise TilefleetError(f"{bad[0].archive}: {bad[0].reason}{more}; there is nothing to classify")
        terms = decide(sample.chunks)
        info = PlanInfo(terms, bad, chunks, tiles)
        rows.note("terms", terms.model_dump())
        rows.note("bad_archives", [vars(one) for one in bad])
        rows.note("totals", {"chunks": chunks, "tiles": tiles})
    return info


def open_plan(out: str) -> PlanFile | None:
    """The plan kept in ``out``, of which only the footer is read, or None where there is none.

    Raises :class:`TilefleetError` where it is damaged.
    """
    location = storage.join(out, PLAN)
    if not storage.exists(location):
        return None
    with _damage_named(location), opened(location) as stream:
        footer = pq.read_metadata(stream)
        notes = {name: json.loads(footer.metadata[name.encode()]) for name in ("terms", "bad_archives", "totals")}
        bad = [BadArchive(**entry) for entry in notes["bad_archives"]]
        return PlanFile(Terms.model_validate(notes["terms"]), bad, **notes["totals"], location=location, footer=footer)


class _Sample:
    """Chunks at equal distances over all that are added: every one at first, twice as far apart where they get many."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self._added, self._distance = 0, 1

    def add(self, chunk: Chunk) -> None:
        if self._added % self._distance == 0:
            self.chunks.append(chunk)
        self._added += 1
        if len(self.chunks) > MAX_SAMPLE:
            del self.chunks[1::2]
            self._distance *= 2


class _Rows:
    """Rows of the plan on their way into the file, a row group at a time."""

    def __init__(self, file: IO[bytes]) -> None:
        self._writer = pq.ParquetWriter(file, PLAN_SCHEMA, compression="zstd", write_statistics=False)
        self._waiting: list[dict[str, Any]] = []

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()
        self._writer.close()

    def add(self, chunk: Chunk) -> None:
        self._waiting.append({"chunk": chunk.id} | vars(chunk))
        if len(self._waiting) == ROW_GROUP:
            self._flush()

    def note(self, name: str, value: object) -> None:
        self._writer.add_key_value_metadata({name: json.dumps(value)})

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.Table.from_pylist(self._waiting, PLAN_SCHEMA))
            self._waiting = []


def _chunk(row: dict[str, Any]) -> Chunk:
    members = row.pop("members")
    return Chunk(row.pop("chunk"), **row, members=None if members is None else tuple(members))


@contextmanager
def _damage_named(location: str) -> Iterator[None]:
    try:
        yield
    except TilefleetError:
        raise
    except (OSError, KeyError, TypeError, ValueError) as error:  # pyarrow's and pydantic's errors are among them
        raise TilefleetError(f"{location}: damaged or of another version; classify into a new folder") from error
