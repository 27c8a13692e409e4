"""What one archive holds, as ranges of tiles: found from headers, directories and names alone.

In goes the location of a tar, a zip, a compressed tar, a folder of images or a list of paths, out comes a
:class:`Scan`. What an archive is, its content decides; names only decide which files are looked at.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import IO, Literal, NamedTuple

from cluster import storage
from configs.errors import TilefleetError
from inference import zips
from inference.lists import LISTS, listed
from inference.streams import compression, opened
from inference.zips import Damaged
from training.encoded import EXTENSIONS, MAX_ENCODED_BYTES, is_image_name
from training.shards import Member
from training.tars import TarWalk

CHUNK_BYTES = 64 << 20
"""Largest byte range of a chunk; a single tile may need more."""

_IMAGES = tuple(f".{extension}" for extension in EXTENSIONS)

Kind = Literal["tar", "zip", "stream", "files"]


class Range(NamedTuple):
    """Some consecutive tiles of an archive, as a chunk has them; ``tiles`` is None where they were not counted."""

    start: int
    end: int
    tiles: int | None
    members: tuple[str, ...] | None = None


class Source(NamedTuple):
    """What is scanned at once: an archive, or images of one folder that were named one by one."""

    archive: str
    images: list[str]


@dataclass(frozen=True)
class Scan:
    """What one archive holds. ``ranges`` may be lazy, and then raises :class:`inference.Damaged` at its damage."""

    kind: Kind
    bytes: int
    ranges: Iterable[Range]
    damage: str | None = None


def has_image_ending(name: str) -> bool:
    """Whether ``name`` ends as an image does."""
    return name.lower().endswith(_IMAGES)


def is_tile_name(name: str) -> bool:
    """As :func:`training.decode.is_image_name`, and quick for nearly every name."""
    if not has_image_ending(name):
        return False
    return not (name.startswith(".") or "/." in name or "__MACOSX" in name) or is_image_name(name)


def sources(archives: Iterable[str]) -> Iterator[Source]:
    """``archives`` in their order, images that follow each other in one folder together."""
    for (folder, is_image), group in groupby(archives, _folder_if_image):
        if is_image:
            yield Source(folder, [image[len(folder.rstrip("/")) + 1 :] for image in group])
        else:
            yield from (Source(archive, []) for archive in group)


def scan(source: Source, tiles_per_chunk: int) -> Scan:
    """Ranges of at most ``tiles_per_chunk`` tiles and :data:`CHUNK_BYTES` bytes each.

    Raises :class:`TilefleetError` where object storage fails, which says nothing about the archive.
    """
    archive = source.archive
    if source.images:
        return Scan("files", 0, named(source.images, tiles_per_chunk))
    try:
        size = _size(archive)
        if size is None:
            return Scan("files", 0, named(walk_images(archive), tiles_per_chunk))
        if archive.lower().endswith(LISTS):
            return Scan("files", size, named(map(_printable, listed(archive)), tiles_per_chunk))
        with opened(archive) as stream:
            first = stream.read(8)
            stream.seek(0)
            if compression(first):
                return Scan("stream", size, [Range(0, size, None)])
            if first.startswith((b"PK\3\4", b"PK\5\6", b"PK\7\x08")) or archive.lower().endswith(".zip"):
                return _collected("zip", size, _zip_ranges(stream, size, tiles_per_chunk))
            return _collected("tar", size, _tar_ranges(stream, size, tiles_per_chunk))
    except TilefleetError:
        raise
    except OSError as error:
        return Scan("tar", 0, [], f"cannot be read ({error.strerror or error})")


def named(names: Iterable[str], tiles_per_chunk: int) -> Iterator[Range]:
    """Ranges over files by name; places count files. Raises :class:`Damaged` behind the last that can be had."""
    start, members = 0, []
    damage: Damaged | None = None
    try:
        for name in names:
            members.append(name)
            if len(members) == tiles_per_chunk:
                yield Range(start, start + len(members), len(members), tuple(members))
                start, members = start + len(members), []
    except storage.StoreError:
        raise
    except Damaged as error:
        damage = error
    except OSError as error:
        damage = Damaged(f"cannot be read ({error.strerror or error})")
    if members:
        yield Range(start, start + len(members), len(members), tuple(members))
    if damage:
        raise damage


def split(members: Iterable[Member], archive_bytes: int, tiles_per_chunk: int) -> Iterator[Range]:
    """Runs of tiles in one tar, in order.

    Of a tile too large to be decoded only the headers are in a range: its row says why, its data is never read.
    """
    start = end = tiles = 0
    for member in members:
        if not is_tile_name(member.name):
            continue
        stop = member.offset if member.size > MAX_ENCODED_BYTES else min(member.end, archive_bytes)
        if tiles and (tiles == tiles_per_chunk or stop - start > CHUNK_BYTES):
            yield Range(start, end, tiles)
            tiles = 0
        if not tiles:
            start = member.start
        end, tiles = stop, tiles + 1
    if tiles:
        yield Range(start, end, tiles)


def walk_files(folder: str) -> Iterator[str]:
    """Files below ``folder`` as paths relative to it, folder by folder in order; none hidden, no link to a folder."""
    root = folder.rstrip("/") + "/"
    if storage.is_uri(folder):
        yield from (found[len(root) :] for found in storage.list_files(folder, recursive=True))
        return
    below = [""]
    while below:
        parent = below.pop()
        files, folders = [], []
        with os.scandir(root + parent) as found:
            for entry in found:
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{parent}{entry.name}/")
                elif _is_file(entry):
                    files.append(parent + entry.name)
        yield from sorted(files)
        below += sorted(folders, reverse=True)


def walk_images(folder: str) -> Iterator[str]:
    """Those of :func:`walk_files` that are taken for images."""
    return (name for name in map(_printable, walk_files(folder)) if is_tile_name(name))


def _folder_if_image(location: str) -> tuple[str, bool]:
    folder, _, name = location.rpartition("/")
    if is_tile_name(name) and (storage.is_uri(location) or not storage.is_dir(location)):
        return folder or "/", True
    return location, False


def _collected(kind: Kind, size: int, ranges: Iterator[Range]) -> Scan:
    found: list[Range] = []
    try:
        found.extend(ranges)
    except Damaged as error:
        return Scan(kind, size, found, str(error))
    return Scan(kind, size, found)


def _tar_ranges(stream: IO[bytes], size: int, tiles_per_chunk: int) -> Iterator[Range]:
    if size == 0:
        raise Damaged("archive is empty (0 bytes)")
    walk = TarWalk(stream, size)
    yield from split(walk, size, tiles_per_chunk)
    if walk.damage:
        raise Damaged(walk.damage)


def _zip_ranges(stream: IO[bytes], size: int, tiles_per_chunk: int) -> Iterator[Range]:
    """Runs of entries in one zip; each range is a slice of its directory.

    Entries that share their data make a small file cost as much as a large one: where all entries together claim more
    bytes than there are, the zip is damaged from there on.
    """

    def read(place: int, length: int) -> bytes:
        stream.seek(place)
        return stream.read(length)

    first, last = zips.find_directory(read, size)
    start = end = tiles = claimed = packed = 0
    damage: Damaged | None = None
    try:
        for entry in zips.read_entries(read, first, last):
            claimed += zips.LOCAL_BYTES + len(entry.raw_name) + entry.packed
            if claimed > first:
                raise Damaged(f"damaged directory at byte {entry.start}: its entries share their data")
            if not is_tile_name(entry.name):
                continue
            needed = 0 if entry.packed > MAX_ENCODED_BYTES else entry.packed
            if tiles and (tiles == tiles_per_chunk or packed + needed > CHUNK_BYTES):
                yield Range(start, end, tiles)
                tiles = packed = 0
            if not tiles:
                start = entry.start
            end, tiles, packed = entry.end, tiles + 1, packed + needed
    except Damaged as error:
        damage = error
    if tiles:
        yield Range(start, end, tiles)
    if damage:
        raise damage


def _size(archive: str) -> int | None:
    """Size of an archive that is a file, None for a folder."""
    if not storage.is_uri(archive):
        return None if storage.is_dir(archive) else storage.size(archive)
    try:
        return storage.size(archive)
    except FileNotFoundError:
        if storage.is_dir(archive):
            return None
        raise


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link in a circle
        return False


def _printable(name: str) -> str:
    """A name that is not UTF-8 made readable, as Python's escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
