"""Storage: whole files or none, clear errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import storage
from configs.errors import TilefleetError, UsageError


def test_a_write_replaces_whole_files_and_leaves_nothing_beside(tmp_path: Path) -> None:
    target = storage.join(tmp_path, "a.txt")
    storage.write_bytes(target, b"one")
    storage.write_bytes(target, b"two")
    assert storage.read_bytes(target) == b"two"
    assert storage.list_files(tmp_path) == [target]


def test_reading_by_offset(tmp_path: Path) -> None:
    target = storage.join(tmp_path, "a")
    storage.write_bytes(target, b"0123456789")
    assert storage.read_bytes(target, 3, 4) == b"3456"
    assert storage.read_bytes(target, 8, 10) == b"89"
    assert storage.read_bytes(target, 99, 1) == b""


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    target = storage.join(tmp_path, "a")
    storage.write_bytes(target, b"old")
    with pytest.raises(TypeError):
        storage.write_bytes(target, "not bytes")  # type: ignore[arg-type]
    assert storage.read_bytes(target) == b"old"
    assert storage.list_files(tmp_path) == [target]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TilefleetError, match="cannot be written"):
        storage.make_dirs(tmp_path / "file" / "folder")


def test_an_unknown_scheme_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="nosuch://x"):
        storage.exists("nosuch://x/y")
