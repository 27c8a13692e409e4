"""What a tar holds, and whether all of it can be reached; nothing is ever extracted.

In goes a stream, out comes the place of each member's bytes, and the damage if any: one by one with :class:`TarWalk`,
which needs the memory of one member, or together as a :class:`TarScan`. A plain header, which is nearly every header,
is read here; any other (long names, links, extensions) the standard library reads.
"""

from __future__ import annotations

import re
import sys
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple, Protocol

MAX_HEADER_BYTES = 1 << 20
"""Largest extended header that is read: names and attributes, never data."""

_BLOCK = 512
_NUMBER = rb"(?:[0-7]{7}[ \0]|[0-7]{6} \0)"
_LONG_NUMBER = rb"([0-7]{11})[ \0]"
_PLAIN = re.compile(_NUMBER * 3 + _LONG_NUMBER + _LONG_NUMBER + rb"([0-7]{6})(?:\0 | \0)" + rb"([05])")
"""Mode, owners, size, time, checksum and type in the header of a file or a folder (ustar, POSIX.1-1988)."""

_NO_DEVICE = (bytes(16), b"0000000\0" * 2, b"000000 \0" * 2)
_ENDLESS_NUMBER = re.compile(rb"[0-9]{256}")  # in an extended header, tarfile would search it in quadratic time


class Member(NamedTuple):
    """One file in a tar. ``start`` and ``end`` bound its headers and padded data; ``offset`` and ``size`` its bytes."""

    name: str
    start: int
    offset: int
    size: int
    end: int
    refused: str | None


@dataclass(frozen=True)
class TarScan:
    """All members of a tar that can be reached, and what is wrong with the rest of it (None for a whole tar)."""

    members: list[Member]
    damage: str | None


class Stream(Protocol):
    """The part of a binary stream that :class:`TarWalk` needs."""

    def read(self, length: int, /) -> bytes:
        """``length`` bytes, fewer only at the end."""

    def seek(self, place: int, /) -> int:
        """Go to ``place``; the place where that ended."""

    def tell(self) -> int:
        """The place of the next byte."""


class TarWalk:
    """The files of an uncompressed tar in their order, to be gone through once; ``damage`` is known after the last.

    ``stream`` stands at the first header and seeks forward, and back within what it read last. Its data are not read,
    but may be between two members. ``total`` is its size in bytes, None where it is not known: then it is cut short
    where a seek ends before its aim. Unlike stock readers it says so when the tar is cut or a header is damaged, at
    whatever byte. Members that must not be trusted (links, devices, absolute names, names with ``..``) have
    ``refused`` set.
    """

    damage: str | None = None

    def __init__(self, stream: Stream, total: int | None = None) -> None:
        self._stream = stream
        self._total = sys.maxsize if total is None else total
        self._end = 0
        self._last: str | None = None

    def __iter__(self) -> Iterator[Member]:
        try:
            yield from self._members()
            self.damage = self.damage or self._tail()
        except (OSError, EOFError, UnicodeError, ValueError, OverflowError, RecursionError) as error:
            self.damage = f"damaged after byte {self._end} ({error})"

    def _members(self) -> Iterator[Member]:
        tar: Any = None
        while self._reaches(self._end):
            header = self._stream.read(_BLOCK)
            found = None if tar and tar.pax_headers else _plain_header(header)  # those change every header after them
            if found:
                name, size, is_dir = found
                start, offset = self._end, self._end + _BLOCK
                self._end = offset + -(-size // _BLOCK) * _BLOCK
                if not is_dir:
                    yield self._member(name, start, offset, size, _why_unsafe(name))
                continue
            try:
                if tar:
                    tar.offset = self._end
                else:
                    self._stream.seek(self._end)
                    tar = tarfile.TarFile(fileobj=_Headers(self._stream), encoding="utf-8")  # type: ignore[arg-type]
                info = tar.next()
            except tarfile.TarError as error:
                if not self._end:
                    self.damage = f"not a tar archive, or its first header is damaged ({error})"
                return
            if info is None:
                return
            tar.members = []  # else memory grows with the archive
            if info.size < 0 or info.offset < self._end:  # would be read again and again
                self.damage = f"damaged header at byte {info.offset}"
                return
            self._end = tar.offset  # of a sparse member, that is before all of its size
            if not info.isdir():
                yield self._member(info.name, info.offset, info.offset_data, info.size, _why_refused(info))

    def _member(self, name: str, start: int, offset: int, size: int, refused: str | None) -> Member:
        self._last = name
        if refused is None and offset + size > self._total:
            refused = "cut short inside its data"
        return Member(name, start, offset, size, self._end, refused)

    def _reaches(self, place: int) -> bool:
        return place <= self._total and self._stream.seek(place) == place

    def _tail(self) -> str | None:
        """What is wrong behind the last member."""
        stream, end = self._stream, self._end
        if not self._reaches(end):
            total = min(self._total, stream.tell())
            return f"cut short at byte {total}, inside {self._last}" if self._last is not None else "cut short"
        mark = stream.read(2 * _BLOCK)
        if mark == bytes(2 * _BLOCK):
            while padding := stream.read(1 << 20):
                if padding.strip(b"\0"):
                    return f"holds data after its end mark at byte {end}, which readers never reach"
            return None
        if len(mark) < _BLOCK or not mark.strip(b"\0"):
            return f"cut short at byte {end + len(mark)}: the end mark is missing"
        beyond = "what is" if self._total == sys.maxsize else f"{self._total - end} bytes"
        return f"damaged header at byte {end}; {beyond} after it cannot be reached"


def scan_tar(stream: IO[bytes]) -> TarScan:
    """List the files of a seekable, uncompressed tar without reading their data, as :class:`TarWalk` finds them."""
    total = stream.seek(0, 2)
    stream.seek(0)
    if total == 0:
        return TarScan([], "archive is empty (0 bytes)")
    walk = TarWalk(stream, total)
    return TarScan(list(walk), walk.damage)


class _Headers:
    """A stream as tarfile reads it: only headers, so that none of them can ask for much memory."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, length: int) -> bytes:
        if not 0 <= length <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header of {length} bytes, {MAX_HEADER_BYTES} allowed")
        data = self._stream.read(length)
        if length > _BLOCK // 2 and _ENDLESS_NUMBER.search(data):
            raise tarfile.ReadError("a number of over 255 digits in an extended header")
        return data


def _plain_header(block: bytes) -> tuple[str, int, bool] | None:
    """Name, bytes and whether it is a folder of what ``block`` heads; None for all that tarfile is to judge."""
    fields = _PLAIN.match(block, 100)
    if not fields or len(block) < _BLOCK or block[329:345] not in _NO_DEVICE:
        return None
    counted = block[:148] + b"        " + block[156:]  # the checksum counts itself as eight blanks
    # Adler's low half is one more than the sum modulo 65521, which 512 bytes of ASCII never reach; it is quicker.
    checksum = (zlib.adler32(counted) & 0xFFFF) - 1 if block.isascii() else sum(counted)
    if checksum != int(fields[3], 8):
        return None
    name, prefix = block[:100].partition(b"\0")[0], block[345:500].partition(b"\0")[0]
    is_dir = fields[4] == b"5"
    if not name or (name.endswith(b"/") and not is_dir):
        return None
    path = prefix + b"/" + name if prefix else name
    return path.decode("utf-8", "surrogateescape"), 0 if is_dir else int(fields[1], 8), is_dir


def _why_refused(info: tarfile.TarInfo) -> str | None:
    if info.issym() or info.islnk():
        return "is a link; links are not followed"
    if not info.isreg() or info.issparse():
        return "is not a regular file"
    return _why_unsafe(info.name)


def _why_unsafe(name: str) -> str | None:
    if name.startswith("/"):
        return "has an absolute name"
    if ".." in name and ".." in PurePosixPath(name).parts:
        return "has a name that leaves the archive"
    return None
