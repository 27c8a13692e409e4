"""Lists of paths: text with one a line, or a table (CSV, Parquet) with a column ``path``; other columns do not matter.

In goes the location of a list, out come its paths, of which a few are held at once.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from inference.streams import opened
from inference.zips import Damaged

LISTS = (".txt", ".csv", ".parquet")
"""Endings of lists."""

_LONGEST_LINE = 1 << 16


def listed(location: str) -> Iterator[str]:
    """The paths in a list, as they are written; no blank ones. Raises :class:`Damaged` where it is no list."""
    read: Callable[[IO[bytes]], Iterator[str]] = _lines
    if location.lower().endswith(".csv"):
        read = _csv_paths
    elif location.lower().endswith(".parquet"):
        read = _parquet_paths
    with opened(location) as stream:
        try:
            yield from (path.strip() for path in read(stream) if path and path.strip())
        except (UnicodeDecodeError, csv.Error, pa.ArrowException, OSError) as error:
            cause = str(error).partition("\n")[0]
            raise Damaged(f"not a list of paths, or cut short ({cause}); write it anew") from error


def _lines(stream: IO[bytes]) -> Iterator[str]:
    text = io.TextIOWrapper(stream, "utf-8-sig")
    return iter(lambda: text.readline(_LONGEST_LINE), "")


def _csv_paths(stream: IO[bytes]) -> Iterator[str]:
    rows = csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), strict=True)
    header = [name.strip() for name in next(rows, [])]
    if "path" not in header:
        raise Damaged("has no column path")
    column = header.index("path")
    return (row[column] for row in rows if len(row) > column)


def _parquet_paths(stream: IO[bytes]) -> Iterator[str]:
    file = pq.ParquetFile(stream)
    if "path" not in file.schema_arrow.names:
        raise Damaged("has no column path")
    for batch in file.iter_batches(columns=["path"]):
        yield from batch.column(0).cast(pa.string()).to_pylist()
