"""What an encoded image is before anything decodes it: its name, limits, the shape in its header, the bands that count.

Nothing here needs PyTorch, so that a plan over millions of names starts at once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from math import isfinite
from pathlib import PurePosixPath
from typing import Annotated, Self

from pydantic import Field, model_validator

from configs.errors import UsageError
from configs.schema import Config

MAX_ENCODED_BYTES = 64 << 20
"""Largest image file that is read, in bytes."""

MAX_PIXELS = 4096 * 4096
"""Largest image that is decoded, height x width."""

MAX_BANDS = 64
"""Most channels that a tile has."""

EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif", "jp2"})
"""File name endings, lower case, that are taken for images."""


_TIFF = {
    b"II*\0": ("<", 4, "I", "H", 12),
    b"MM\0*": (">", 4, "I", "H", 12),
    b"II+\0": ("<", 8, "Q", "Q", 20),
    b"MM\0+": (">", 8, "Q", "Q", 20),
}
"""How a TIFF or BigTIFF begins -> byte order, where and what the place of its first directory is, the type of a
directory's length, bytes of an entry."""

_SAMPLES_PER_PIXEL, _LONG = 277, 4
_MOST_ENTRIES, _MOST_DIRECTORIES = 0xFFFF, 64


DAMAGED = "image is cut short or damaged"
"""The cause of most errors."""


class TileError(Exception):
    """An image that cannot be used; the text is ``cause`` or ``cause: detail``."""


class NotColourError(TileError):
    """An image whose samples are no colours, where nothing says which of its bands count."""


class Bands(Config):
    """Which bands of an image are the channels of a tile, and what its samples mean; without it tiles are RGB.

    ``numbers`` count from 1, in the order of the file, as GDAL does. Samples from ``lowest`` to ``highest`` become 0 to
    255; what lies beyond them is clipped.
    """

    numbers: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1, max_length=MAX_BANDS)
    lowest: float = Field(default=0.0, allow_inf_nan=False)
    highest: float = Field(allow_inf_nan=False)

    @model_validator(mode="after")
    def _spans(self) -> Self:
        if self.lowest >= self.highest or not isfinite(self.highest - self.lowest):
            raise ValueError("the lowest sample must lie below the highest")
        return self


def channels(bands: Bands | None) -> int:
    """Channels of the tiles that ``bands`` makes."""
    return 3 if bands is None else len(bands.numbers)


def parse_bands(numbers: str | None, span: str | None) -> Bands | None:
    """``4,3,2,8`` and ``0,3000`` as :class:`Bands`, None where neither is given; raises :class:`UsageError`."""
    if numbers is None and span is None:
        return None
    if numbers is None or span is None:
        raise UsageError("--bands and --range belong together: the bands, as 4,3,2,8, and their samples, as 0,3000")
    try:
        lowest, highest = span.split(",")
        return Bands.model_validate({"numbers": numbers.split(","), "lowest": lowest, "highest": highest})
    except ValueError as error:
        raise UsageError(
            f"--bands {numbers} --range {span}: 1 to {MAX_BANDS} bands counted from 1 are needed, as 4,3,2,8, and the "
            "samples that become 0 and 255, the lower one first, as 0,3000"
        ) from error


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image: a known ending, not hidden, not macOS litter."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") and part not in (".", "..") for part in path.parts)
    return not hidden and "__MACOSX" not in path.parts and path.suffix[1:].lower() in EXTENSIONS


def jpeg_shape(data: bytes) -> tuple[int, int, int] | None:
    """Height, width and components of a plain JPEG from its frame header (ITU T.81, B.2.2); None for anything else."""
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width, components = struct.unpack_from(">HHB", data, at + 5)
            return (height, width, components) if data[at + 4] == 8 else None
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def is_tiff(data: bytes) -> bool:
    """Whether these bytes begin as a TIFF or BigTIFF does."""
    return data[:4] in _TIFF


def tiff_entries(data: bytes) -> Iterator[tuple[int, int]]:
    """Tags of a TIFF or BigTIFF and where each entry lies, directory by directory (TIFF 6.0, section 2).

    Ends where the file does, or begins to repeat itself; there are none in anything else.
    """
    order, place, pointer, length, step = _TIFF.get(data[:4], ("<", len(data), "I", "H", 12))
    known = set[int]()
    try:
        while len(known) < _MOST_DIRECTORIES:
            (at,) = struct.unpack_from(order + pointer, data, place)
            (entries,) = struct.unpack_from(order + length, data, at)
            if at in known or entries > _MOST_ENTRIES:
                return
            known.add(at)
            first = at + struct.calcsize(order + length)
            place = first + entries * step
            for entry in range(first, place, step):
                yield struct.unpack_from(order + "H", data, entry)[0], entry
    except (struct.error, OverflowError):  # a place beyond the data, or beyond any
        return


def tiff_bands(data: bytes) -> int | None:
    """Bands of a TIFF or BigTIFF; None for anything else, or where its directory is cut."""
    found = None
    for tag, entry in tiff_entries(data):
        if tag == _SAMPLES_PER_PIXEL:
            order, _, pointer, _, step = _TIFF[data[:4]]
            value = data[entry + 4 + struct.calcsize(order + pointer) : entry + step]
            long = data[entry + 2 : entry + 4] == struct.pack(order + "H", _LONG)
            return int(struct.unpack_from(order + ("I" if long else "H"), value)[0]) if len(value) >= 4 else None
        found = 1
    return found
