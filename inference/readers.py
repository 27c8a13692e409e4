"""A chunk becomes tiles again: encoded images in order, or why there is none. Nothing is extracted to disk.

In goes a chunk of the plan, out come exactly its tiles, one by one.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cluster import storage
from configs.errors import TilefleetError, UsageError
from inference import zips
from inference.ahead import in_order
from inference.plan import Chunk
from inference.scan import has_image_ending, is_tile_name
from inference.streams import Forward, decompressed, opened
from training.encoded import MAX_ENCODED_BYTES, TileError
from training.shards import Member
from training.tars import TarWalk

FILE_READERS = 8
"""Files read at once from object storage, where one after the other would mostly wait."""

_BLOCK = 8 << 20
_GAP = 64 << 10
_EXTRA = 256


class Tile(NamedTuple):
    """One tile of a chunk: its encoded image, or why there is none (``cause`` or ``cause: detail``).

    ``tile_id`` is its name in the archive without the ending. Members of one name, or of names that differ in the
    ending alone, have one id: the order tells them apart.
    """

    tile_id: str
    data: bytes | None
    error: str | None


class Tiles:
    """The tiles of a chunk in order, to be gone through once.

    Going through them raises :class:`TilefleetError` where the archive is gone or is not the one that was planned.
    After the last, ``damage`` says what is wrong with a compressed tar, which only reading finds; of any other archive
    the plan has said it.
    """

    damage: str | None = None

    def __init__(self, chunk: Chunk) -> None:
        self._archive = chunk.archive
        self._tiles = _READERS[chunk.kind](chunk)

    def __iter__(self) -> Iterator[Tile]:
        return self

    def __next__(self) -> Tile:
        try:
            return next(self._tiles)
        except StopIteration as end:
            self.damage = end.value or self.damage
            raise
        except TilefleetError:
            raise
        except OSError as error:
            raise TilefleetError(
                f"{self._archive}: cannot be read ({error.strerror or error}); "
                "make it readable and run the same command again"
            ) from error


def _of_tar(chunk: Chunk) -> Iterator[Tile]:
    _check(chunk, storage.size(chunk.archive) == chunk.archive_bytes)
    data = storage.read_bytes(chunk.archive, chunk.start, chunk.end - chunk.start)
    members = [member for member in TarWalk(io.BytesIO(data), len(data)) if is_tile_name(member.name)]
    _check(chunk, len(members) == chunk.tiles)
    for member in members:
        error = _why_not(member)
        yield Tile(_id(member.name), None if error else data[member.offset : member.offset + member.size], error)


def _of_zip(chunk: Chunk) -> Iterator[Tile]:
    _check(chunk, storage.size(chunk.archive) == chunk.archive_bytes)
    with opened(chunk.archive) as stream:

        def read(place: int, length: int) -> bytes:
            return stream.read(length) if place < chunk.archive_bytes and stream.seek(place) == place else b""

        try:
            rows = zips.read_entries(read, chunk.start, chunk.end)
            entries = [entry for entry in rows if is_tile_name(entry.name)]
        except zips.Damaged:
            entries = []
        _check(chunk, len(entries) == chunk.tiles)
        block = _Block(read)
        for number, entry in enumerate(entries):
            block.reach(entry.offset, entries[number:])
            try:
                yield Tile(_id(entry.name), zips.read_entry(entry, block.read), None)
            except TileError as error:
                yield Tile(_id(entry.name), None, str(error))


def _of_stream(chunk: Chunk) -> Generator[Tile, None, str | None]:
    images = 0
    _check(chunk, storage.size(chunk.archive) == chunk.archive_bytes)
    with decompressed(chunk.archive, chunk.archive_bytes) as stream:
        walk = TarWalk(stream)
        for member in walk:
            if is_tile_name(member.name):
                images += 1
                yield _from_stream(stream, member)
    return walk.damage or (None if images else "holds no images")


def _of_files(chunk: Chunk) -> Iterator[Tile]:
    archive, names = chunk.archive, chunk.members or ()
    folder = archive.rpartition("/")[0] if chunk.archive_bytes else archive  # a list has a size
    files = [(name, name if _is_absolute(name) else storage.join(folder, name)) for name in names]
    threads = FILE_READERS if any(storage.is_uri(location) for _, location in files) else 1
    return in_order(_read_file, files, threads) if threads > 1 else map(_read_file, files)


def _check(chunk: Chunk, same: bool) -> None:
    if not same:
        raise TilefleetError(
            f"{chunk.archive}: changed since it was planned; put the old file back, or classify into a new folder"
        )


_READERS: dict[str, Callable[[Chunk], Iterator[Tile]]] = {
    "tar": _of_tar,
    "zip": _of_zip,
    "stream": _of_stream,
    "files": _of_files,
}


def read_chunk(chunk: Chunk) -> Tiles:
    """The tiles of ``chunk``, exactly ``chunk.tiles`` of them where that is known, read as they are asked for.

    What is held at once is about :data:`inference.scan.CHUNK_BYTES` of a tar, and less of anything else.
    """
    return Tiles(chunk)


class _Block:
    """A part of a zip that is held, so that entries that follow each other are one read."""

    def __init__(self, read: zips.Read) -> None:
        self._read = read
        self._start = 0
        self._held = b""

    def reach(self, place: int, entries: Sequence[zips.Entry]) -> None:
        """Hold the data of the first of ``entries``, which stands at ``place``, and of those near behind it."""
        first = entries[0]
        if self._start <= place and _end(first) <= self._start + len(self._held):
            return
        end = _end(first)
        for entry in entries[1:]:
            if not place <= entry.offset <= end + _GAP or _end(entry) - place > _BLOCK:
                break
            end = max(end, _end(entry))
        self._start, self._held = place, self._read(place, min(end - place, MAX_ENCODED_BYTES + _BLOCK))

    def read(self, place: int, length: int) -> bytes:
        at = place - self._start
        if at >= 0 and at + length <= len(self._held):
            return self._held[at : at + length]
        return self._read(place, length)


def _end(entry: zips.Entry) -> int:
    """About where the data of an entry end, if they are going to be read."""
    packed = entry.packed if entry.packed <= MAX_ENCODED_BYTES and not entry.refused else 0
    return entry.offset + zips.LOCAL_BYTES + len(entry.raw_name) + _EXTRA + packed


def _from_stream(stream: Forward, member: Member) -> Tile:
    error, data = _why_not(member), b""
    if not error:
        try:
            stream.seek(member.offset)
            data = stream.read(member.size)
        except OSError:  # the walk meets it again and names it
            pass
        error = None if len(data) == member.size else "cut short inside its data"
    return Tile(_id(member.name), None if error else data, error)


def _why_not(member: Member) -> str | None:
    if member.size > MAX_ENCODED_BYTES:
        return f"image file over the limit: {member.size} bytes, {MAX_ENCODED_BYTES} allowed"
    return member.refused


def _read_file(file: tuple[str, str]) -> Tile:
    """The tile of a name at a location. Raises :class:`cluster.storage.StoreError` where object storage fails."""
    name, location = file
    tile_id = _id(name)
    try:
        if not storage.is_uri(location) and not stat.S_ISREG(Path(location.removeprefix("file://")).stat().st_mode):
            return Tile(tile_id, None, "cannot be read: not a regular file")
        data = storage.read_bytes(location, 0, MAX_ENCODED_BYTES + 1)
    except storage.StoreError:
        raise
    except (OSError, ValueError, UsageError) as error:
        return Tile(tile_id, None, f"cannot be read: {getattr(error, 'strerror', None) or error}")
    if len(data) > MAX_ENCODED_BYTES:
        return Tile(tile_id, None, f"image file over the limit: more than the {MAX_ENCODED_BYTES} bytes allowed")
    return Tile(tile_id, data, None)


def _is_absolute(name: str) -> bool:
    return name.startswith("/") or "://" in name


def _id(name: str) -> str:
    readable = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return readable.rpartition(".")[0] if has_image_ending(readable) else readable
