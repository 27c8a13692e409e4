"""Local paths and object storage alike: open, list, write atomically, retry.

Everything that lies on disk goes through here. A location is a local path or a URI that ``pyarrow.fs`` opens
(``s3://bucket/key``, ``gs://...``). A write is seen whole or not at all: locally by a temporary file that is renamed,
on object storage because a put is atomic there.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import pyarrow.fs as pafs

from configs.errors import TilefleetError, UsageError

T = TypeVar("T")

ATTEMPTS = 5
"""Tries of a remote operation before its error is the user's."""


def is_uri(location: str | Path) -> bool:
    """Whether ``location`` names object storage rather than a local path."""
    return "://" in str(location) and not str(location).startswith("file://")


def join(location: str | Path, *parts: str) -> str:
    """``location`` with ``parts`` below it, as a string that every function here takes."""
    return "/".join([str(location).rstrip("/"), *parts])


def absolute(location: str | Path) -> str:
    """``location`` as every process of a job can open it, whatever folder it works in."""
    return str(location) if is_uri(location) else str(_local(location).resolve())


def exists(location: str | Path) -> bool:
    """Whether a file or folder stands at ``location``."""
    if not is_uri(location):
        return _local(location).exists()
    fs, path = _remote(location)
    return bool(_retry(lambda: fs.get_file_info(path)).type != pafs.FileType.NotFound)


def is_dir(location: str | Path) -> bool:
    """Whether ``location`` is a folder (on object storage: a prefix that holds something)."""
    if not is_uri(location):
        return _local(location).is_dir()
    fs, path = _remote(location)
    return bool(_retry(lambda: fs.get_file_info(path)).type == pafs.FileType.Directory)


def list_files(location: str | Path, *, recursive: bool = False) -> list[str]:
    """Files below a folder as full locations, sorted by name; empty where there is no such folder."""
    if not is_uri(location):
        root = _local(location)
        found = root.rglob("*") if recursive else root.glob("*")
        return sorted(str(p) for p in found if p.is_file())
    fs, path = _remote(location)
    scheme = str(location).split("://", 1)[0]
    selector = pafs.FileSelector(path, recursive=recursive, allow_not_found=True)
    infos = _retry(lambda: fs.get_file_info(selector))
    return sorted(f"{scheme}://{i.path}" for i in infos if i.type == pafs.FileType.File)


def size(location: str | Path) -> int:
    """Size of a file in bytes."""
    if not is_uri(location):
        return _local(location).stat().st_size
    fs, path = _remote(location)
    return int(_retry(lambda: fs.get_file_info(path)).size)


def make_dirs(location: str | Path) -> None:
    """Make a folder and those above it; nothing to do on object storage."""
    if not is_uri(location):
        with clear_errors(location):
            _local(location).mkdir(parents=True, exist_ok=True)


def read_bytes(location: str | Path, offset: int = 0, length: int | None = None) -> bytes:
    """A file's bytes, or ``length`` of them from ``offset``; fewer where the file ends before."""
    if not is_uri(location):
        with _local(location).open("rb") as file:
            file.seek(offset)
            return file.read(-1 if length is None else length)
    fs, path = _remote(location)

    def read() -> bytes:
        with fs.open_input_file(path) as file:
            file.seek(min(offset, file.size()))
            return bytes(file.read(length))

    return _retry(read)


def open_input(location: str | Path) -> IO[bytes]:
    """A seekable binary stream over a file; the caller closes it."""
    if not is_uri(location):
        return _local(location).open("rb")
    fs, path = _remote(location)
    stream: IO[bytes] = _retry(lambda: fs.open_input_file(path))
    return stream


def write_bytes(location: str | Path, data: bytes) -> None:
    """Write a whole file, and the folders above it, so that a reader sees the old one or the new one, never a part.

    Raises :class:`TilefleetError` where the disk is full or the place cannot be written.
    """
    if is_uri(location):
        fs, path = _remote(location)

        def put() -> None:
            with fs.open_output_stream(path) as stream:
                stream.write(data)

        _retry(put)
        return
    target = _local(location)
    with clear_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o666 & ~_UMASK)
            Path(temporary).replace(target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def remove(location: str | Path) -> None:
    """Delete a file; nothing to do where there is none."""
    if not is_uri(location):
        _local(location).unlink(missing_ok=True)
        return
    fs, path = _remote(location)
    if exists(location):
        _retry(lambda: fs.delete_file(path))


def remove_tree(location: str | Path) -> None:
    """Delete a folder with all that is in it; nothing to do where there is none."""
    if not is_uri(location):
        shutil.rmtree(_local(location), ignore_errors=True)
        return
    fs, path = _remote(location)
    if exists(location):
        _retry(lambda: fs.delete_dir(path))


@contextmanager
def clear_errors(location: str | Path) -> Iterator[None]:
    """Turn an ``OSError`` about a full disk or a closed place into one line that names it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TilefleetError(
                f"{location}: the disk is full; free some space and run the same command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise TilefleetError(f"{location}: cannot be written ({error.strerror})") from error
        raise


def _local(location: str | Path) -> Path:
    text = str(location)
    return Path(text.removeprefix("file://"))


def _remote(location: str | Path) -> tuple[Any, str]:
    try:
        fs, path = pafs.FileSystem.from_uri(str(location))
    except Exception as error:  # pyarrow raises its own and built-in types alike here
        raise UsageError(f"{location}: not a location that can be opened ({error})") from error
    return fs, path


def _retry(operation: Callable[[], T]) -> T:
    """Run a remote operation again, a little later each time, while it fails for a passing reason."""
    for delay in _delays():
        try:
            return operation()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(delay)
    return operation()


def _delays() -> Iterator[float]:
    for attempt in range(ATTEMPTS - 1):
        yield 0.2 * 2**attempt


_UMASK = os.umask(0)
os.umask(_UMASK)
