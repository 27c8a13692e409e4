"""Where predictions go: one Parquet part file a chunk, each its own proof that the chunk is done.

Predictions of a chunk come in, ``predictions/part-<chunk>.parquet`` goes out, whole or not at all. A part's schema
metadata holds its :class:`Summary`, so totals need only footers.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from cluster import storage
from configs.errors import TilefleetError, UsageError

PREDICTIONS = "predictions"
SUMMARY_KEY = b"summary"
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
    seconds: dict[str, float] = {}


def make_table(
    archive: str,
    tile_ids: Sequence[str],
    errors: Sequence[str | None],
    class_id: npt.NDArray[np.int32],
    confidence: npt.NDArray[np.float32],
    is_unknown: npt.NDArray[np.bool_],
    classes: Sequence[str],
    probabilities: npt.NDArray[np.float32] | None = None,
) -> pa.Table:
    """Rows of :data:`SCHEMA`, one for each of N tiles of one archive, in their order.

    The arrays are ``[N]``, ``probabilities`` is ``[N, classes]``. The dictionary of ``class_name`` is ``classes``.
    """
    failed = np.array([error is not None for error in errors], dtype=bool)
    ids = pa.array(class_id, pa.int32(), mask=failed)
    columns = [
        pa.array(tile_ids, pa.string()),
        pa.repeat(pa.scalar(archive, pa.string()), len(failed)),
        ids,
        pa.DictionaryArray.from_arrays(ids, pa.array(classes, pa.string())),
        pa.array(confidence, pa.float32(), mask=failed),
        pa.array(is_unknown & ~failed),
        pa.array(errors, pa.string()),
    ]
    if probabilities is None:
        return pa.table(columns, schema=SCHEMA)
    values = pa.array(probabilities.ravel(), pa.float32())
    lists = pa.FixedSizeListArray.from_arrays(values, len(classes), mask=pa.array(failed))
    return pa.table([*columns, lists], schema=SCHEMA.append(pa.field("probabilities", lists.type)))


def summarise(table: pa.Table, errors_by_stage: dict[str, int], seconds: dict[str, float]) -> Summary:
    """Counts over the rows of one part; ``tiles_by_class`` names every class, unknown tiles are in their best one."""
    names = table["class_name"].combine_chunks()
    counts = np.bincount(names.indices.drop_null().to_numpy(), minlength=len(names.dictionary))
    errors = table["class_id"].null_count
    return Summary(
        tiles=table.num_rows,
        classified=table.num_rows - errors,
        errors=errors,
        unknown=int(np.count_nonzero(table["is_unknown"].to_numpy())),
        errors_by_stage=errors_by_stage,
        tiles_by_class=dict(zip(names.dictionary.to_pylist(), counts.tolist(), strict=True)),
        seconds=seconds,
    )


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
            seconds=_added(total.seconds, one.seconds),
        )
    return total


def part_location(out: str, chunk_id: str) -> str:
    """Where the part of a chunk stands."""
    return storage.join(out, PREDICTIONS, f"part-{chunk_id}.parquet")


def chunk_of(location: str) -> str | None:
    """The chunk whose part ``location`` is, or None for any other file, such as one that is still being written."""
    path = PurePosixPath(location)
    return path.stem.removeprefix("part-") if path.match("part-*.parquet") else None


def write_part(out: str, chunk_id: str, table: pa.Table, summary: Summary) -> None:
    """Write the part of a chunk at once; equal rows and summaries give equal bytes."""
    buffer = io.BytesIO()
    annotated = table.replace_schema_metadata({SUMMARY_KEY: summary.model_dump_json().encode()})
    pq.write_table(annotated, buffer, compression="zstd", row_group_size=max(1, table.num_rows))
    storage.write_bytes(part_location(out, chunk_id), buffer.getvalue())


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


def _added(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    total = Counter(a)
    total.update(b)
    return dict(total)
