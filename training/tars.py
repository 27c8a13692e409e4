"""What a tar holds, and whether all of it can be reached; nothing is ever extracted.

In goes a seekable stream, out comes a :class:`TarScan`: the place of each member's bytes, and the damage if any.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO


@dataclass(frozen=True)
class Member:
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


def scan_tar(stream: IO[bytes]) -> TarScan:
    """List the files of a seekable, uncompressed tar without reading their data.

    Unlike stock readers it says so when the tar is cut or a header is damaged, at whatever byte. Members that must
    not be trusted (links, devices, absolute names, names with ``..``) are listed with ``refused`` set.
    """
    total = stream.seek(0, 2)
    stream.seek(0)
    if total == 0:
        return TarScan([], "archive is empty (0 bytes)")
    members: list[Member] = []
    end = 0
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while info := tar.next():
                if info.size < 0 or info.offset < end:  # would be read again and again
                    return TarScan(members, f"damaged header at byte {info.offset}")
                end = tar.offset  # where the next header stands; a sparse member takes less than its size
                if not info.isdir():
                    refused = _why_refused(info) or (
                        "cut short inside its data" if info.offset_data + info.size > total else None
                    )
                    members.append(Member(info.name, info.offset, info.offset_data, info.size, end, refused))
                tar.members = []  # type: ignore[attr-defined]  # else memory grows with the archive
    except tarfile.TarError as error:
        if not members:
            return TarScan([], f"not a tar archive, or its first header is damaged ({error})")
    except (OSError, UnicodeError, ValueError, OverflowError, RecursionError) as error:
        return TarScan(members, f"damaged after byte {end} ({error})")
    if end > total:
        return TarScan(members, f"cut short at byte {total}, inside {members[-1].name}" if members else "cut short")
    stream.seek(end)
    mark = stream.read(1024)
    if mark == bytes(1024):
        while padding := stream.read(1 << 20):
            if padding.strip(b"\0"):
                return TarScan(members, f"holds data after its end mark at byte {end}, which readers never reach")
        return TarScan(members, None)
    if len(mark) < 512 or not mark.strip(b"\0"):
        return TarScan(members, f"cut short at byte {total}: the end mark is missing")
    return TarScan(members, f"damaged header at byte {end}; {total - end} bytes after it cannot be reached")


def _why_refused(info: tarfile.TarInfo) -> str | None:
    if info.issym() or info.islnk():
        return "is a link; links are not followed"
    if not info.isreg() or info.issparse():
        return "is not a regular file"
    path = PurePosixPath(info.name)
    if path.is_absolute():
        return "has an absolute name"
    if ".." in path.parts:
        return "has a name that leaves the archive"
    return None
