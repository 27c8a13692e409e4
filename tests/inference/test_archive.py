"""Archives are planned into chunks that hold each tile once, and chunks are read back as they were planned."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import TilefleetError, UsageError
from inference import archive
from inference.archive import CHUNK_BYTES, BadArchive, Chunk, Plan, Terms
from training.decode import MAX_ENCODED_BYTES, is_image_name
from training.shards import Member, scan_tar

LONG = "nested/" * 30 + "a-name-over-one-hundred-characters-" * 4
MiB = 1 << 20
TERMS = Terms(
    bundle_digest="d",
    archives=("/a", "s3://b/c"),
    tiles_per_chunk=2,
    batch_size=8,
    probabilities=False,
    engine="torch-f32",
    threads=1,
)


def write_tar(path: Path, files: Sequence[tuple[str, bytes]], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read_all(plan: Plan) -> list[archive.Tile]:
    return [tile for chunk in plan.chunks for tile in archive.read_chunk(chunk)]


@st.composite
def members(draw: st.DrawFn) -> list[Member]:
    sizes = st.one_of(st.integers(0, 4000), st.integers(0, 90 * MiB))
    found, at = [], 0
    for number, (size, ending) in enumerate(draw(st.lists(st.tuples(sizes, st.sampled_from(["jpg", "PNG", "cls"]))))):
        offset = at + draw(st.sampled_from([512, 1536]))
        end = offset + -(-size // 512) * 512
        found.append(Member(f"d/{number}.{ending}", at, offset, size, end, None))
        at = end
    return found


@given(members(), st.integers(1, 7))
def test_every_tile_is_in_one_chunk_in_order_and_within_the_limits(members: list[Member], most: int) -> None:
    ranges = archive.split(members, members[-1].end + 1024 if members else 0, most)
    tiles = iter([member for member in members if is_image_name(member.name)])
    for found in ranges:
        held = [next(tiles) for _ in range(found.tiles)]
        assert 1 <= found.tiles <= most
        assert found.start == held[0].start
        assert found.end == (held[-1].offset if held[-1].size > MAX_ENCODED_BYTES else held[-1].end)
        assert found.tiles == 1 or found.end - found.start <= CHUNK_BYTES
    assert next(tiles, None) is None
    assert all(before.end <= after.start for before, after in pairwise(ranges))


@given(st.lists(st.binary(max_size=1500), min_size=1, max_size=12), st.integers(1, 5))
def test_chunks_give_back_the_bytes_of_every_tile(
    tmp_path_factory: pytest.TempPathFactory, images: list[bytes], most: int
) -> None:
    files = [(f"d/{number}.jpg", data) for number, data in enumerate(images)]
    tar = write_tar(tmp_path_factory.mktemp("tars") / "a.tar", files)
    tiles = read_all(archive.plan([str(tar)], most))
    assert [(tile.tile_id, tile.data, tile.error) for tile in tiles] == [(n[:-4], data, None) for n, data in files]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_foreign_tar_gives_its_images_and_nothing_else(tmp_path: Path, tar_format: int) -> None:
    long = "x" * 90 if tar_format == tarfile.USTAR_FORMAT else LONG
    files = [
        ("readme.txt", b"no image"),
        ("a/b/c/deep.jpg", b"1"),
        (f"{long}.jpeg", b"2"),
        ("LOUD.JPG", b"3"),
        (".hidden.jpg", b"litter"),
        ("__MACOSX/a.jpg", b"litter"),
        ("a/two.dots.png", b"4" * 513),
        ("a/two.dots.cls", b"7"),
        (f"{long}2.tif", b"5"),
    ]
    plan = archive.plan([str(write_tar(tmp_path / "a.tar", files, tar_format))], 1)
    assert [(tile.tile_id, tile.data) for tile in read_all(plan)] == [
        ("a/b/c/deep", b"1"),
        (long, b"2"),
        ("LOUD", b"3"),
        ("a/two.dots", b"4" * 513),
        (f"{long}2", b"5"),
    ]
    assert plan.bad == []
    assert [chunk.id for chunk in plan.chunks] == ["000000", "000001", "000002", "000003", "000004"]


def test_members_that_must_not_be_trusted_are_error_rows(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("../up.jpg", "/absolute.jpg", "good.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo("link.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    tiles = read_all(archive.plan([str(tmp_path / "a.tar")], 2))
    assert [tile.tile_id for tile in tiles] == ["../up", "/absolute", "good", "link", "link"]
    assert [tile.data for tile in tiles] == [None, None, b"abc", None, None]
    assert ["link" in (tile.error or "") for tile in tiles] == [False, False, False, True, True]
    assert all(tile.error for tile in tiles if tile.data is None)


def test_a_name_that_is_not_text_is_kept_readable(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("caf\udce9.jpg", b"1")], tarfile.GNU_FORMAT)
    assert [tile.tile_id for tile in read_all(archive.plan([str(tar)]))] == ["caf\\xe9"]


def test_the_data_of_a_tile_over_the_limit_is_never_read(tmp_path: Path) -> None:
    big = tarfile.TarInfo("big.jpg")
    big.size = MAX_ENCODED_BYTES + 512
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(big.tobuf())
        file.seek(big.size, os.SEEK_CUR)
        with tarfile.open(fileobj=file, mode="w") as tar:
            small = tarfile.TarInfo("small.jpg")
            small.size = 3
            tar.addfile(small, io.BytesIO(b"abc"))
    plan = archive.plan([str(tmp_path / "a.tar")])
    assert [chunk.end - chunk.start for chunk in plan.chunks] == [512, 1024]
    big_tile, small_tile = read_all(plan)
    assert big_tile.error is not None
    assert big_tile.error.startswith("image file over the limit: ")
    assert small_tile == ("small", b"abc", None)


def test_a_tar_cut_anywhere_gives_every_tile_before_the_cut(tmp_path: Path) -> None:
    files = [("a.jpg", b"a" * 700), ("a.cls", b"1"), (f"{LONG}.jpg", b"b" * 512), ("c.png", b"c" * 10)]
    whole = write_tar(tmp_path / "whole.tar", files).read_bytes()
    found = scan_tar(io.BytesIO(whole)).members
    end = found[-1].end
    edges = {
        edge for member in found for edge in (member.start, member.offset, member.offset + member.size, member.end)
    }
    cuts = {cut for edge in edges for cut in (edge - 1, edge, edge + 1)} | {end + 512, end + 1023}
    for cut in sorted(cut for cut in cuts if 0 <= cut < end + 1024):
        tar = tmp_path / "cut.tar"
        tar.write_bytes(whole[:cut])
        plan = archive.plan([str(tar)], 2)
        tiles = read_all(plan)
        reachable = [member for member in found if member.offset <= cut and is_image_name(member.name)]
        assert [tile.tile_id for tile in tiles] == [member.name[:-4] for member in reachable], cut
        for tile, member in zip(tiles, reachable, strict=True):
            data = whole[member.offset : member.offset + member.size]
            assert tile.data == (data if member.offset + member.size <= cut else None), cut
            assert (tile.error or "").startswith("" if tile.data else "cut short")
        assert [bad.archive for bad in plan.bad] == [str(tar)], cut


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "empty"), (b"no tar at all" * 100, "not a tar"), (bytes(10240), "holds no images")]
)
def test_an_archive_without_tiles_is_named_with_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    good = write_tar(tmp_path / "b.tar", [("x.jpg", b"1")])
    plan = archive.plan([str(tmp_path / "a.tar"), str(good)])
    assert [bad.archive for bad in plan.bad] == [str(tmp_path / "a.tar")]
    assert reason in plan.bad[0].reason
    assert [chunk.archive for chunk in plan.chunks] == [str(good)]


def test_progress_counts_archives(tmp_path: Path) -> None:
    tars = [str(write_tar(tmp_path / f"{name}.tar", [("x.jpg", b"1")])) for name in "abc"]
    seen: list[tuple[str, int, int]] = []
    archive.plan(tars, progress=lambda *step: seen.append(step))
    assert seen == [("plan", 1, 3), ("plan", 2, 3), ("plan", 3, 3)]


@pytest.mark.parametrize(
    "change",
    [
        lambda tar: tar.unlink(),
        lambda tar: tar.write_bytes(tar.read_bytes() + b"more"),
        lambda tar: tar.write_bytes(bytes(tar.stat().st_size)),
    ],
    ids=["gone", "grown", "overwritten"],
)
def test_an_archive_changed_after_the_plan_is_refused_by_name(tmp_path: Path, change: object) -> None:
    tar = write_tar(tmp_path / "a.tar", [("x.jpg", b"1"), ("y.jpg", b"2")])
    (chunk,) = archive.plan([str(tar)]).chunks
    change(tar)  # type: ignore[operator]
    with pytest.raises(TilefleetError, match=r"a\.tar: (cannot be read|changed)"):
        archive.read_chunk(chunk)


def test_archives_are_found_as_files_in_folders_and_by_globs_each_once(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    names = ["a.tar", "B.TAR", "deep/er/c.tar"]
    for name in [*names, "notes.txt", "._a.tar"]:
        (tmp_path / name).write_bytes(b"")
    everything = sorted(str(tmp_path / name) for name in names)
    assert archive.list_archives([str(tmp_path)]) == everything
    assert archive.list_archives([f"{tmp_path}/**/*.tar", str(tmp_path / "B.TAR"), f"{tmp_path}/deep/../a.tar"]) == (
        everything
    )
    assert archive.list_archives([f"{tmp_path}/d*"]) == [str(tmp_path / "deep/er/c.tar")]


@pytest.mark.parametrize("location", ["nowhere.tar", "*.tar", ".", "notes.txt"])
def test_a_location_without_archives_is_named(tmp_path: Path, location: str) -> None:
    (tmp_path / "notes.txt").write_bytes(b"")
    with pytest.raises(UsageError, match=r"no such file|no \.tar archive"):
        archive.list_archives([f"{tmp_path}/{location}"])
    with pytest.raises(UsageError, match="no archive given"):
        archive.list_archives([])


def test_a_plan_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    plan = Plan([Chunk("000000", "/a/x.tar", 0, 2048, 2, 10240)], [BadArchive("/a/y.tar", "holds no images")])
    assert archive.read_plan(str(tmp_path)) is None
    archive.write_plan(str(tmp_path / "out"), plan, TERMS)
    assert archive.read_plan(str(tmp_path / "out")) == (plan, TERMS)


def test_a_damaged_plan_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / archive.PLAN).write_bytes(b"PAR1 and then nothing")
    with pytest.raises(TilefleetError, match=r"plan\.parquet: damaged"):
        archive.read_plan(str(tmp_path))


def test_terms_differ_only_in_what_was_asked_for() -> None:
    other = TERMS.model_copy(update={"engine": "torch-bf16", "threads": 4})
    assert TERMS.differences(other) == []
    assert TERMS.differences(other.model_copy(update={"batch_size": 9, "archives": ()})) == ["archives", "batch_size"]


def test_finished_chunks_are_known_from_names_alone(tmp_path: Path) -> None:
    assert archive.finished(str(tmp_path)) == set()
    (tmp_path / "predictions").mkdir()
    for name in ("part-000003.parquet", "part-000001.parquet", ".part-000002.parquet.x1.tmp"):
        (tmp_path / "predictions" / name).write_bytes(b"never opened")
    assert archive.finished(str(tmp_path)) == {"000001", "000003"}
