"""A part file holds the rows of a chunk and a summary, whole and the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import TilefleetError, UsageError
from inference import sink
from inference.sink import Summary

CLASSES = ["Water", "Forest", "Crop"]
COUNTS = st.dictionaries(st.sampled_from("abc"), st.integers(0, 9))
SUMMARIES = st.builds(Summary, tiles=st.integers(0, 9), tiles_by_class=COUNTS)


def table(errors: list[str | None], probabilities: bool = False) -> pa.Table:
    count = len(errors)
    return sink.make_table(
        "/a/x.tar",
        [f"d/{number}" for number in range(count)],
        errors,
        np.array([-1 if error else number % 3 for number, error in enumerate(errors)], dtype=np.int32),
        np.linspace(0.2, 0.9, count, dtype=np.float32),
        np.array([number % 2 == 0 for number in range(count)]),
        CLASSES,
        np.full((count, 3), 1 / 3, dtype=np.float32) if probabilities else None,
    )


def test_a_row_is_a_class_or_an_error() -> None:
    rows = table([None, "not an image", None]).to_pylist()
    assert rows[0]["class_name"] == "Water"
    assert rows[2] | {"confidence": None} == {
        "tile_id": "d/2",
        "archive": "/a/x.tar",
        "class_id": 2,
        "class_name": "Crop",
        "confidence": None,
        "is_unknown": True,
        "error": None,
    }
    assert rows[1] == {
        "tile_id": "d/1",
        "archive": "/a/x.tar",
        "class_id": None,
        "class_name": None,
        "confidence": None,
        "is_unknown": False,
        "error": "not an image",
    }


@pytest.mark.parametrize("errors", [[None, None], ["bad", "bad"], ["bad", None]])
def test_every_part_names_all_classes_in_order(tmp_path: Path, errors: list[str | None]) -> None:
    sink.write_part(str(tmp_path), "000000", table(errors), Summary())
    read = sink.read_predictions(str(tmp_path))
    assert read.schema.equals(sink.SCHEMA)
    assert read["class_name"].chunk(0).dictionary.to_pylist() == CLASSES
    assert read.equals(table(errors))


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    for name in "ab":
        part = table([None, "bad", None] * 700, probabilities=True)
        sink.write_part(str(tmp_path / name), "000000", part, Summary(tiles=2100))
    first, second = (Path(sink.part_location(str(tmp_path / name), "000000")).read_bytes() for name in "ab")
    assert first == second


def test_probabilities_are_a_column_of_fixed_length_and_null_on_error(tmp_path: Path) -> None:
    sink.write_part(str(tmp_path), "000000", table([None, "bad"], probabilities=True), Summary())
    read = sink.read_predictions(str(tmp_path))
    assert read.schema.field("probabilities").type == pa.list_(pa.float32(), 3)
    assert read["probabilities"].to_pylist() == [[pytest.approx(1 / 3)] * 3, None]


def test_the_summary_counts_the_rows_and_is_read_from_the_footer(tmp_path: Path) -> None:
    part = table([None, "bad", None, None, "bad"])
    summary = sink.summarise(part, {"read": 1, "decode": 1}, {"read": 0.5})
    assert summary == Summary(
        tiles=5,
        classified=3,
        errors=2,
        unknown=2,
        errors_by_stage={"read": 1, "decode": 1},
        tiles_by_class={"Water": 2, "Forest": 0, "Crop": 1},
        seconds={"read": 0.5},
    )
    sink.write_part(str(tmp_path), "000007", part, summary)
    assert sink.read_summary(sink.part_location(str(tmp_path), "000007")) == summary


def test_predictions_come_in_the_order_of_chunks(tmp_path: Path) -> None:
    for chunk, errors in (("000001", ["second"]), ("000000", ["first"])):
        sink.write_part(str(tmp_path), chunk, table(list(errors)), Summary())
    (tmp_path / "predictions" / ".part-000002.parquet.abc.tmp").write_bytes(b"half")
    assert sink.read_predictions(str(tmp_path))["error"].to_pylist() == ["first", "second"]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1"])
def test_a_damaged_part_is_named(tmp_path: Path, content: bytes) -> None:
    part = tmp_path / "part-000000.parquet"
    part.write_bytes(content)
    with pytest.raises(TilefleetError, match=r"part-000000\.parquet: damaged"):
        sink.read_summary(str(part))


def test_a_folder_without_predictions_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no predictions"):
        sink.read_predictions(str(tmp_path))


@given(st.lists(SUMMARIES))
def test_summaries_add_up(summaries: list[Summary]) -> None:
    total = sink.summed(summaries)
    assert total.tiles == sum(one.tiles for one in summaries)
    for name in "abc":
        assert total.tiles_by_class.get(name, 0) == sum(one.tiles_by_class.get(name, 0) for one in summaries)
