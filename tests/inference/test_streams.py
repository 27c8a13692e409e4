"""Compressed tars are read member by member; damage is named, and what came before it is tiles."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from inference import streams
from inference.readers import Tile, Tiles, read_chunk
from tests.archives import planned, tar_bytes
from training.encoded import MAX_ENCODED_BYTES

Pack = Callable[[bytes], bytes]
PACKERS: dict[str, Pack] = {
    "tar.gz": gzip.compress,
    "tar.bz2": bz2.compress,
    "tar.xz": lzma.compress,
    "tar.zst": lambda data: bytes(pa.compress(data, "zstd", asbytes=True)),
}
NOISE = np.random.default_rng(0).bytes(40000)
IMAGES = [("a/1.jpg", NOISE[:9000]), ("a/1.cls", b"1"), ("n" * 150 + ".PNG", NOISE[9000:9700]), ("3.tif", NOISE[9700:])]

every_format = pytest.mark.parametrize("ending", PACKERS)


def read(path: Path, data: bytes) -> tuple[list[Tile], str | None]:
    """Tiles and damage of an archive of one chunk."""
    path.write_bytes(data)
    plan = planned([path], path.parent / "out")
    (chunk,) = plan.chunks
    assert (chunk.kind, chunk.tiles, chunk.start, chunk.end, plan.bad) == ("stream", None, 0, len(data), [])
    tiles: Tiles = read_chunk(chunk)
    return list(tiles), tiles.damage


@every_format
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_compressed_tar_is_one_chunk_of_all_its_tiles(tmp_path: Path, ending: str, form: int) -> None:
    tiles, damage = read(tmp_path / f"a.{ending}", PACKERS[ending](tar_bytes(IMAGES, form)))
    assert tiles == [(name.rpartition(".")[0], data, None) for name, data in IMAGES if "cls" not in name]
    assert damage is None


@every_format
def test_the_content_decides_and_not_the_name(tmp_path: Path, ending: str) -> None:
    assert len(read(tmp_path / "a.tar", PACKERS[ending](tar_bytes(IMAGES)))[0]) == 3


@every_format
def test_parts_packed_one_by_one_are_one_stream(tmp_path: Path, ending: str) -> None:
    data, pack = tar_bytes(IMAGES), PACKERS[ending]
    tiles, damage = read(tmp_path / "a.tar", pack(data[:9999]) + pack(data[9999:]))
    assert len(tiles) == 3
    assert damage is None


@every_format
def test_a_stream_cut_anywhere_gives_what_came_before(tmp_path: Path, ending: str) -> None:
    whole = PACKERS[ending](tar_bytes(IMAGES))
    right, _ = read(tmp_path / "a.tar", whole)
    for length in range(8, len(whole), 1999):
        tiles, damage = read(tmp_path / "a.tar", whole[:length])
        assert damage, length
        assert [tile.tile_id for tile in tiles] == [tile.tile_id for tile in right[: len(tiles)]]
        for tile, one in zip(tiles, right, strict=False):
            assert tile in (one, (one.tile_id, None, "cut short inside its data"))


@pytest.mark.parametrize("ending", [ending for ending in PACKERS if ending != "tar.zst"])  # made without checksums here
def test_a_stream_with_a_flipped_byte_ends_and_never_gives_a_tile_without_saying_so(
    tmp_path: Path, ending: str
) -> None:
    whole = PACKERS[ending](tar_bytes(IMAGES))
    right, _ = read(tmp_path / "a.tar", whole)
    for place in range(9, len(whole), 1777):
        changed = bytearray(whole)
        changed[place] ^= 0x10
        tiles, damage = read(tmp_path / "a.tar", bytes(changed))
        assert damage or tiles == right, place


def test_a_stream_without_images_or_without_a_tar_is_damaged(tmp_path: Path) -> None:
    assert read(tmp_path / "a.tgz", gzip.compress(tar_bytes([("a.txt", b"1")]))) == ([], "holds no images")
    assert "not a tar" in str(read(tmp_path / "a.tgz", gzip.compress(b"no tar at all" * 100))[1])
    assert "decompresses" not in str(read(tmp_path / "a.tgz", gzip.compress(b""))[1])
    assert read(tmp_path / "a.tgz", gzip.compress(tar_bytes(IMAGES)[:-10240]))[1]


def test_an_image_over_the_limit_is_skipped_and_not_kept(tmp_path: Path) -> None:
    data = gzip.compress(tar_bytes([("big.jpg", bytes(MAX_ENCODED_BYTES + 1)), ("small.jpg", b"1")]), 1)
    tracemalloc.start()
    tiles, damage = read(tmp_path / "a.tgz", data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    over = f"image file over the limit: {MAX_ENCODED_BYTES + 1} bytes, {MAX_ENCODED_BYTES} allowed"
    assert (tiles, damage) == ([("big", None, over), ("small", b"1", None)], None)
    assert peak < 16 << 20


def test_a_bomb_ends_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_FREE_BYTES", 3 << 20)
    monkeypatch.setattr(streams, "MAX_RATIO", 10)
    bomb = gzip.compress(tar_bytes([("first.jpg", b"1"), ("zeros.bin", bytes(30 << 20)), ("last.jpg", b"2")]))
    tiles, damage = read(tmp_path / "a.tgz", bomb)
    assert [tile.tile_id for tile in tiles] == ["first"]
    assert "bomb" in str(damage)
