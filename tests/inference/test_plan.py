"""A plan is written as archives are gone through, and read a row group at a time, however long it is."""

from __future__ import annotations

import pickle
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.errors import TilefleetError
from inference import plan, scan
from inference.ahead import in_order
from inference.ledger import finished
from inference.plan import ROW_GROUP, BadArchive, Chunk, Terms, chunk_id, open_plan, write_plan
from tests.archives import TERMS, planned, write_tar
from tests.inference.test_streams import PACKERS
from tests.inference.test_zips import zip_bytes

ONE = [("x.jpg", b"1")]


def test_a_plan_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    good = write_tar(tmp_path / "a.tar", [(f"{number}.jpg", b"1") for number in range(200)])
    bad = write_tar(tmp_path / "b.tar", [("x.txt", b"1")])
    (tmp_path / "c.tgz").write_bytes(PACKERS["tar.gz"](good.read_bytes()))
    assert open_plan(str(tmp_path)) is None
    out = str(tmp_path / "out")
    info = write_plan(out, [str(good), str(bad), str(tmp_path / "c.tgz")], lambda sample: TERMS, 1)
    assert (info.chunks, info.tiles, info.bad) == (201, 200, [BadArchive(str(bad), "holds no images")])
    kept = open_plan(out)
    assert kept
    assert (kept.terms, kept.chunks, kept.tiles, kept.bad) == (TERMS, info.chunks, info.tiles, info.bad)
    chunks = list(kept)
    assert [chunk.id for chunk in chunks] == [chunk_id(number) for number in range(201)]
    assert [chunk.tiles for chunk in chunks] == [1] * 200 + [None]
    for first, last in ((0, 1), (63, 65), (64, 64), (5, 190), (200, 201), (150, 999), (500, 600)):
        assert kept.read(first, last) == chunks[first:last]


def test_one_chunk_costs_one_row_group(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [(f"{number}.jpg", b"1") for number in range(3 * ROW_GROUP)])
    planned([tar], tmp_path / "out", 1)
    kept = open_plan(str(tmp_path / "out"))
    assert kept
    assert kept.footer.num_row_groups == 3
    assert [kept.footer.row_group(group).num_rows for group in range(3)] == [ROW_GROUP] * 3
    assert pickle.loads(pickle.dumps(kept)).read(100, 101) == kept.read(100, 101)


@pytest.mark.parametrize(("tiles", "sampled"), [(1, [0]), (16, list(range(16))), (17, list(range(0, 17, 2)))])
def test_terms_are_decided_by_chunks_from_all_over_the_plan(tmp_path: Path, tiles: int, sampled: list[int]) -> None:
    tar = write_tar(tmp_path / "a.tar", [(f"{number}.jpg", b"1") for number in range(tiles)])
    seen: list[Chunk] = []

    def decide(sample: list[Chunk]) -> Terms:
        seen.extend(sample)
        return TERMS

    assert write_plan(str(tmp_path / "out"), [str(tar)], decide, 1).terms == TERMS
    assert [chunk.id for chunk in seen] == [chunk_id(number) for number in sampled]


def test_ids_of_chunks_sort_as_their_numbers() -> None:
    numbers = [0, 9, 10, 999_999, 1_000_000, 99_999_999]
    assert sorted(map(chunk_id, numbers)) == [chunk_id(number) for number in numbers]


def test_archives_of_all_kinds_are_planned_in_their_order(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "d.tar", ONE)
    (tmp_path / "a.zip").write_bytes(zip_bytes(ONE))
    (tmp_path / "b.tar.xz").write_bytes(PACKERS["tar.xz"](tar.read_bytes()))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(b"1")
    (tmp_path / "list.txt").write_text("images/1.jpg")
    archives = [str(tmp_path / name) for name in ("a.zip", "b.tar.xz", "d.tar", "images", "images/1.jpg", "list.txt")]
    chunks = planned(archives, tmp_path / "out").chunks
    assert [chunk.kind for chunk in chunks] == ["zip", "stream", "tar", "files", "files", "files"]
    assert [chunk.archive for chunk in chunks] == [*archives[:4], archives[3], archives[5]]


def test_without_a_tile_there_is_no_plan(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    archives = [str(tmp_path / "a.tar"), str(tmp_path / "gone.zip")]
    with pytest.raises(TilefleetError, match=r"a\.tar: archive is empty .* and 1 more .* nothing to classify"):
        write_plan(str(tmp_path / "out"), archives, lambda sample: TERMS)
    assert open_plan(str(tmp_path / "out")) is None
    assert list((tmp_path / "out").iterdir()) == []


def test_progress_counts_archives(tmp_path: Path) -> None:
    tars = [str(write_tar(tmp_path / f"{name}.tar", ONE)) for name in "abc"]
    seen: list[tuple[str, int, int]] = []
    write_plan(str(tmp_path / "out"), tars, lambda sample: TERMS, progress=lambda *step: seen.append(step))
    assert seen == [("plan", 1, 3), ("plan", 2, 3), ("plan", 3, 3)]


@pytest.mark.parametrize("data", [b"PAR1 and then nothing", b"", bytes(100)])
def test_a_damaged_plan_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    (tmp_path / plan.PLAN).write_bytes(data)
    with pytest.raises(TilefleetError, match=r"plan\.parquet: damaged"):
        open_plan(str(tmp_path))


def test_a_plan_cut_or_damaged_in_its_rows_is_refused_by_name(tmp_path: Path) -> None:
    planned([write_tar(tmp_path / "a.tar", ONE)], tmp_path)
    kept = open_plan(str(tmp_path))
    assert kept
    data = bytearray((tmp_path / plan.PLAN).read_bytes())
    data[4:40] = bytes(36)
    (tmp_path / plan.PLAN).write_bytes(data)
    with pytest.raises(TilefleetError, match=r"plan\.parquet: damaged"):
        kept.read(0, 1)


def test_planning_takes_no_more_memory_for_more_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(tiles: int) -> int:
        def names(folder: str) -> Iterator[str]:
            return (f"deep/er/{number:09d}.jpg" for number in range(tiles))

        monkeypatch.setattr(scan, "walk_images", names)
        tracemalloc.start()
        planned_tiles = write_plan(str(tmp_path), [str(tmp_path)], lambda sample: TERMS, 10).tiles
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert planned_tiles == tiles
        return most

    peak(1000)
    assert peak(50_000) < 1.5 * peak(5_000)


def test_work_ahead_is_in_order_and_bounded() -> None:
    began: list[int] = []
    lock = threading.Lock()

    def work(number: int) -> int:
        with lock:
            began.append(number)
        time.sleep(0.001 * (number % 3))
        return number

    for taken, result in enumerate(in_order(work, range(50), 2)):
        assert result == taken
        assert len(began) <= taken + 1 + 4
    assert len(began) == 50


def test_terms_differ_only_in_what_was_asked_for() -> None:
    saved = TERMS.model_copy(update={"engine": "torch-bf16", "threads": 4, "device": "cuda"})
    assert TERMS.differences(saved) == ["engine"]
    wanted = TERMS.model_copy(update={"engine": "auto"})
    assert wanted.differences(saved) == []
    pooled = saved.model_copy(update={"decode": "pool", "decode_trials": {"cpu": {}}})
    assert wanted.differences(pooled) == ["decode"]
    assert wanted.model_copy(update={"decode": "auto"}).differences(pooled) == []
    assert wanted.differences(saved.model_copy(update={"batch_size": 9, "archives": ()})) == ["archives", "batch_size"]


def test_finished_chunks_are_known_from_names_alone(tmp_path: Path) -> None:
    assert finished(str(tmp_path)) == set()
    (tmp_path / "predictions").mkdir()
    for name in ("part-00000003.parquet", "part-00000001.parquet", ".part-00000002.parquet.x1.tmp"):
        (tmp_path / "predictions" / name).write_bytes(b"never opened")
    assert finished(str(tmp_path)) == {"00000001", "00000003"}
