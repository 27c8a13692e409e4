"""What a page says of predictions, gathered in one pass over their parts, in memory that does not grow with them.

In go the plan and the part files, out come sums, and of every ranking of tiles or archives only the first few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from configs.errors import TilefleetError
from inference import sink
from inference.ahead import in_order
from inference.ledger import finished
from inference.plan import Chunk, PlanFile
from inference.sink import Summary

HISTOGRAM_BINS = 20
LEAST_CONFIDENT = 24
UNKNOWN_TILES = 24
EXAMPLES_OF_A_CLASS = 6
EXAMPLES_OF_AN_ERROR = 3
WORST_ARCHIVES = 10

COLUMNS = ["tile_id", "class_id", "confidence", "is_unknown", "error"]
READERS = 4
"""Parts read at once: hides the delay of object storage."""

HELD_BYTES = 4 << 20
"""A part of fewer bytes is read in one piece, a larger one a row group at a time."""

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int32]


class Example(NamedTuple):
    """A tile worth showing: row ``row`` of the chunk of number ``chunk``; ``truth`` is its class where it is known."""

    confidence: float
    tile_id: str
    predicted: str
    truth: str | None = None
    chunk: int = 0
    row: int = 0


class ArchiveCount(NamedTuple):
    """What came of the tiles of one archive that are done."""

    archive: str
    tiles: int
    errors: int
    unknown: int


class Ranking:
    """The ``size`` tiles of the highest score in each of some groups; of equal ones, those that came first."""

    def __init__(self, groups: int, size: int) -> None:
        self._size = size
        self._held: list[list[tuple[float, Example]]] = [[] for _ in range(groups)]
        self._lowest = np.full(groups, -np.inf)  # what a score must exceed to be held

    def offer(self, scores: Floats, groups: Numbers, example: Callable[[int], Example]) -> None:
        """Take in N tiles of which ``example`` makes any from its number; ``scores`` and ``groups`` are ``[N]``."""
        better = np.flatnonzero(scores > self._lowest[groups])
        order = better[np.lexsort((-scores[better], groups[better]))]
        ordered = groups[order]
        place = np.arange(len(order)) - np.searchsorted(ordered, ordered)
        for number in order[place < self._size].tolist():
            self._held[groups[number]].append((float(scores[number]), example(number)))
        for group in np.unique(ordered):
            self._held[group] = sorted(self._held[group], key=itemgetter(0), reverse=True)[: self._size]
            if len(self._held[group]) == self._size:
                self._lowest[group] = self._held[group][-1][0]

    def of(self, group: int) -> list[Example]:
        """The tiles of a group, the highest score first."""
        return [example for _, example in self._held[group]]


class Tally:
    """What is counted of rows, and the tiles that are kept of them; ``classes`` are those of the bundle in order."""

    def __init__(self, classes: Sequence[str] = ()) -> None:
        self.classes = list(classes)
        self.histogram = np.zeros(HISTOGRAM_BINS, np.int64)
        self.unknown_by_class = np.zeros(len(classes), np.int64)
        self.confidence_by_class = np.zeros(len(classes))
        """Sums of confidence."""
        self.causes: Counter[str] = Counter()
        self.errors: dict[str, list[tuple[str, str]]] = {}
        """By cause, some tiles and the whole errors."""
        self.most = Ranking(len(classes), EXAMPLES_OF_A_CLASS)
        self.least = Ranking(len(classes), EXAMPLES_OF_A_CLASS)
        self._least_of_all = Ranking(1, LEAST_CONFIDENT)
        self._unknown = Ranking(1, UNKNOWN_TILES)

    @property
    def least_of_all(self) -> list[Example]:
        """The tiles of the lowest confidence."""
        return self._least_of_all.of(0)

    @property
    def unknown(self) -> list[Example]:
        """Of the tiles taken for unknown, those of the highest confidence."""
        return self._unknown.of(0)

    def add(self, chunk: Chunk, first: int, rows: pa.RecordBatch) -> None:
        """Take in rows of the part of ``chunk``, of which ``first`` rows were before; columns are :data:`COLUMNS`."""
        whole = pc.is_null(rows["error"])
        if whole.false_count:
            self._add_errors(chunk.archive, rows.filter(pc.invert(whole)))
        places = first + np.flatnonzero(whole.to_numpy(zero_copy_only=False))
        good = rows.filter(whole)
        ids: pa.Array = good["tile_id"]
        class_id: Numbers = good["class_id"].to_numpy()
        confidence: Floats = good["confidence"].to_numpy()
        unknown = good["is_unknown"].to_numpy(zero_copy_only=False)
        self.histogram += np.histogram(confidence, HISTOGRAM_BINS, (0, 1))[0]
        self.unknown_by_class += np.bincount(class_id[unknown], minlength=len(self.classes))
        self.confidence_by_class += np.bincount(class_id, confidence, len(self.classes))

        def example(i: int) -> Example:
            name = self.classes[class_id[i]]
            return Example(float(confidence[i]), ids[i].as_py(), name, chunk=int(chunk.id), row=int(places[i]))

        one_group = np.zeros(len(class_id), np.int32)
        self.most.offer(confidence, class_id, example)
        self.least.offer(-confidence, class_id, example)
        self._least_of_all.offer(-confidence, one_group, example)
        self._unknown.offer(np.where(unknown, confidence, -np.inf), one_group, example)

    def _add_errors(self, archive: str, failed: pa.RecordBatch) -> None:
        causes = pc.list_element(pc.split_pattern(failed["error"], ":", max_splits=1), 0).dictionary_encode()
        numbers = causes.indices.to_numpy()
        for number, (cause, count) in enumerate(
            zip(causes.dictionary.to_pylist(), np.bincount(numbers).tolist(), strict=True)
        ):
            self.causes[cause] += count
            kept = self.errors.setdefault(cause, [])
            for i in np.flatnonzero(numbers == number)[: EXAMPLES_OF_AN_ERROR - len(kept)].tolist():
                kept.append((f"{archive}: {failed['tile_id'][i]}", failed["error"][i].as_py()))


@dataclass
class Overview:
    """What is known of a run from its plan and the parts that are there."""

    tally: Tally = field(default_factory=Tally)
    total: Summary = field(default_factory=Summary)
    planned: int = 0
    """Tiles, without those of chunks that only reading counts and that are not done."""
    uncounted: int = 0
    """Chunks whose tiles are not in ``planned``."""
    archives: int = 0
    parts: int = 0
    foreign: int = 0
    """Parts of chunks that are not in the plan; they are not counted."""
    most_errors: list[ArchiveCount] = field(default_factory=list)
    most_unknown: list[ArchiveCount] = field(default_factory=list)

    def add_archive(self, found: ArchiveCount) -> None:
        """Keep the counts of one more archive where they are among the highest."""
        self.archives += 1
        if found.errors:
            self.most_errors = _first([*self.most_errors, found], "errors")
        if found.unknown:
            self.most_unknown = _first([*self.most_unknown, found], "unknown")


def overview(location: str, plan: PlanFile) -> Overview:
    """Go through the parts of the run at ``location`` once; raises :class:`TilefleetError` where one is damaged."""
    done = finished(location)
    view = Overview()

    def read(chunk: Chunk) -> tuple[Chunk, Summary | None, bytes]:
        if chunk.id not in done:
            return chunk, None, b""
        part = sink.part_location(location, chunk.id)
        return chunk, sink.read_summary(part), storage.read_bytes(part, 0, HELD_BYTES)

    for archive, chunks in groupby(in_order(read, plan, READERS), lambda found: found[0].archive):
        of_archive = []
        for chunk, summary, data in chunks:
            tiles = chunk.tiles if summary is None else summary.tiles
            view.planned += tiles or 0
            view.uncounted += tiles is None
            if summary is None:
                continue
            of_archive.append(summary)
            view.parts += 1
            if not view.tally.classes:
                view.tally = Tally(list(summary.tiles_by_class))
            first = 0
            for rows in _batches(sink.part_location(location, chunk.id), data):
                view.tally.add(chunk, first, rows)
                first += rows.num_rows
        total = sink.summed(of_archive)
        view.total = sink.summed([view.total, total])
        view.add_archive(ArchiveCount(archive, total.tiles, total.errors, total.unknown))
    view.foreign = len(done) - view.parts
    return view


def _batches(part: str, data: bytes) -> Iterator[pa.RecordBatch]:
    """The rows of a part in order; ``data`` are its first bytes, all of them where they are few."""
    try:
        with pa.BufferReader(data) if len(data) < HELD_BYTES else storage.open_input(part) as source:
            yield from pq.ParquetFile(source).iter_batches(sink.ROW_GROUP, columns=COLUMNS)
    except TilefleetError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise TilefleetError(
            f"{part}: damaged or not readable; delete this file and run the same command again"
        ) from error


def _first(counts: list[ArchiveCount], by: str) -> list[ArchiveCount]:
    return sorted(counts, key=lambda count: int(getattr(count, by)), reverse=True)[:WORST_ARCHIVES]
