"""Compressed files as streams of what they decompress to: forward only, in bounded memory, with a limit on the whole.

In goes the location of a gzip, bzip2, xz or zstd file, out comes a stream that :class:`training.tars.TarWalk` takes.
"""

from __future__ import annotations

import io
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import pyarrow as pa

from cluster import storage

MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""The first bytes of each format."""

MAX_RATIO = 1000
MAX_FREE_BYTES = 1 << 30
"""A file may decompress to this many bytes, or to :data:`MAX_RATIO` times its size where that is more."""

_BLOCK = 1 << 20
_PIECE = 4 << 10  # of a block: a decoder that fails keeps all that it was asked for
_KEPT = 4 << 10
_XZ_MEMORY = 256 << 20


def compression(first: bytes) -> str | None:
    """The format of a compressed file by its first bytes, None for any other file."""
    return next((name for magic, name in MAGIC.items() if first.startswith(magic)), None)


@contextmanager
def opened(location: str) -> Iterator[IO[bytes]]:
    """A buffered stream over a file.

    Raises :class:`cluster.storage.StoreError` behind a block in which object storage failed, whatever the block made of
    it: that says nothing about what the file holds.
    """
    with storage.open_input(location) as file:
        if not storage.is_uri(location):
            yield file
            return
        source = _Source(file)
        try:
            yield io.BufferedReader(source, buffer_size=4 << 20)  # one request a header is too many
        finally:
            if source.failure:
                reason = " ".join(str(source.failure).split())
                raise storage.StoreError(
                    f"{location}: {reason}; what is finished is kept: mend it and run the same command again"
                ) from source.failure


@contextmanager
def decompressed(location: str, size: int) -> Iterator[Forward]:
    """A stream over what the compressed file of ``size`` bytes holds.

    Damage raises ``OSError``, as does more than the limits allow.
    """
    with opened(location) as file:
        kind = compression(file.read(8))
        if kind is None:
            raise OSError("it is not compressed any more")
        file.seek(0)
        stream: Any = _Xz(file) if kind == "xz" else pa.CompressedInputStream(file, kind)
        yield Forward(stream, max(MAX_FREE_BYTES, MAX_RATIO * size))


class Forward:
    """A stream that is read forward; a seek back reaches the last 4 KiB at least, one past the end stops there."""

    def __init__(self, stream: Any, limit: int) -> None:
        self._stream, self._limit = stream, limit
        self._failure: OSError | None = None
        self._held = b""
        self._start = 0  # of what is held
        self._place = 0

    def tell(self) -> int:
        """The place of the next byte."""
        return self._place

    def seek(self, place: int) -> int:
        """Go to ``place`` and return where that ended."""
        if place < self._start:
            raise OSError("a compressed file cannot be read backwards")
        while place > self._start + len(self._held) and self._more():
            pass
        self._place = min(place, self._start + len(self._held))
        return self._place

    def read(self, length: int) -> bytes:
        """``length`` bytes, fewer only at the end; they are all held at once."""
        parts = []
        while length:
            at = self._place - self._start
            part = self._held[at : at + length]
            if not part and not self._more():
                break
            parts.append(part)
            self._place += len(part)
            length -= len(part)
        return b"".join(parts)

    def _more(self) -> bool:
        """Take in the next block; False at the end."""
        if self._failure:  # what a decoder gives after its first error is anything
            raise self._failure
        block = bytearray()
        try:
            while len(block) < _BLOCK and (piece := self._stream.read(_PIECE)):
                block += piece
        except (OSError, EOFError, lzma.LZMAError, pa.ArrowException) as error:
            self._failure = OSError(f"the compressed data are damaged or cut short: {error}")
            if not block:
                raise self._failure from error
        self._start += max(0, len(self._held) - _KEPT)
        self._held = self._held[-_KEPT:] + block
        if self._start + len(self._held) > self._limit:
            self._failure = OSError(f"it decompresses to more than {self._limit} bytes, as a decompression bomb does")
            raise self._failure
        return bool(block)


class _Source(io.RawIOBase):
    """The bytes of a file on object storage, and how reading them failed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.failure: OSError | None = None

    def readinto(self, buffer: Any) -> int:
        try:
            return int(self._file.readinto(buffer))  # type: ignore[attr-defined]  # pyarrow's streams have it
        except OSError as error:
            self.failure = error
            raise

    def seek(self, place: int, whence: int = 0) -> int:
        return self._file.seek(place, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class _Xz:
    """What the xz streams of a file hold, one after the other, decompressed within a limit of memory."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._decoder: lzma.LZMADecompressor | None = None
        self._left = b""

    def read(self, length: int) -> bytes:
        while True:
            if self._decoder is None:
                self._left = self._left.lstrip(b"\0")  # padding between streams
                if not self._left:
                    self._left = self._source.read(_BLOCK)
                    if not self._left:
                        return b""
                    continue
                self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
            if self._decoder.needs_input and not self._left:
                self._left = self._source.read(_BLOCK)
                if not self._left:
                    raise EOFError("cut short")
            data = self._decoder.decompress(self._left, length)
            self._left = b""
            if self._decoder.eof:
                self._left, self._decoder = self._decoder.unused_data, None
            if data:
                return data
