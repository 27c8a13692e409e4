"""What a page says of predictions: all rows are counted, few are held."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import TilefleetError
from inference import sink, tally
from inference.plan import Chunk, chunk_id, open_plan
from inference.tally import (
    EXAMPLES_OF_A_CLASS,
    LEAST_CONFIDENT,
    UNKNOWN_TILES,
    WORST_ARCHIVES,
    ArchiveCount,
    Overview,
    Tally,
    overview,
)
from tests.predictions import CLASSES, predictions

CHUNK = Chunk(chunk_id(0), "a.tar", "tar", 0, 1, None, 1)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.floats(0, 1, width=32), st.booleans()), max_size=80), st.integers(1, 80)
)
def test_the_tally_of_parts_is_that_of_all_rows(tiles: list[tuple[int, float, bool]], part_size: int) -> None:
    found = Tally(CLASSES)
    for start in range(0, len(tiles), part_size):
        part = tiles[start : start + part_size]
        found.add(CHUNK, start, rows([f"{number:03d}" for number in range(start, start + len(part))], part))

    good = [(c, class_id, row) for row, (class_id, c, failed) in enumerate(tiles) if not failed]
    assert found.histogram.sum() == len(good)
    assert found.causes.total() == len(tiles) - len(good)
    assert found.unknown_by_class.sum() == sum(c < 0.1 for c, _, _ in good)
    assert found.confidence_by_class.sum() == pytest.approx(sum(c for c, _, _ in good))
    least = sorted(good, key=lambda tile: tile[0])  # of equal ones, the first
    assert [(tile.confidence, tile.row) for tile in found.least_of_all] == [(c, r) for c, _, r in least][
        :LEAST_CONFIDENT
    ]
    unknown = sorted((c for c, _, _ in good if c < 0.1), reverse=True)
    assert [tile.confidence for tile in found.unknown] == unknown[:UNKNOWN_TILES]
    for number, name in enumerate(CLASSES):
        of_class = sorted((tile for tile in good if tile[1] == number), key=lambda tile: -tile[0])
        best, worst = (
            [(tile.confidence, tile.row) for tile in ranking.of(number)] for ranking in (found.most, found.least)
        )
        assert best == [(c, r) for c, _, r in of_class][:EXAMPLES_OF_A_CLASS]
        assert worst == [(c, r) for c, n, r in least if n == number][:EXAMPLES_OF_A_CLASS]
        shown = [*found.most.of(number), *found.least.of(number)]
        assert all(tile.predicted == name and tile.tile_id == f"{tile.row:03d}" for tile in shown)


def test_what_is_held_does_not_grow_with_the_rows() -> None:
    found = Tally(CLASSES)
    for start in range(0, 40_000, 1000):
        tiles = [(n % 3, n / 40_000, n % 7 == 0) for n in range(start, start + 1000)]
        found.add(CHUNK, start, rows([str(n) for n in range(start, start + 1000)], tiles))
    assert [tile.row for tile in found.most.of(1)] == [39_997, 39_994, 39_988, 39_985, 39_982, 39_979]
    assert [tile.row for tile in found.least.of(1)] == [1, 4, 10, 13, 16, 19]
    assert found.causes == {"torn": 5715}
    assert found.errors == {
        "torn": [("a.tar: 0", "torn: here"), ("a.tar: 7", "torn: here"), ("a.tar: 14", "torn: here")]
    }


def test_the_worst_archives_are_named() -> None:
    view = Overview()
    for number in range(100):
        view.add_archive(ArchiveCount(f"{number}.tar", 100, (7 * number) % 100, number % 2))

    assert [count.errors for count in view.most_errors] == list(range(99, 99 - WORST_ARCHIVES, -1))
    assert [count.archive for count in view.most_unknown] == [f"{n}.tar" for n in range(1, 2 * WORST_ARCHIVES, 2)]
    assert view.archives == 100


def test_a_large_part_is_read_a_row_group_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = predictions(tmp_path, finished=True)
    plan = open_plan(out)
    assert plan
    whole = overview(out, plan)
    monkeypatch.setattr(tally, "HELD_BYTES", 10)
    monkeypatch.setattr(sink, "ROW_GROUP", 3)

    pieces = overview(out, plan)

    assert (pieces.total, pieces.planned, pieces.most_errors) == (whole.total, 42, whole.most_errors)
    assert pieces.tally.least_of_all == whole.tally.least_of_all
    assert pieces.tally.errors == whole.tally.errors
    assert [pieces.tally.most.of(n) for n in range(3)] == [whole.tally.most.of(n) for n in range(3)]


def test_a_part_whose_rows_are_damaged_is_named(tmp_path: Path) -> None:
    out = predictions(tmp_path, finished=True)
    part = tmp_path / "out" / "predictions" / "part-00000001.parquet"
    part.write_bytes(b"PAR1" + bytes(200) + part.read_bytes()[204:])
    plan = open_plan(out)
    assert plan

    with pytest.raises(TilefleetError, match=r"part-00000001\.parquet: damaged"):
        overview(out, plan)


def test_a_part_of_no_chunk_is_counted_apart(tmp_path: Path) -> None:
    out = predictions(tmp_path, finished=True)
    parts = tmp_path / "out" / "predictions"
    shutil.copy(parts / "part-00000000.parquet", parts / "part-00000007.parquet")
    plan = open_plan(out)
    assert plan

    view = overview(out, plan)

    assert (view.parts, view.foreign, view.total.tiles) == (3, 1, 42)


def rows(tile_ids: Sequence[str], tiles: Sequence[tuple[int, float, bool]]) -> pa.RecordBatch:
    """What a tally takes, from (class, confidence, failed); below 0.1 is unknown."""
    columns: dict[str, list[object]] = {
        "tile_id": list(tile_ids),
        "class_id": [None if failed else class_id for class_id, _, failed in tiles],
        "confidence": [None if failed else confidence for _, confidence, failed in tiles],
        "is_unknown": [not failed and confidence < 0.1 for _, confidence, failed in tiles],
        "error": ["torn: here" if failed else None for _, _, failed in tiles],
    }
    return pa.RecordBatch.from_pydict(columns, pa.schema([sink.SCHEMA.field(name) for name in columns]))
