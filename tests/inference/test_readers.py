"""Chunks of files by name, and what happens where an archive is not as it was planned."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import TilefleetError
from inference.archive import list_archives
from inference.readers import read_chunk
from tests.archives import planned, tar_bytes, tiles_of, write_tar
from tests.inference.test_streams import PACKERS
from tests.inference.test_zips import zip_bytes
from tests.object_store import ObjectStore
from training.encoded import MAX_ENCODED_BYTES

IMAGES = [("x.jpg", b"1"), ("y.jpg", b"2"), ("z.jpg", b"3")]


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def test_a_folder_of_images_is_chunks_of_names(tmp_path: Path) -> None:
    folder = fill(tmp_path / "f", "b/2.jpg", "b/1.PNG", "a.b/1.jpeg", "c.tif", "d.txt", "b/.e.jpg", "__MACOSX/g.jpg")
    plan = planned([folder], tmp_path / "out", 2)
    assert [(chunk.kind, chunk.archive, chunk.members) for chunk in plan.chunks] == [
        ("files", str(folder), ("c.tif", "a.b/1.jpeg")),
        ("files", str(folder), ("b/1.PNG", "b/2.jpg")),
    ]
    assert [tile[:2] for tile in tiles_of([folder], tmp_path / "out", 3)] == [
        ("c", b"c.tif"),
        ("a.b/1", b"a.b/1.jpeg"),
        ("b/1", b"b/1.PNG"),
        ("b/2", b"b/2.jpg"),
    ]


def test_images_named_one_by_one_belong_to_their_folder(tmp_path: Path) -> None:
    folder = fill(tmp_path, "d/1.jpg", "d/2.jpg", "e/3.jpg", "d/not.txt")
    archives = list_archives([f"{folder}/*/*.jpg"])
    plan = planned(archives, tmp_path / "out", 5)
    assert [(chunk.archive, chunk.members) for chunk in plan.chunks] == [
        (f"{folder}/d", ("1.jpg", "2.jpg")),
        (f"{folder}/e", ("3.jpg",)),
    ]
    assert [tile[:2] for tile in tiles_of(archives, tmp_path / "out")] == [
        ("1", b"d/1.jpg"), ("2", b"d/2.jpg"), ("3", b"e/3.jpg")
    ]  # fmt: skip


def test_a_file_that_cannot_be_read_is_an_error_row(tmp_path: Path) -> None:
    folder = fill(tmp_path / "f", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg")
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jpg")).write_bytes(b"")
    (chunk,) = planned([folder], tmp_path / "out").chunks
    (folder / "2.jpg").unlink()
    (folder / "3.jpg").unlink()
    (folder / "3.jpg").mkdir()
    (folder / "4.jpg").unlink()
    os.mkfifo(folder / "4.jpg")
    os.truncate(folder / "5.jpg", MAX_ENCODED_BYTES + 1)
    tiles = list(read_chunk(chunk))
    assert [(tile.tile_id, tile.data) for tile in tiles] == [
        ("1", b"1.jpg"), ("2", None), ("3", None), ("4", None), ("5", None), ("caf\\xe9", None)
    ]  # fmt: skip
    assert [(tile.error or "").partition(":")[0] for tile in tiles] == [
        "", *["cannot be read"] * 3, "image file over the limit", "cannot be read"
    ]  # fmt: skip


@pytest.mark.parametrize("ending", ["txt", "csv", "parquet"])
def test_a_list_names_files_beside_it_or_anywhere(tmp_path: Path, ending: str) -> None:
    fill(tmp_path, "lists/in/a.jpg", "elsewhere/b.png")
    far = f"{tmp_path}/elsewhere/b.png"
    paths = ["in/a.jpg", far, f"file://{far}", "in/gone.jpg", "nosuch://x/y.jpg", "../elsewhere/b.png"]
    location = tmp_path / "lists" / f"list.{ending}"
    if ending == "txt":
        location.write_text("\ufeff" + "\r\n".join(paths) + "\n\n")
    elif ending == "csv":
        location.write_text("label,path\n" + "".join(f'water,"{path}"\n' for path in paths))
    else:
        pq.write_table(pa.table({"path": paths, "label": range(len(paths))}), location)
    assert list_archives([str(location)]) == [str(location)]
    tiles = tiles_of([location], tmp_path / "out", 2)
    assert [tile.tile_id for tile in tiles] == [path.rpartition(".")[0] for path in paths]
    content = b"elsewhere/b.png"
    assert [tile.data for tile in tiles] == [b"lists/in/a.jpg", content, content, None, None, content]
    assert all((tile.error or "").startswith("cannot be read: ") for tile in tiles if tile.data is None)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b"file,label\nx.jpg,1\n", "has no column path"),
        ("a.csv", b'path\n"x.jpg', "not a list of paths"),
        ("a.txt", b"\xff\xfe\x00", "not a list of paths"),
        ("a.txt", b"\n\n", "holds no images"),
        ("a.parquet", b"PAR1", "not a list of paths"),
    ],
)
def test_a_list_that_is_none_is_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    (bad,) = planned([tmp_path / name], tmp_path / "out").bad
    assert reason in bad.reason


def test_a_list_that_ends_in_damage_gives_what_came_before(tmp_path: Path) -> None:
    fill(tmp_path, "x.jpg")
    (tmp_path / "a.txt").write_bytes(b"x.jpg\n" * 5000 + b"\xff\xfe\n")
    plan = planned([tmp_path / "a.txt"], tmp_path / "out", 1500)
    assert "not a list of paths" in plan.bad[0].reason
    assert 3000 < plan.tiles <= 5000
    assert plan.chunks[-1].tiles not in (None, 1500)


@pytest.mark.parametrize("kind", ["tar", "zip", "tar.gz"])
@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes() + b"more"),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
    ],
    ids=["gone", "grown", "overwritten"],
)
def test_an_archive_changed_after_the_plan_is_refused_by_name(
    tmp_path: Path, kind: str, change: Callable[[Path], None]
) -> None:
    path = tmp_path / f"a.{kind}"
    tar = tar_bytes(IMAGES)
    path.write_bytes({"tar": tar, "zip": zip_bytes(IMAGES), "tar.gz": PACKERS["tar.gz"](tar)}[kind])
    (chunk,) = planned([path], tmp_path / "out").chunks
    change(path)
    with pytest.raises(TilefleetError, match=r"a\..*: (cannot be read|changed)"):
        list(read_chunk(chunk))


@pytest.mark.process
def test_archives_of_every_kind_on_object_storage(
    s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.fs as pafs

    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    local = fill(tmp_path / "in", "images/1.jpg", "images/deep/2.jpg")
    write_tar(local / "a.tar", IMAGES)
    (local / "b.zip").write_bytes(zip_bytes(IMAGES))
    (local / "c.tar.zst").write_bytes(PACKERS["tar.zst"](tar_bytes(IMAGES)))
    (local / "list.txt").write_text("images/1.jpg\nimages/gone.jpg\n")
    bucket = s3.make_bucket("archives")
    store = pafs.S3FileSystem(access_key="test", secret_key="test", endpoint_override=s3.env["AWS_ENDPOINT_URL"])
    pafs.copy_files(str(local), bucket.removeprefix("s3://"), destination_filesystem=store)
    archives = list_archives([bucket, f"{bucket}/list.txt"])
    assert archives == [bucket, *(f"{bucket}/{name}" for name in ("a.tar", "b.zip", "c.tar.zst", "list.txt"))]
    found = tiles_of(archives, tmp_path / "out", 2)
    three = [b"1", b"2", b"3"]
    images = [b"images/1.jpg", b"images/deep/2.jpg"]
    assert [tile.data for tile in found] == [*images, *three * 3, images[0], None]
    assert list_archives([f"{bucket}/*.zip"]) == [f"{bucket}/b.zip"]
    chunks = planned(archives, tmp_path / "out").chunks
    for chunk in chunks[1:]:
        s3.fail("GET", "images/1" if chunk.kind == "files" else chunk.archive.rpartition("/")[2], 99, "403")
        with pytest.raises(TilefleetError):
            list(read_chunk(chunk))
        if chunk.kind != "files":
            with pytest.raises(TilefleetError, match="mend it"):
                planned([archives[1], chunk.archive], tmp_path / "new")
            assert not (tmp_path / "new" / "plan.parquet").exists()
        s3.mend()
