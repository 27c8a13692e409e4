"""Damage of any kind to archives that nobody packed here is found and named; whole ones pass, whatever they are."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest

from configs.errors import UsageError
from inference.check import find_problems
from tests.archives import jpeg, tar_bytes, tile_files, write_tar


def lines(location: Path) -> list[str]:
    return [str(problem).removeprefix(f"{location}: ") for problem in find_problems(str(location))]


def member(name: str, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_whole_tar_passes_in_every_format(tmp_path: Path, form: int) -> None:
    long = f"{'d' * 90}/{'é' * 40}.jpg" if form != tarfile.USTAR_FORMAT else "e.jpg"
    files = [*tile_files(3), ("t/0.cls", b"0"), (long, jpeg(3))]
    assert lines(write_tar(tmp_path / "a.tar", files, form)) == []


def test_a_shard_set_is_held_against_its_index(shards: Path, tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []
    assert list(find_problems(str(shards), lambda *what: said.append(what))) == []
    assert list(find_problems(str(shards / "train"), lambda *what: said.append(what))) == []
    tars = len(list((shards / "train").iterdir()))
    assert said == [("verify", number, tars) for number in range(1, tars + 1)]
    (tmp_path / ".packing").touch()
    assert "stopped before its end" in lines(tmp_path)[0]


@pytest.mark.parametrize("kind", ["a.tar", "a.zip", "a.tar.gz", "a.tar.zst", "folder", "list.txt"])
def test_images_that_cannot_be_decoded_are_named_wherever_they_lie(tmp_path: Path, kind: str) -> None:
    files = [*tile_files(5), ("t/cut.jpg", jpeg(3)[:200]), ("t/empty.png", b"")]
    place = tmp_path / kind
    if kind == "a.zip":
        with zipfile.ZipFile(place, "w") as archive:
            for name, data in files:
                archive.writestr(name, data)
    elif kind.startswith("a.tar"):
        data = tar_bytes(files)
        packed = {"a.tar": lambda: data, "a.tar.gz": lambda: gzip.compress(data)}
        place.write_bytes(packed.get(kind, lambda: pa.compress(data, "zstd", asbytes=True))())
    else:
        (tmp_path / "folder" / "t").mkdir(parents=True)
        for name, data in files:
            (tmp_path / "folder" / name).write_bytes(data)
        (tmp_path / "list.txt").write_text("".join(f"folder/{name}\n" for name, _ in files))
    found = [line.removeprefix("folder/") for line in lines(place)]
    assert found == ["t/cut: image is cut short or damaged", "t/empty: empty file"]


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (member("../x.jpg"), "leaves the archive"),
        (member("a/../../x.jpg"), "leaves the archive"),
        (member("/etc/x.jpg"), "absolute name"),
        (member("x.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is a link"),
        (member("x.jpg", type=tarfile.LNKTYPE, linkname="a/1.jpg"), "is a link"),
        (member("x.jpg", type=tarfile.FIFOTYPE), "not a regular file"),
        (member("x.jpg", type=tarfile.CHRTYPE), "not a regular file"),
    ],
)
def test_members_that_must_not_be_trusted_are_named(tmp_path: Path, info: tarfile.TarInfo, reason: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in tile_files(2):
            image = member(name, size=len(data))
            archive.addfile(image, io.BytesIO(data))
        archive.addfile(info)
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    [found] = lines(tmp_path / "a.tar")
    assert found.startswith(info.name.removesuffix(".jpg") + ": ")
    assert reason in found


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "archive is empty"),
        (b"no tar" * 500, "not a tar archive"),
        (tar_bytes([("a.txt", b"x")]), "holds no images"),
        (gzip.compress(tar_bytes([("a.txt", b"x")])), "holds no images"),
        (tar_bytes(tile_files(3))[:3000], "cut short"),
        (gzip.compress(tar_bytes(tile_files(30)))[:9000], "cut short"),
    ],
    ids=["empty", "no tar", "no image", "no image, packed", "cut", "cut, packed"],  # the bytes hold the time
)
def test_archives_that_are_not_whole_are_named(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    assert reason in lines(tmp_path / "a.tar")[-1]


def test_a_folder_is_checked_archive_by_archive(tmp_path: Path) -> None:
    write_tar(tmp_path / "good.tar", tile_files(2))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "bad.tar").write_bytes(tar_bytes(tile_files(2))[:1000])
    (tmp_path / "deep" / "bad.zip").write_bytes(b"PK\3\4 and no more")
    found = {problem.location for problem in find_problems(str(tmp_path))}
    assert found == {str(tmp_path / "deep" / "bad.tar"), str(tmp_path / "deep" / "bad.zip")}


def test_a_place_without_archives_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        list(find_problems(str(tmp_path / "nothing")))
    with pytest.raises(UsageError, match="no archive there"):
        list(find_problems(str(tmp_path)))
