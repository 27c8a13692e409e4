"""A table of paths and labels as a source of raw tiles: CSV or Parquet, images beside it.

In goes the location of a table with the columns ``path`` (relative to the table's folder), ``label`` and, if wanted,
``split``; out comes a :class:`training.raw.Source`. Rows that cannot be used are an error, never passed over.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from configs.errors import TilefleetError
from training.files import Folder
from training.raw import Found, Source, first_few, label, source_name, split_named, tile_id

MAX_TABLE_BYTES = 1 << 30
"""Largest table that is read."""

_COLUMNS = ("path", "label", "split")


def is_table(location: str | Path) -> bool:
    """Whether ``location`` is a file that is named as a table."""
    return str(location).lower().endswith((".csv", ".parquet")) and not storage.is_dir(location)


def open_table(location: str | Path) -> Source:
    """The tiles that a table names. Labels become classes in the order of their text; a tile's id is its path.

    Images below the table's folder that it does not name are counted as left out. Raises :class:`TilefleetError` for a
    table that cannot be read and for rows without an image of their own inside the folder, a label or, where there is a
    column for it, a split: one line with the first few of them and their number.
    """
    if storage.size(location) > MAX_TABLE_BYTES:
        raise TilefleetError(f"{location}: over the limit of {MAX_TABLE_BYTES >> 20} MiB for a table; split it up")
    data = storage.read_bytes(location)
    rows = _read_parquet(location, data) if str(location).lower().endswith(".parquet") else _read_csv(location, data)
    folder = Folder(storage.absolute(location).rpartition("/")[0] or "/")
    images = set(folder.list().images)
    found = _check(location, rows, images)
    classes, tiles = label(location, found)
    unnamed = len(images) - len(found)
    left_out = {"image that the table does not name": unnamed} if unnamed else {}
    return Source(source_name(location), classes, tiles, left_out, "", folder)


def _check(location: str | Path, rows: list[dict[str, str]], images: set[str]) -> list[Found]:
    if not rows:
        raise TilefleetError(f"{location}: the table has no rows")
    paths = [str(PurePosixPath(row["path"])) for row in rows]
    uses = Counter(paths)
    found: list[Found] = []
    bad: list[str] = []
    for number, (row, path) in enumerate(zip(rows, paths, strict=True), 1):
        if reason := _why_bad(row, path, uses, images):
            bad.append(f"row {number} {reason}")
        else:
            found.append(Found(tile_id(path), row["label"], split_named(row.get("split", "")) or "", path))
    if bad:
        raise TilefleetError(
            f"{location}: {len(bad)} of {len(rows)} rows cannot be used: {first_few(bad)}; correct the table"
        )
    return found


def _why_bad(row: dict[str, str], path: str, uses: Counter[str], images: set[str]) -> str | None:
    if not row["path"]:
        return "has no path"
    if path.startswith("/") or "://" in row["path"] or ".." in path.split("/"):
        return f"leaves the table's folder: {row['path']!r}"
    if path not in images:
        return f"names no image below the table's folder: {row['path']!r}"
    if uses[path] > 1:
        return f"names an image that another row names as well: {row['path']!r}"
    if not row["label"].isprintable() or not row["label"]:
        return f"has no label that can be printed: {row['path']!r}"
    if "split" in row and not split_named(row["split"]):
        return f"has a split that is neither train, val nor test: {row['split']!r}"
    return None


def _read_csv(location: str | Path, data: bytes) -> list[dict[str, str]]:
    """The known columns of each row below the header, without the blanks around a cell."""
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        lines = [line for line in reader if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise TilefleetError(f"{location}: not a CSV table in UTF-8 ({error}); write it anew") from error
    header = [name.strip() for name in lines[0]] if lines else []
    _check_columns(location, header)
    uneven = [f"row {number}" for number, line in enumerate(lines[1:], 1) if len(line) != len(header)]
    if uneven:
        raise TilefleetError(
            f"{location}: {len(uneven)} rows have not {len(header)} cells as the header has: {first_few(uneven)}; "
            "put cells that hold a comma in quotes"
        )
    places = [(name, header.index(name)) for name in _COLUMNS if name in header]
    return [{name: line[place].strip() for name, place in places} for line in lines[1:]]


def _read_parquet(location: str | Path, data: bytes) -> list[dict[str, str]]:
    """The known columns of each row, as text."""
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        names = file.schema_arrow.names
        _check_columns(location, names)
        table = file.read([name for name in _COLUMNS if name in names])
        texts = [column.cast(pa.string()).to_pylist() for column in table.columns]
    except (pa.ArrowException, OSError) as error:
        cause = str(error).splitlines()[0] if str(error) else "damaged"
        raise TilefleetError(f"{location}: not a Parquet table of texts ({cause}); write it anew") from error
    return [
        {name: (cell or "").strip() for name, cell in zip(table.column_names, row, strict=True)}
        for row in zip(*texts, strict=True)
    ]


def _check_columns(location: str | Path, names: list[str]) -> None:
    missing = [name for name in _COLUMNS[:2] if name not in names]
    twice = [name for name in _COLUMNS if names.count(name) > 1]
    if missing or twice:
        problem = f"has no column {' and no column '.join(missing)}" if missing else f"has two columns {twice[0]}"
        raise TilefleetError(f"{location}: {problem}; the columns are path, label and, if wanted, split")
