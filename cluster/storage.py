"""Local paths and object storage alike: open, list, write atomically, retry.

Everything that lies on disk goes through here. A location is a local path or a URI that ``pyarrow.fs`` opens
(``s3://bucket/key``, ``gs://...``). A write is seen whole or not at all: locally by a temporary file that is renamed,
on object storage because a put is atomic there. Keys, region and endpoint of S3 come from where AWS's own tools take
them; ``AWS_ENDPOINT_URL`` names a store that is not Amazon's, and must be set on every host.

What fails for a passing reason is tried again by the store's own client, which knows what passes (a refused key does
not) and covers every request of a stream; there is no second layer of tries here to multiply that.
"""

from __future__ import annotations

import errno
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pyarrow.fs as pafs

from configs.errors import TilefleetError, UsageError

ATTEMPTS = 5
"""Tries of a request to S3 before its error is the user's, a little later each time: some ten seconds in all."""


DISK_PAUSE = 2.0
"""Seconds between two tries of a write to a full disk."""


class StoreError(TilefleetError, OSError):
    """Object storage that does not do its part, in one line; an ``OSError`` too, as a disk's would be."""


class DiskFullError(TilefleetError):
    """No room on the disk, or in the quota."""


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
    with _remote(location) as (fs, path):
        return bool(fs.get_file_info(path).type != pafs.FileType.NotFound)


def is_dir(location: str | Path) -> bool:
    """Whether ``location`` is a folder (on object storage: a prefix that holds something)."""
    if not is_uri(location):
        return _local(location).is_dir()
    with _remote(location) as (fs, path):
        return bool(fs.get_file_info(path).type == pafs.FileType.Directory)


def list_files(location: str | Path, *, recursive: bool = False) -> list[str]:
    """Files below a folder as full locations, sorted by name; empty where there is no such folder."""
    if not is_uri(location):
        root = _local(location)
        found = root.rglob("*") if recursive else root.glob("*")
        return sorted(str(p) for p in found if p.is_file())
    scheme = str(location).split("://", 1)[0]
    with _remote(location) as (fs, path):
        infos = fs.get_file_info(pafs.FileSelector(path, recursive=recursive, allow_not_found=True))
    return sorted(f"{scheme}://{i.path}" for i in infos if i.type == pafs.FileType.File)


def size(location: str | Path) -> int:
    """Size of a file in bytes."""
    if not is_uri(location):
        return _local(location).stat().st_size
    with _remote(location) as (fs, path):
        info = fs.get_file_info(path)
    if info.type != pafs.FileType.File:
        raise FileNotFoundError(errno.ENOENT, "no such file", str(location))
    return int(info.size)


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
    with _remote(location) as (fs, path):
        while True:
            with fs.open_input_file(path) as file:
                file.seek(min(offset, file.size()))
                data, version = bytes(file.read(length)), file.metadata()
            if length is not None:
                return data
            # The size was asked for before the bytes: of a file that was replaced in between they are a part.
            with fs.open_input_file(path) as file:
                if file.metadata() == version:
                    return data


def open_input(location: str | Path) -> IO[bytes]:
    """A seekable binary stream over a file; the caller closes it."""
    if not is_uri(location):
        return _local(location).open("rb")
    with _remote(location) as (fs, path):
        stream: IO[bytes] = fs.open_input_file(path)
    return stream


def write_bytes(location: str | Path, data: bytes) -> None:
    """Write a whole file, and the folders above it, so that a reader sees the old one or the new one, never a part.

    Raises :class:`TilefleetError` where the disk is full or the place cannot be written.
    """
    if is_uri(location):
        memoryview(data)  # what is not bytes is refused before a stream is open, whose end would make an empty file
        with _remote(location) as (fs, path), fs.open_output_stream(path) as stream:
            stream.write(data)
        return
    with writing(location) as file:
        file.write(data)


@contextmanager
def writing(location: str | Path) -> Iterator[IO[bytes]]:
    """A stream whose bytes make a file as :func:`write_bytes` does: whole behind the block, not at all if it raises.

    For object storage they are kept in a local temporary file until then.
    """
    if is_uri(location):
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            with _remote(location) as (fs, path), fs.open_output_stream(path) as stream:
                shutil.copyfileobj(file, stream, 8 << 20)
        return
    target = _local(location)
    with clear_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o666 & ~_UMASK)
            Path(temporary).replace(target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def write_patiently(location: str | Path, data: bytes, patience: float) -> None:
    """As :func:`write_bytes`; a full disk is waited for, up to ``patience`` seconds, since room is often made soon."""
    last = time.monotonic() + patience
    while True:
        try:
            return write_bytes(location, data)
        except DiskFullError:
            if time.monotonic() + DISK_PAUSE > last:
                raise
            time.sleep(DISK_PAUSE)


def remove(location: str | Path) -> None:
    """Delete a file; nothing to do where there is none."""
    if not is_uri(location):
        _local(location).unlink(missing_ok=True)
        return
    with _remote(location) as (fs, path), suppress(FileNotFoundError):
        fs.delete_file(path)


def remove_tree(location: str | Path) -> None:
    """Delete a folder with all that is in it; nothing to do where there is none."""
    if not is_uri(location):
        shutil.rmtree(_local(location), ignore_errors=True)
        return
    with _remote(location) as (fs, path), suppress(FileNotFoundError):
        fs.delete_dir(path)


@contextmanager
def clear_errors(location: str | Path) -> Iterator[None]:
    """Turn an ``OSError`` about a full disk or a closed place into one line that names it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"{location}: the disk is full; free some space and run the same command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise TilefleetError(f"{location}: cannot be written ({error.strerror})") from error
        raise


def _local(location: str | Path) -> Path:
    text = str(location)
    return Path(text.removeprefix("file://"))


def filesystem(location: str | Path) -> tuple[Any, str]:
    """``location`` as libraries take it that know ``pyarrow.fs``: a file system and a path in it.

    Raises :class:`UsageError` for a URI that cannot be opened.
    """
    if not is_uri(location):
        return pafs.LocalFileSystem(), str(_local(location))
    scheme, _, path = str(location).partition("://")
    try:
        if scheme == "s3":
            return _s3(path.partition("/")[0], _endpoint()), path
        fs, path = pafs.FileSystem.from_uri(str(location))
    except Exception as error:  # pyarrow raises its own and built-in types alike here
        raise UsageError(f"{location}: not a location that can be opened ({error})") from error
    return fs, path


@contextmanager
def _remote(location: str | Path) -> Iterator[tuple[Any, str]]:
    """The file system of a URI and the path in it; what fails in the block is one line that names it.

    Raises :class:`StoreError` for a store that does not do its part; a missing file stays ``FileNotFoundError``.
    """
    fs, path = filesystem(location)
    try:
        yield fs, path
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = " ".join(str(error).split())
        raise StoreError(
            f"{location}: {reason}; what is finished is kept: mend it and run the same command again"
        ) from error


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


@functools.cache  # a client holds its connections: making one anew for each call would open new ones each time
def _s3(bucket: str, endpoint: str | None) -> Any:
    known = endpoint or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return pafs.S3FileSystem(
        endpoint_override=endpoint,
        region=None if known else pafs.resolve_s3_region(bucket),
        allow_delayed_open=True,  # one request for a small file instead of the three of an upload in parts
        connect_timeout=10,
        request_timeout=30,  # without a byte; the default of 3 s is what a busy store takes
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    )


_UMASK = os.umask(0)
os.umask(_UMASK)
