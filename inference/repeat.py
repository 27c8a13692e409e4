"""As many tiles as a benchmark asks for: real or drawn ones, again and again under new ids.

Encoded tiles come in, plain tar shards, and the same tiles as a folder of images, go out. Bytes are copied, nothing is
decoded.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from inference.plan import Progress
from training.decode import image_extension
from training.randomness import permutation
from training.shards import TileReader

DISTINCT = 20_000
"""Different tiles at most; they are held in memory."""

DRAWN = 250
"""Synthetic tiles of a class at most: it takes longer to draw one than to classify it."""

Draw = Callable[[str, int], None]
"""Writes that many JPEG files of each of some classes below a folder."""

_BLOCK = 512
_HEADER = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)


def read_tiles(shards: str, most: int) -> list[bytes]:
    """At most ``most`` encoded tiles of the train split of a shard set, in an order of chance."""
    reader = TileReader(shards, "train")
    return reader.read(permutation(0, 0, count=len(reader))[: min(most, DISTINCT)].tolist())


def draw_tiles(folder: Path, most: int, draw: Draw) -> list[bytes]:
    """At most ``most`` encoded tiles that ``draw`` wrote below ``folder``."""
    draw(str(folder), min(most, DRAWN))
    return [file.read_bytes() for file in sorted(folder.rglob("*.jpg"))[:most]]


def write_shards(folder: Path, encoded: Sequence[bytes], tiles: int, each: int, show: Progress) -> None:
    """Write ``tiles`` tiles as plain tars of ``each`` into ``folder``; ids count them."""
    folder.mkdir()
    endings = [image_extension(data) for data in encoded]
    for start in range(0, tiles, each):
        show("write", start, tiles)
        pieces: list[bytes] = []
        for number in range(start, min(start + each, tiles)):
            data = encoded[number % len(encoded)]
            name = f"{_id(number)}.{endings[number % len(encoded)]}"
            pieces += [_header(name, len(data)), data, bytes(-len(data) % _BLOCK)]
        (folder / f"shard-{start // each:06d}.tar").write_bytes(b"".join([*pieces, bytes(2 * _BLOCK)]))


def link_images(folder: Path, encoded: Sequence[bytes], tiles: int, each: int) -> None:
    """Make the ``tiles`` tiles of :func:`write_shards` files in ``folder``, in folders of ``each``.

    A tile that comes again is a hard link, so that a million need little of the disk.
    """
    for start in range(0, tiles, each):
        (folder / f"{start // each:06d}").mkdir(parents=True)
    places = _places(folder, tiles, each)
    first = [next(places) for _ in range(min(len(encoded), tiles))]
    for place, data in zip(first, encoded, strict=False):
        place.write_bytes(data)
    for number, place in enumerate(places):
        os.link(first[number % len(first)], place)


def _places(folder: Path, tiles: int, each: int) -> Iterator[Path]:
    return (folder / f"{number // each:06d}" / f"{_id(number)}.jpg" for number in range(tiles))


def _id(number: int) -> str:
    return f"tile-{number:08d}"


def _header(name: str, size: int) -> bytes:
    """The header of a file in a tar (ustar, POSIX.1-1988): ten times as quick as the standard library's."""
    header = bytearray(_HEADER)
    header[: len(name)] = name.encode()
    header[124:135] = b"%011o" % size
    header[148:156] = b"        "  # the checksum counts itself as eight blanks
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)
