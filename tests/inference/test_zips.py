"""Zips are planned by slices of their directory and read back as the standard library reads them, or say why not."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference import scan
from inference.readers import Tile, read_chunk
from tests.archives import planned, tiles_of
from training.encoded import MAX_ENCODED_BYTES

IMAGES = [("a/1.jpg", b"one" * 300), ("a/1.txt", b"no image"), ("b/é.PNG", b"two"), ("b/3.tif", b"")]


class Unseekable(io.RawIOBase):
    """A pipe, into which zipfile writes data descriptors behind the data."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        self.data += bytes(data)  # type: ignore[call-overload]
        return len(bytes(data))  # type: ignore[call-overload]


def zip_bytes(
    files: Sequence[tuple[str | zipfile.ZipInfo, bytes]], method: int = zipfile.ZIP_DEFLATED, comment: bytes = b""
) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as out:
        for name, data in files:
            out.writestr(name, data, method)
        out.comment = comment
    return buffer.getvalue()


def tiles(data: bytes, tmp_path: Path, most: int = 2) -> list[Tile]:
    (tmp_path / "a.zip").write_bytes(data)
    return tiles_of([tmp_path / "a.zip"], tmp_path / "out", most)


def reason(data: bytes, tmp_path: Path) -> str:
    (tmp_path / "a.zip").write_bytes(data)
    bad = planned([tmp_path / "a.zip"], tmp_path / "out").bad
    return bad[0].reason if bad else ""


@settings(deadline=None)
@given(
    st.lists(st.binary(max_size=3000), min_size=1, max_size=12),
    st.integers(1, 5),
    st.booleans(),
    st.binary(max_size=40),
)
def test_chunks_give_back_the_bytes_of_every_tile(
    tmp_path_factory: pytest.TempPathFactory, images: list[bytes], most: int, deflated: bool, comment: bytes
) -> None:
    files = [(f"d/{number}.jpg", data) for number, data in enumerate(images)]
    method = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
    found = tiles(zip_bytes(files, method, comment), tmp_path_factory.mktemp("zips"), most)
    assert found == [(name[:-4], data, None) for name, data in files]


def test_a_zip_written_as_a_stream_and_one_with_long_fields_are_read(tmp_path: Path) -> None:
    pipe = Unseekable()
    long = io.BytesIO()
    with zipfile.ZipFile(pipe, "w") as out, zipfile.ZipFile(long, "w") as out64:  # type: ignore[arg-type]
        for name, data in IMAGES:
            out.writestr(name, data)
            with out64.open(name, "w", force_zip64=True) as member:
                member.write(data)
    for data in (bytes(pipe.data), long.getvalue()):
        assert [(tile.tile_id, tile.data) for tile in tiles(data, tmp_path)] == [
            ("a/1", b"one" * 300), ("b/é", b"two"), ("b/3", b"")
        ]  # fmt: skip
        assert reason(data, tmp_path) == ""


def test_a_directory_of_zip64_is_found(tmp_path: Path) -> None:
    data = zip_bytes(IMAGES)
    end = data.rindex(b"PK\5\6")
    count, length, start = struct.unpack_from("<10xHII", data, end)
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    short = struct.pack("<4sHHHHIIH", b"PK\5\6", 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    found = tiles(data[:end] + record + locator + short, tmp_path)
    assert found == tiles(data, tmp_path)
    assert "the end of its directory" in reason(data[:end] + bytes(56) + locator + short, tmp_path)


def test_entries_that_must_not_be_trusted_are_error_rows(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link.jpg")
    link.external_attr = 0o120777 << 16
    folder = zipfile.ZipInfo("folder.jpg/")
    files = [("../up.jpg", b"1"), ("/absolute.jpg", b"2"), (link, b"/etc/passwd"), (folder, b""), ("good.jpg", b"3")]
    encrypted = bytearray(zip_bytes([("e.jpg", b"secret")]))
    encrypted[encrypted.index(b"PK\1\2") + 8] |= 1
    found = tiles(zip_bytes(files), tmp_path) + tiles(bytes(encrypted), tmp_path)
    found += tiles(zip_bytes([("l.jpg", b"lzma")], zipfile.ZIP_LZMA), tmp_path)
    assert [(tile.tile_id, tile.data, tile.error) for tile in found] == [
        ("../up", None, "has a name that leaves the archive"),
        ("/absolute", None, "has an absolute name"),
        ("link", None, "is a link; links are not followed"),
        ("good", b"3", None),
        ("e", None, "is encrypted; decrypt the zip first"),
        ("l", None, "compression not supported: neither stored nor deflated"),
    ]


def test_the_same_name_twice_gives_two_tiles(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        data = zip_bytes([("a.jpg", b"1"), ("a.jpg", b"2"), ("a.png", b"3")])
    assert [tile[:2] for tile in tiles(data, tmp_path)] == [("a", b"1"), ("a", b"2"), ("a", b"3")]


def test_entries_in_any_order_of_their_data_are_read(tmp_path: Path) -> None:
    data = zip_bytes([(f"{number}.jpg", bytes([number]) * 2000) for number in range(9)], zipfile.ZIP_STORED)
    first, end = data.index(b"PK\1\2"), data.rindex(b"PK\5\6")
    rows = [b"PK\1\2" + row for row in data[first:end].split(b"PK\1\2")[1:]]
    shuffled = data[:first] + b"".join(rows[::-1]) + data[end:]
    assert [tile.data for tile in tiles(shuffled, tmp_path, 4)] == [
        bytes([number]) * 2000 for number in range(8, -1, -1)
    ]


@pytest.mark.parametrize("declared", [5, 70 << 20])
def test_a_bomb_is_an_error_row_and_takes_no_memory(tmp_path: Path, declared: int) -> None:
    packer = zlib.compressobj(9, wbits=-15)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(200)) + packer.flush()
    data = bytearray(zip_bytes([("bomb.jpg", packed)], zipfile.ZIP_STORED))
    row = data.rindex(b"PK\1\2")
    struct.pack_into("<H", data, row + 10, zipfile.ZIP_DEFLATED)
    struct.pack_into("<I", data, row + 24, declared)
    tracemalloc.start()
    (tile,) = tiles(bytes(data), tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tile.data is None
    assert peak < 8 << 20
    over = f"image file over the limit: {declared} bytes, {MAX_ENCODED_BYTES} allowed"
    assert tile.error == (over if declared > MAX_ENCODED_BYTES else "damaged in the zip")


def test_entries_that_share_their_data_are_planned_only_up_to_the_size_of_the_zip(tmp_path: Path) -> None:
    data = zip_bytes([("a.jpg", bytes(5000))], zipfile.ZIP_STORED)
    first, end = data.index(b"PK\1\2"), data.rindex(b"PK\5\6")
    row = data[first:end]
    count = 1000
    tail = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, count * len(row), first, 0)
    bomb = data[:first] + row * count + tail
    assert "share their data" in reason(bomb, tmp_path)
    assert tiles(bomb, tmp_path) == [("a", bytes(5000), None)]


def test_a_zip_cut_anywhere_is_named_and_never_read_wrongly(tmp_path: Path) -> None:
    data = zip_bytes(IMAGES, comment=b"a comment")
    for length in range(0, len(data), 3):
        assert reason(data[:length], tmp_path), length


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_zip_with_flipped_bytes_gives_right_bytes_or_reasons(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]
) -> None:
    changed = bytearray(zip_bytes([*IMAGES, ("long.jpg", bytes(range(256)))]))
    for place, value in flips:
        changed[place % len(changed)] = value
    folder = tmp_path_factory.getbasetemp() / "flipped"
    folder.mkdir(exist_ok=True)
    right = {zlib.crc32(data) for _, data in IMAGES} | {zlib.crc32(bytes(range(256)))}
    for tile in tiles(bytes(changed), folder):
        assert (tile.data is None) == (tile.error is not None)
        assert tile.data is None or len(flips) > 2 or zlib.crc32(tile.data) in right


def test_what_stands_before_a_zip_and_parts_of_one_are_named(tmp_path: Path) -> None:
    data = zip_bytes(IMAGES)
    assert "stands before the zip" in reason(b"#!/bin/sh\n" + data, tmp_path)
    part = bytearray(data)
    part[data.rindex(b"PK\5\6") + 4] = 1
    assert "several parts" in reason(bytes(part), tmp_path)
    assert reason(zip_bytes([]), tmp_path) == "holds no images; there is nothing to classify"
    assert reason(zip_bytes([("a.txt", b"x")]), tmp_path).startswith("holds no images")


def test_a_chunk_is_one_run_of_the_directory_and_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "CHUNK_BYTES", 5000)
    (tmp_path / "a.zip").write_bytes(zip_bytes([(f"{n}.jpg", bytes(2000)) for n in range(5)], zipfile.ZIP_STORED))
    plan = planned([tmp_path / "a.zip"], tmp_path / "out")
    assert [chunk.tiles for chunk in plan.chunks] == [2, 2, 1]
    assert [len(list(read_chunk(chunk))) for chunk in plan.chunks] == [2, 2, 1]
