"""Storage, on a disk and on S3 alike: whole files or none, clear errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import records, storage
from configs.errors import TilefleetError, UsageError


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.process)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder or bucket."""
    return str(tmp_path if request.param == "disk" else request.getfixturevalue("bucket"))


def test_a_write_replaces_whole_files_and_leaves_nothing_beside(place: str) -> None:
    target = storage.join(place, "folder", "a.txt")
    storage.write_bytes(target, b"one")
    storage.write_bytes(target, b"two")
    assert storage.read_bytes(target) == b"two"
    assert storage.size(target) == 3
    assert storage.list_files(place, recursive=True) == [target]


def test_reading_by_offset(place: str) -> None:
    target = storage.join(place, "a")
    storage.write_bytes(target, b"0123456789")
    assert storage.read_bytes(target, 3, 4) == b"3456"
    assert storage.read_bytes(target, 8, 10) == b"89"
    assert storage.read_bytes(target, 99, 1) == b""
    with storage.open_input(target) as stream:
        stream.seek(7)
        assert stream.read() == b"789"


def test_a_failed_write_keeps_the_old_file(place: str) -> None:
    target = storage.join(place, "a")
    storage.write_bytes(target, b"old")
    with pytest.raises(TypeError):
        storage.write_bytes(target, "not bytes")  # type: ignore[arg-type]
    assert storage.read_bytes(target) == b"old"
    assert storage.list_files(place) == [target]


def test_what_is_missing_is_missing(place: str) -> None:
    target = storage.join(place, "no", "thing")
    assert not storage.exists(target)
    assert not storage.is_dir(target)
    assert storage.list_files(target) == []
    for read in (storage.read_bytes, storage.size, storage.open_input):
        with pytest.raises(FileNotFoundError):
            read(target)
    storage.remove(target)
    storage.remove_tree(target)
    assert not storage.exists(target)
    assert records.read_status(target) is None


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TilefleetError, match="cannot be written"):
        storage.make_dirs(tmp_path / "file" / "folder")


def test_an_unknown_scheme_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="nosuch://x"):
        storage.exists("nosuch://x/y")


def test_a_file_written_as_a_stream_is_seen_whole_or_not_at_all(place: str) -> None:
    target = storage.join(place, "folder", "a")
    with storage.writing(target) as file:
        file.write(b"one")
        assert not storage.exists(target)
        file.write(b"two")
    assert storage.read_bytes(target) == b"onetwo"
    with pytest.raises(TypeError), storage.writing(target) as file:
        file.writelines([b"three", "not bytes"])  # type: ignore[list-item]
    assert storage.read_bytes(target) == b"onetwo"
    assert storage.list_files(place, recursive=True) == [target]
