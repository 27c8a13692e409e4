"""Damage of any kind to a shard set, and to tars of any origin, is found and named; whole ones pass."""

from __future__ import annotations

import io
import json
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from configs.errors import TilefleetError, UsageError
from training.pack import pack
from training.shards import Index, TileReader, fingerprint, load_index, load_tiles, save_index, scan_tar, verify


def picture(number: int, side: int = 12) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set of 20 tiles in several shards; tests damage copies of it."""
    root = tmp_path_factory.mktemp("whole")
    for number in range(20):
        path = root / "tiles" / ("Crop", "Water")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    pack(str(root / "tiles"), str(root / "set"), tiles_per_shard=6)
    return root / "set"


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "set"))


def lines(location: Path) -> str:
    return "\n".join(str(problem) for problem in verify(location))


def shard(root: Path) -> Path:
    return root / "train" / "shard-000001.tar"


def test_a_whole_set_has_no_problem_however_it_is_named(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(whole.parent)
    for name in (str(whole), "set", "./set", "set/", "../" + whole.parent.name + "/set"):
        assert verify(name) == []


def test_a_shard_cut_at_any_place_is_found(whole: Path, damaged: Path) -> None:
    data = shard(whole).read_bytes()
    with shard(whole).open("rb") as stream:
        edges = {place for m in scan_tar(stream).members for place in (m.start, m.offset, m.offset + m.size, m.end)}
    for length in sorted({place for edge in edges for place in (edge - 1, edge, edge + 1) if 0 <= place < len(data)}):
        shard(damaged).write_bytes(data[:length])
        problems = verify(damaged)
        assert [problem.location for problem in problems] == [str(shard(damaged))]
        assert f"{length} bytes, {len(data)} were packed" in problems[0].what


def test_a_changed_byte_anywhere_in_a_shard_is_found(whole: Path, damaged: Path) -> None:
    data = shard(whole).read_bytes()
    for place in range(0, len(data), 211):
        changed = bytearray(data)
        changed[place] ^= 1
        shard(damaged).write_bytes(changed)
        assert "shard-000001.tar: its bytes changed" in lines(damaged)


def test_a_missing_and_an_extra_shard_are_named(damaged: Path) -> None:
    shard(damaged).rename(damaged / "val" / "shard-000009.tar")
    found = lines(damaged)
    assert "train/shard-000001.tar: missing" in found
    assert "val/shard-000009.tar: extra shard" in found


@pytest.mark.parametrize("name", ["tiles.parquet", "index.json"])
def test_a_changed_or_cut_table_or_index_is_found_or_means_the_same(whole: Path, damaged: Path, name: str) -> None:
    data = (whole / name).read_bytes()
    for place in range(0, len(data), max(1, len(data) // 150)):
        for changed in (data[:place], data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]):
            (damaged / name).write_bytes(changed)
            assert verify(damaged) or (name == "index.json" and load_index(damaged) == load_index(whole))


@pytest.mark.parametrize(
    "change",
    [
        {"classes": ["Water", "Crop"]},
        {"mean": [0.5, 0.5, 0.5]},
        {"tile_size": 64},
        {"splits": {"train": []}},
        {"packed": {}},
    ],
)
def test_an_index_that_was_edited_is_refused(damaged: Path, change: dict[str, object]) -> None:
    edited = load_index(damaged).model_copy(update=change)
    (damaged / "index.json").write_text(edited.model_dump_json())
    assert "changed since it was packed" in lines(damaged)
    with pytest.raises(TilefleetError, match="changed since it was packed"):
        load_index(damaged)


def test_an_index_of_another_version_is_refused(damaged: Path) -> None:
    old = load_index(damaged).model_dump(mode="json", exclude={"bands"}) | {"version": 1}
    (damaged / "index.json").write_text(json.dumps(old))
    with pytest.raises(TilefleetError, match="a shard set of version 1, this is for version 2; pack again"):
        load_index(damaged)


def with_index(root: Path, change: Callable[[Index], None]) -> None:
    """An index that is wrong but consistent with its own digest."""
    index = load_index(root)
    change(index)
    save_index(root, index)


def test_an_index_that_disagrees_with_the_files_is_found(whole: Path, tmp_path: Path) -> None:
    def drop(index: Index) -> None:
        index.splits["train"].pop()

    def count(index: Index) -> None:
        index.splits["train"][0].tiles += 1

    def shrink(index: Index) -> None:
        index.classes.pop()

    for number, (change, expected) in enumerate([(drop, "extra shard"), (count, "listed in"), (shrink, "disagrees")]):
        copy = Path(shutil.copytree(whole, tmp_path / str(number)))
        with_index(copy, change)
        assert expected in lines(copy)


def test_a_table_that_disagrees_with_its_shards_is_found(damaged: Path) -> None:
    import hashlib

    import pyarrow as pa

    rows = load_tiles(damaged).to_pylist()
    rows[0]["offset"] += 1
    pq.write_table(pa.Table.from_pylist(rows, schema=load_tiles(damaged).schema), damaged / "tiles.parquet")
    digest = hashlib.sha256((damaged / "tiles.parquet").read_bytes()).hexdigest()
    with_index(damaged, lambda index: setattr(index, "tiles_sha256", digest))
    assert f"disagrees about tile {rows[0]['tile_id']}" in lines(damaged)


@pytest.mark.parametrize("name", ["tiles.parquet", "index.json"])
def test_a_missing_table_or_index_is_named(damaged: Path, name: str) -> None:
    (damaged / name).unlink()
    if name == "tiles.parquet":
        assert "tiles.parquet: missing" in lines(damaged)
    with pytest.raises(TilefleetError, match=name):
        load_tiles(damaged)


def test_a_place_without_shards_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such shard set"):
        load_index(tmp_path / "nothing")
    assert "no such shard set" in lines(tmp_path / "nothing")


def test_a_reader_gives_tiles_by_position_and_refuses_changed_ones(damaged: Path) -> None:
    reader = TileReader(damaged, "train")
    assert reader.read([3, 0]) == [reader.read([3])[0], reader.read([0])[0]]
    assert reader.labels.tolist() == load_tiles(damaged, "train")["label"].to_pylist()
    first = load_tiles(damaged, "train").slice(0, 1).to_pylist()[0]
    path = damaged / first["shard"]
    data = bytearray(path.read_bytes())
    data[first["offset"]] ^= 1
    path.write_bytes(data)
    with pytest.raises(TilefleetError, match=f"{first['tile_id']} changed since it was packed"):
        reader.read([0])
    path.unlink()
    with pytest.raises(TilefleetError, match="shard is missing"):
        reader.read([0])


def test_a_fingerprint_is_that_of_the_content(whole: Path, damaged: Path) -> None:
    assert fingerprint(whole) == fingerprint(damaged)
    with_index(damaged, lambda index: index.packed.update(seed=1))
    assert fingerprint(whole) != fingerprint(damaged)


def member(name: str, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def tar(*members: tuple[tarfile.TarInfo | str, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for info, data in members:
            info = tarfile.TarInfo(info) if isinstance(info, str) else info
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


IMAGES = [("a/1.jpg", picture(1)), ("a/1.cls", b"0"), ("a/2.jpg", picture(2))]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_foreign_tar_cut_at_any_byte_is_found(form: int) -> None:
    data = tar(*IMAGES, ("x" * 120 + ".jpg" if form != tarfile.USTAR_FORMAT else "x.jpg", picture(3)), form=form)
    ends = len(data.rstrip(b"\0"))
    needed = -(-ends // 512) * 512 + 1024  # the last data block and the end mark
    assert scan_tar(io.BytesIO(data[:needed])).damage is None
    for length in range(needed):
        assert scan_tar(io.BytesIO(data[:length])).damage, f"cut at {length}"


def test_a_damaged_header_is_found_wherever_it_is() -> None:
    data = tar(*IMAGES)
    for header in (m.start for m in scan_tar(io.BytesIO(data)).members):
        changed = bytearray(data)
        changed[header + 10] ^= 1
        assert scan_tar(io.BytesIO(changed)).damage


def test_a_hole_of_zeros_is_not_taken_for_the_end() -> None:
    data = bytearray(tar(*IMAGES))
    start = scan_tar(io.BytesIO(data)).members[1].start
    data[start : start + 1024] = bytes(1024)
    scan = scan_tar(io.BytesIO(data))
    assert [m.name for m in scan.members] == ["a/1.jpg"]
    assert scan.damage == f"holds data after its end mark at byte {start}, which readers never reach"


@pytest.mark.parametrize("size", [-512, -(1 << 40)])
def test_a_header_that_leads_back_is_not_followed_for_ever(size: int) -> None:
    header = bytearray(tar(*IMAGES)[:512])
    header[124:136] = struct.pack(">Bxxxq", 0xFF, size).replace(b"\0\0\0", b"\xff\xff\xff", 1)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    assert scan_tar(io.BytesIO(bytes(header) + tar(*IMAGES))).damage


def test_headers_stacked_on_headers_are_damage_not_a_crash() -> None:
    name = member("././@LongLink", type=tarfile.GNUTYPE_LONGNAME)
    stacked = tar(*[(name, b"x")] * 3000, form=tarfile.GNU_FORMAT)
    assert "damage" in str(scan_tar(io.BytesIO(stacked)).damage)
