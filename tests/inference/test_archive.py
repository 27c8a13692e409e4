"""Archives are found behind locations; a tar is planned into chunks that hold each tile once, and read back so."""

from __future__ import annotations

import io
import os
import tarfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UsageError
from inference import archive
from inference.scan import CHUNK_BYTES, is_tile_name, split
from tests.archives import planned, tiles_of, write_tar
from training.encoded import MAX_ENCODED_BYTES, is_image_name
from training.shards import Member, scan_tar

LONG = "nested/" * 30 + "a-name-over-one-hundred-characters-" * 4
MiB = 1 << 20


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
    ranges = list(split(members, members[-1].end + 1024 if members else 0, most))
    tiles = iter([member for member in members if is_image_name(member.name)])
    for found in ranges:
        held = [next(tiles) for _ in range(found.tiles or 0)]
        assert found.tiles is not None
        assert 1 <= found.tiles <= most
        assert found.start == held[0].start
        assert found.end == (held[-1].offset if held[-1].size > MAX_ENCODED_BYTES else held[-1].end)
        assert found.tiles == 1 or found.end - found.start <= CHUNK_BYTES
    assert next(tiles, None) is None
    assert all(before.end <= after.start for before, after in pairwise(ranges))


@settings(deadline=None)  # it writes files
@given(st.lists(st.binary(max_size=1500), min_size=1, max_size=12), st.integers(1, 5))
def test_chunks_give_back_the_bytes_of_every_tile(
    tmp_path_factory: pytest.TempPathFactory, images: list[bytes], most: int
) -> None:
    files = [(f"d/{number}.jpg", data) for number, data in enumerate(images)]
    folder = tmp_path_factory.mktemp("tars")
    tiles = tiles_of([write_tar(folder / "a.tar", files)], folder / "out", most)
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
    tar = write_tar(tmp_path / "a.tar", files, tar_format)
    assert [(tile.tile_id, tile.data) for tile in tiles_of([tar], tmp_path / "out", 1)] == [
        ("a/b/c/deep", b"1"),
        (long, b"2"),
        ("LOUD", b"3"),
        ("a/two.dots", b"4" * 513),
        (f"{long}2", b"5"),
    ]
    plan = planned([tar], tmp_path / "out", 2)
    assert plan.bad == []
    assert [chunk.id for chunk in plan.chunks] == ["00000000", "00000001", "00000002"]


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
    tiles = tiles_of([tmp_path / "a.tar"], tmp_path / "out", 2)
    assert [tile.tile_id for tile in tiles] == ["../up", "/absolute", "good", "link", "link"]
    assert [tile.data for tile in tiles] == [None, None, b"abc", None, None]
    assert ["link" in (tile.error or "") for tile in tiles] == [False, False, False, True, True]
    assert all(tile.error for tile in tiles if tile.data is None)


def test_a_name_that_is_not_text_is_kept_readable(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("caf\udce9.jpg", b"1")], tarfile.GNU_FORMAT)
    assert [tile.tile_id for tile in tiles_of([tar], tmp_path / "out")] == ["caf\\xe9"]


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
    plan = planned([tmp_path / "a.tar"], tmp_path / "out")
    assert [chunk.end - chunk.start for chunk in plan.chunks] == [512, 1024]
    big_tile, small_tile = tiles_of([tmp_path / "a.tar"], tmp_path / "out")
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
        plan = planned([tar], tmp_path / "out", 2)
        tiles = [tile for chunk in plan.chunks for tile in archive.read_chunk(chunk)]
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
    plan = planned([tmp_path / "a.tar", good], tmp_path / "out")
    assert [bad.archive for bad in plan.bad] == [str(tmp_path / "a.tar")]
    assert reason in plan.bad[0].reason
    assert [chunk.archive for chunk in plan.chunks] == [str(good)]


@given(
    st.text("aJ.P/_g-", max_size=12), st.sampled_from(["", ".jpg", ".JPEG", ".cls", "__MACOSX/a.jpg", "/.jpg", ".jpg/"])
)
def test_a_name_is_quickly_taken_for_an_image_as_it_slowly_is(start: str, ending: str) -> None:
    name = start + ending
    assert is_tile_name(name) == (is_image_name(name) and not name.endswith("/"))


def test_archives_are_found_as_files_in_folders_and_by_globs_each_once(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    names = ["a.tar", "B.TAR", "deep/er/c.tar", "d.zip", "deep/e.Tar.Gz", "f.tzst"]
    for name in [*names, "notes.txt", "._a.tar", "tiles.parquet", "g.gz"]:
        (tmp_path / name).write_bytes(b"")
    everything = sorted(str(tmp_path / name) for name in names)
    assert archive.list_archives([str(tmp_path)]) == everything
    assert archive.list_archives([f"{tmp_path}/**/*", str(tmp_path / "B.TAR"), f"{tmp_path}/deep/../a.tar"]) == (
        everything
    )
    assert archive.list_archives([f"{tmp_path}/de*"]) == [
        str(tmp_path / "deep/e.Tar.Gz"),
        str(tmp_path / "deep/er/c.tar"),
    ]


def test_a_folder_gives_the_archives_and_the_images_below_it(tmp_path: Path) -> None:
    (tmp_path / "both" / "deep").mkdir(parents=True)
    (tmp_path / "images" / ".hidden").mkdir(parents=True)
    for name in ("both/a.tar", "both/deep/x.jpg", "images/.hidden/y.jpg", "images/a.jpg", "images/labels.csv"):
        (tmp_path / name).write_bytes(b"")
    both, images = str(tmp_path / "both"), str(tmp_path / "images")
    assert archive.list_archives([str(tmp_path / "both")]) == [both, f"{both}/a.tar"]
    assert archive.list_archives([images, f"{images}/a.jpg", f"{images}/*.jpg"]) == [images]
    assert archive.list_archives([f"{tmp_path}/*", f"{both}/deep"]) == [both, f"{both}/a.tar", images]
    assert archive.list_archives([f"{images}/*.jpg"]) == [f"{images}/a.jpg"]
    assert archive.list_archives([f"{images}/*.csv"]) == [f"{images}/labels.csv"]


def test_a_pack_output_gives_its_shards(shards: Path) -> None:
    found = archive.list_archives([str(shards)])
    assert found == sorted(str(tar) for tar in shards.glob("*/*.tar"))


def test_a_folder_that_links_to_itself_is_searched_once(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "circle.tar").symlink_to(tmp_path / "circle.tar")
    assert archive.list_archives([str(tmp_path)]) == [str(tmp_path / "a.tar")]


@pytest.mark.parametrize("location", ["nowhere.tar", "*.zip", ".", "notes.md", "pipe.tar"])
def test_a_location_without_archives_is_named(tmp_path: Path, location: str) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "notes.md").write_bytes(b"")
    with pytest.raises(UsageError, match=r"no such file|no archive there"):
        archive.list_archives([f"{tmp_path}/{location}"])
    with pytest.raises(UsageError, match="no archive given"):
        archive.list_archives([])


def test_a_name_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.tar"
    Path(os.fsdecode(name)).write_bytes(b"")
    with pytest.raises(UsageError, match="not UTF-8"):
        archive.list_archives([str(tmp_path)])
