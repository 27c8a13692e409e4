"""Where predictions go: one Parquet part file a chunk, each its own proof that the chunk is done.

Predictions of a chunk come in, ``predictions/part-<chunk>.parquet`` goes out, whole or not at all. A part's schema
metadata holds its :class:`Summary`, so totals need only footers.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from cluster import storage
from cluster.records import CONFIDENCE_BOUNDS
from configs.errors import TilefleetError, UsageError

if TYPE_CHECKING:
    from inference.predictor import Predictions

PREDICTIONS = "predictions"
SUMMARY_KEY = b"summary"
ROW_GROUP = 1 << 16
"""Rows of a part that are held before they are compressed."""

SCHEMA = pa.schema(
    [
        ("tile_id", pa.string()),
        ("archive", pa.string()),
        ("class_id", pa.int32()),  # null where there is an error, as are class_name and confidence
        ("class_name", pa.dictionary(pa.int32(), pa.string())),
        ("confidence", pa.float32()),
        ("is_unknown", pa.bool_()),
        ("error", pa.string()),  # null where classified
    ]
)
"""Columns of a part; ``probabilities``, a fixed-size list of float32, follows where it was asked for."""


class Summary(BaseModel):
    """What happened to some tiles; ``seconds`` are summed over workers."""

    model_config = ConfigDict(extra="forbid")

    tiles: int = 0
    classified: int = 0
    errors: int = 0
    unknown: int = 0
    errors_by_stage: dict[str, int] = {}
    tiles_by_class: dict[str, int] = {}
    tiles_by_confidence: dict[str, int] = {}  # by CONFIDENCE_BOUNDS; parts of older versions have none
    confidence_sum: float = 0.0
    seconds: dict[str, float] = {}
    bad_archives: dict[str, str] = {}  # archive -> its damage, where only reading it found that


class Part:
    """The rows of one chunk on their way into its part file, compressed as they come: memory grows by little.

    Columns are those of :data:`SCHEMA`, and ``probabilities`` where asked for. The dictionary of ``class_name`` is
    ``classes``. Equal rows give equal row groups.
    """

    def __init__(self, archive: str, classes: Sequence[str], *, probabilities: bool = False) -> None:
        self.summary = Summary(tiles_by_class=dict.fromkeys(classes, 0))
        self._archive = pa.scalar(archive, pa.string())
        self._classes = pa.array(classes, pa.string())
        vector = pa.list_(pa.float32(), len(classes))
        self._schema = SCHEMA.append(pa.field("probabilities", vector)) if probabilities else SCHEMA
        self._buffer = io.BytesIO()
        self._writer = pq.ParquetWriter(self._buffer, self._schema, compression="zstd")
        self._waiting: list[pa.Table] = []
        self._rows = 0

    def add(self, tile_ids: Sequence[str], errors: Sequence[str | None], predictions: Predictions) -> None:
        """Add the rows of N tiles; ``errors`` say why tiles could not be read, before what ``predictions`` says."""
        failed = predictions.class_id < 0
        ids = pa.array(predictions.class_id, pa.int32(), mask=failed)
        columns = [
            pa.array(tile_ids, pa.string()),
            pa.repeat(self._archive, len(failed)),
            ids,
            pa.DictionaryArray.from_arrays(ids, self._classes),
            pa.array(predictions.confidence, pa.float32(), mask=failed),
            pa.array(predictions.is_unknown),
            pa.array([read or decode for read, decode in zip(errors, predictions.errors, strict=True)], pa.string()),
        ]
        if len(self._schema) > len(SCHEMA):
            values = pa.array(predictions.probabilities.ravel(), pa.float32())
            mask = pa.array(failed)
            columns.append(pa.FixedSizeListArray.from_arrays(values, len(self._classes), mask=mask))
        self._waiting.append(pa.table(columns, schema=self._schema))
        self._rows += len(failed)
        if self._rows >= ROW_GROUP:
            self._flush()
        unread, bad = sum(error is not None for error in errors), int(failed.sum())
        counts = np.bincount(predictions.class_id[~failed], minlength=len(self._classes)).tolist()
        confidence = np.nan_to_num(predictions.confidence[~failed].astype(np.float64))  # NaN, of broken weights, is 0
        batch = Summary(
            tiles=len(failed),
            classified=len(failed) - bad,
            errors=bad,
            unknown=int(predictions.is_unknown.sum()),
            errors_by_stage={"read": unread, "decode": bad - unread},
            tiles_by_class=dict(zip(self._classes.to_pylist(), counts, strict=True)),
            tiles_by_confidence=_by_confidence(confidence),
            confidence_sum=float(confidence.sum()),
            seconds=predictions.seconds,
        )
        self.summary = summed([self.summary, batch])

    def write(self, location: str, damage: str | None = None, patience: float = 0) -> Summary:
        """Write the part at once, with what is summed up of it, and return that.

        ``damage`` is what is wrong with the archive. A full disk is waited for, ``patience`` seconds at most.
        """
        self._flush()
        if damage:
            self.summary = self.summary.model_copy(update={"bad_archives": {self._archive.as_py(): damage}})
        self._writer.add_key_value_metadata({SUMMARY_KEY: self.summary.model_dump_json()})
        self._writer.close()
        storage.write_patiently(location, self._buffer.getvalue(), patience)
        return self.summary

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.concat_tables(self._waiting), row_group_size=self._rows)
            self._waiting, self._rows = [], 0


def summed(summaries: Iterable[Summary]) -> Summary:
    """All of ``summaries`` in one; keys keep the order in which they first come."""
    total = Summary()
    for one in summaries:
        total = Summary(
            tiles=total.tiles + one.tiles,
            classified=total.classified + one.classified,
            errors=total.errors + one.errors,
            unknown=total.unknown + one.unknown,
            errors_by_stage=_added(total.errors_by_stage, one.errors_by_stage),
            tiles_by_class=_added(total.tiles_by_class, one.tiles_by_class),
            tiles_by_confidence=_added(total.tiles_by_confidence, one.tiles_by_confidence),
            confidence_sum=total.confidence_sum + one.confidence_sum,
            seconds=_added(total.seconds, one.seconds),
            bad_archives=total.bad_archives | one.bad_archives,
        )
    return total


def part_location(out: str, chunk_id: str) -> str:
    """Where the part of a chunk stands."""
    return storage.join(out, PREDICTIONS, f"part-{chunk_id}.parquet")


def chunk_of(location: str) -> str | None:
    """The chunk whose part ``location`` is, or None for any other file, such as one that is still being written."""
    path = PurePosixPath(location)
    return path.stem.removeprefix("part-") if path.match("part-*.parquet") else None


def read_summary(part: str) -> Summary:
    """The summary of a part, from its footer; raises where the part is damaged."""
    try:
        with storage.open_input(part) as stream:
            metadata = pq.read_metadata(stream).metadata or {}
        return Summary.model_validate_json(metadata[SUMMARY_KEY])
    except (pa.ArrowInvalid, OSError, KeyError, ValidationError) as error:  # damaged Thrift is an OSError to pyarrow
        raise TilefleetError(
            f"{part}: damaged or not readable; delete this file and run the same command again"
        ) from error


def read_predictions(out: str) -> pa.Table:
    """All rows of all parts in the order of their chunks; raises :class:`UsageError` where there is no part."""
    parts = [location for location in storage.list_files(storage.join(out, PREDICTIONS)) if chunk_of(location)]
    if not parts:
        raise UsageError(f"{out}: holds no predictions; make them with `tilefleet classify`")
    tables = [pq.read_table(pa.BufferReader(storage.read_bytes(part))) for part in parts]
    return pa.concat_tables(table.replace_schema_metadata(None) for table in tables)


def _by_confidence(confidence: npt.NDArray[np.float64]) -> dict[str, int]:
    """How many of ``confidence`` ``[N]`` lie in each of the ranges; more digits than float32 has are not looked at."""
    places = np.searchsorted([*CONFIDENCE_BOUNDS.values()], confidence.round(6)).clip(max=len(CONFIDENCE_BOUNDS) - 1)
    counts = np.bincount(places, minlength=len(CONFIDENCE_BOUNDS)).tolist()
    return dict(zip(CONFIDENCE_BOUNDS, counts, strict=True))


def _added(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    total = Counter(a)
    total.update(b)
    return dict(total)
