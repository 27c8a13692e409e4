"""What a zip holds, read from slices of its central directory, so that no process holds all of it.

:func:`find_directory` says where the directory lies, :func:`read_entries` gives the entries of any slice of it, and
:func:`read_entry` the bytes of one, with limits before anything is decompressed (APPNOTE.TXT 6.3.10 of PKWARE).
"""

from __future__ import annotations

import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from training.encoded import MAX_ENCODED_BYTES, TileError

LOCAL_BYTES = 30
"""Bytes of the header that stands before an entry's data, without its name and extra fields."""

_ENTRY = struct.Struct("<4s4xHHHHIIIHHHHHII")
_LOCAL = struct.Struct("<4s22xHH")
_END = struct.Struct("<4sHHHHIIH")
_END64 = struct.Struct("<4sQ4xIIQQQQ")
_LOCATOR = struct.Struct("<4sIQI")
_BLOCK = 1 << 20
_MAX_ENTRY = _ENTRY.size + 3 * 0xFFFF
_STORED, _DEFLATED = 0, 8
_ENCRYPTED = 0x2041  # the data, in either of two ways, or the directory

Read = Callable[[int, int], bytes]
"""Gives so many bytes (the second number) of the zip from a place in it; fewer where it ends before."""


class Damaged(Exception):
    """A zip whose directory cannot be followed; the text says why."""


@dataclass(frozen=True)
class Entry:
    """One file in a zip. ``start`` and ``end`` bound its row in the directory, ``offset`` is where its header stands.

    ``size`` and ``packed`` are its declared sizes in bytes, plain and compressed; neither is to be trusted.
    """

    name: str
    raw_name: bytes
    start: int
    end: int
    offset: int
    packed: int
    size: int
    crc: int
    method: int
    refused: str | None


def find_directory(read: Read, total: int) -> tuple[int, int]:
    """Where the central directory of a zip of ``total`` bytes starts and ends; raises :class:`Damaged`."""
    tail_start = max(0, total - _END.size - 0xFFFF)
    tail = read(tail_start, total - tail_start)
    at = tail.rfind(b"PK\5\6")
    while at >= 0 and (len(tail) - at < _END.size or at + _END.size + _END.unpack_from(tail, at)[7] > len(tail)):
        at = tail.rfind(b"PK\5\6", 0, at)  # the mark may stand in a comment, or the comment be cut
    if at < 0:
        raise Damaged("not a zip, or cut short: its directory is missing")
    _, disk, first_disk, _, _, length, start, _ = _END.unpack_from(tail, at)
    end = tail_start + at
    locator = read(end - _LOCATOR.size, _LOCATOR.size) if end >= _LOCATOR.size else b""
    if locator.startswith(b"PK\6\7") and len(locator) == _LOCATOR.size:
        _, _, place, _ = _LOCATOR.unpack(locator)
        record = read(place, _END64.size) if place < end else b""
        if len(record) < _END64.size or not record.startswith(b"PK\6\6"):
            raise Damaged("damaged: the end of its directory cannot be found")
        _, _, disk, first_disk, _, _, length, start = _END64.unpack(record)
        end = place
    if disk or first_disk:
        raise Damaged("is one of the parts of a zip in several parts; join them")
    if start + length > end:
        raise Damaged("damaged: its directory reaches beyond its end")
    if length and read(start, 4) != b"PK\1\2":
        raise Damaged("damaged, or something stands before the zip in its file; mend it with `zip -A`")
    return start, start + length


def read_entries(read: Read, start: int, end: int) -> Iterator[Entry]:
    """The files in the slice of a central directory from ``start`` to ``end``, in its order; folders are left out.

    Entries that must not be trusted or cannot be read have ``refused`` set. Raises :class:`Damaged` where the slice
    does not hold whole entries, after those before.
    """
    held, at, place = b"", 0, start  # of what is held, the next entry; in the file, that entry
    while place < end:
        if len(held) - at < _MAX_ENTRY and place + len(held) - at < end:
            ahead = place + len(held) - at
            more = read(ahead, min(_BLOCK, end - ahead))
            if not more:
                raise Damaged(f"cut short at byte {ahead}, inside its directory")
            held, at = held[at:] + more, 0
            continue
        if len(held) - at < _ENTRY.size or held[at : at + 4] != b"PK\1\2":
            raise Damaged(f"damaged directory at byte {place}; {end - place} bytes of it after that cannot be reached")
        length = _ENTRY.size + sum(struct.unpack_from("<HHH", held, at + 28))  # name, extra fields, comment
        if len(held) - at < length:
            raise Damaged(f"cut short at byte {end}, inside its directory")
        entry = _entry(held[at : at + length], place)
        at, place = at + length, place + length
        if entry is not None:
            yield entry


def read_entry(entry: Entry, read: Read) -> bytes:
    """The bytes of ``entry``, checked against its size and checksum. Raises :class:`TileError`."""
    if entry.size > MAX_ENCODED_BYTES or entry.packed > MAX_ENCODED_BYTES + _BLOCK:
        size = max(entry.size, entry.packed)
        raise TileError(f"image file over the limit: {size} bytes, {MAX_ENCODED_BYTES} allowed")
    if entry.refused:
        raise TileError(entry.refused)
    header = read(entry.offset, LOCAL_BYTES + len(entry.raw_name))
    if len(header) < LOCAL_BYTES + len(entry.raw_name) or not header.startswith(b"PK\3\4"):
        raise TileError("damaged in the zip")
    _, name_length, extra_length = _LOCAL.unpack_from(header)
    if header[LOCAL_BYTES : LOCAL_BYTES + name_length] != entry.raw_name:
        raise TileError("damaged in the zip")
    packed = read(entry.offset + LOCAL_BYTES + name_length + extra_length, entry.packed)
    data = _unpacked(packed, entry)
    if len(packed) != entry.packed or len(data) != entry.size or zlib.crc32(data) != entry.crc:
        raise TileError("damaged in the zip")
    return data


def _unpacked(packed: bytes, entry: Entry) -> bytes:
    if entry.method == _STORED:
        return packed
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, entry.size + 1)
    except zlib.error as error:
        raise TileError("damaged in the zip") from error


def _entry(row: bytes, place: int) -> Entry | None:
    fields = _ENTRY.unpack_from(row)
    _, flags, method, _, _, crc, packed, size, name_length, extra_length, _, _, _, mode, offset = fields
    raw_name = row[_ENTRY.size : _ENTRY.size + name_length]
    extra = row[_ENTRY.size + name_length : _ENTRY.size + name_length + extra_length]
    size, packed, offset = _long_fields(extra, [size, packed, offset])
    name = raw_name.decode("utf-8", "backslashreplace") if flags & 0x800 else raw_name.decode("cp437")
    name = name.partition("\0")[0]
    if name.endswith("/"):
        return None
    refused = _why_refused(name, flags, method, mode >> 16)
    return Entry(name, raw_name, place, place + len(row), offset, packed, size, crc, method, refused)


def _long_fields(extra: bytes, fields: list[int]) -> list[int]:
    """Sizes and offset with those that do not fit into 32 bits taken from the zip64 extra field."""
    while len(extra) >= 4 and 0xFFFFFFFF in fields:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            long = iter(struct.unpack_from(f"<{min(length, len(extra) - 4) // 8}Q", extra, 4))
            return [next(long, field) if field == 0xFFFFFFFF else field for field in fields]
        extra = extra[4 + length :]
    return fields


def _why_refused(name: str, flags: int, method: int, mode: int) -> str | None:
    if stat.S_ISLNK(mode):
        return "is a link; links are not followed"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        return "is not a regular file"
    if name.startswith("/"):
        return "has an absolute name"
    if ".." in PurePosixPath(name).parts:
        return "has a name that leaves the archive"
    if flags & _ENCRYPTED:
        return "is encrypted; decrypt the zip first"
    if method not in (_STORED, _DEFLATED):
        return "compression not supported: neither stored nor deflated"
    return None
