"""A part file holds the rows of a chunk and a summary, whole and the same every time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.records import CONFIDENCE_BOUNDS
from configs.errors import TilefleetError, UsageError
from inference import sink
from inference.predictor import Predictions
from inference.sink import Summary

CLASSES = ["Water", "Forest", "Crop"]
COUNTS = st.dictionaries(st.sampled_from("abc"), st.integers(0, 9))
SUMMARIES = st.builds(Summary, tiles=st.integers(0, 9), tiles_by_class=COUNTS)


def predictions(errors: Sequence[str | None]) -> Predictions:
    """What a model might say: classes in turn, every second tile unknown; what ends in ``!`` could not be decoded."""
    failed = np.array([bool(error) for error in errors], dtype=bool)
    numbers = np.arange(len(errors))
    return Predictions(
        class_id=np.where(failed, -1, numbers % 3).astype(np.int32),
        confidence=np.linspace(0.2, 0.9, len(errors), dtype=np.float32),
        probabilities=np.full((len(errors), 3), 1 / 3, dtype=np.float32),
        is_unknown=~failed & (numbers % 2 == 0),
        errors=["empty file" if error and not error.endswith("!") else error for error in errors],
        seconds={"decode": 0.5, "forward": 1.5},
    )


def write(
    out: Path, errors: Sequence[str | None], chunk: str = "00000000", batch: int = 1000, probabilities: bool = False
) -> Summary:
    """One part with a row for each of ``errors``, of which those that end in ``!`` came from decoding."""
    part = sink.Part("/a/x.tar", CLASSES, probabilities=probabilities)
    for start in range(0, len(errors), batch):
        some = errors[start : start + batch]
        unread = [None if error and error.endswith("!") else error for error in some]
        part.add([f"d/{start + number}" for number in range(len(some))], unread, predictions(some))
    return part.write(sink.part_location(str(out), chunk))


def test_a_row_is_a_class_or_an_error(tmp_path: Path) -> None:
    write(tmp_path, [None, "not an image!", None, "is a link"])
    rows = sink.read_predictions(str(tmp_path)).to_pylist()
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
        "error": "not an image!",
    }
    assert rows[3]["error"] == "is a link"


@pytest.mark.parametrize("errors", [[None, None], ["bad", "bad!"], ["bad", None], []])
def test_every_part_names_all_classes_in_order(tmp_path: Path, errors: list[str | None]) -> None:
    write(tmp_path, errors)
    read = sink.read_predictions(str(tmp_path))
    assert read.schema.equals(sink.SCHEMA)
    assert read["error"].to_pylist() == errors
    assert all(chunk.dictionary.to_pylist() == CLASSES for chunk in read["class_name"].chunks if len(chunk))


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / name, [None, "bad", None] * 700, probabilities=True)
    first, second = (Path(sink.part_location(str(tmp_path / name), "00000000")).read_bytes() for name in "ab")
    assert first == second


def test_rows_are_the_same_however_they_come_and_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[str | None] = [None, "bad", None, None] * 25
    write(tmp_path / "whole", errors, batch=6)
    monkeypatch.setattr(sink, "ROW_GROUP", 12)
    write(tmp_path / "pieces", errors, batch=6)
    assert pq.read_metadata(sink.part_location(str(tmp_path / "pieces"), "00000000")).num_row_groups == 9
    whole, pieces = (sink.read_predictions(str(tmp_path / name)) for name in ("whole", "pieces"))
    assert whole.equals(pieces)


def test_probabilities_are_a_column_of_fixed_length_and_null_on_error(tmp_path: Path) -> None:
    write(tmp_path, [None, "bad"], probabilities=True)
    read = sink.read_predictions(str(tmp_path))
    assert read.schema.field("probabilities").type == pa.list_(pa.float32(), 3)
    assert read["probabilities"].to_pylist() == [[pytest.approx(1 / 3)] * 3, None]


def test_the_summary_counts_the_rows_and_is_read_from_the_footer(tmp_path: Path) -> None:
    summary = write(tmp_path, [None, "bad", None, None, "bad!"], batch=3)
    assert summary == Summary(
        tiles=5,
        classified=3,
        errors=2,
        unknown=3,
        errors_by_stage={"read": 1, "decode": 1},
        tiles_by_class={"Water": 2, "Forest": 0, "Crop": 1},
        tiles_by_confidence=dict.fromkeys(CONFIDENCE_BOUNDS, 0) | {"0.2": 2, "0.9": 1},
        confidence_sum=summary.confidence_sum,
        seconds={"decode": 1.0, "forward": 3.0},
    )
    assert summary.confidence_sum == pytest.approx(1.3)
    assert sink.read_summary(sink.part_location(str(tmp_path), "00000000")) == summary


def test_confidences_are_counted_by_inclusive_upper_bounds_and_no_number_counts_as_none() -> None:
    part = sink.Part("/a/x.tar", CLASSES)
    said = predictions([None] * 6)
    confidence = np.array([0.1, 0.6, 0.601, 1.0, 1.0000001, np.nan], np.float32)
    part.add(list("abcdef"), [None] * 6, replace(said, confidence=confidence))
    counts = part.summary.tiles_by_confidence
    assert {name: count for name, count in counts.items() if count} == {"0.1": 2, "0.6": 1, "0.7": 1, "1": 2}
    assert Summary.model_validate_json(part.summary.model_dump_json()) == part.summary


def test_damage_that_reading_found_is_in_the_summary(tmp_path: Path) -> None:
    part = sink.Part("/a/x.tar.gz", CLASSES)
    part.add(["a"], [None], predictions([None]))
    part.write(sink.part_location(str(tmp_path), "00000003"), "cut short")
    found = sink.read_summary(sink.part_location(str(tmp_path), "00000003"))
    assert (found.bad_archives, found.tiles) == ({"/a/x.tar.gz": "cut short"}, 1)


def test_predictions_come_in_the_order_of_chunks(tmp_path: Path) -> None:
    for chunk, error in (("00000001", "second"), ("00000000", "first")):
        write(tmp_path, [error], chunk)
    (tmp_path / "predictions" / ".part-0000000002.parquet.abc.tmp").write_bytes(b"half")
    assert sink.read_predictions(str(tmp_path))["error"].to_pylist() == ["first", "second"]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1"])
def test_a_damaged_part_is_named(tmp_path: Path, content: bytes) -> None:
    part = tmp_path / "part-00000000.parquet"
    part.write_bytes(content)
    with pytest.raises(TilefleetError, match=r"part-00000000\.parquet: damaged"):
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
