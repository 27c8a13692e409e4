"""What an encoded image is before anything decodes it: its file name, its limits, the shape that its header tells.

Nothing here needs PyTorch, so that a plan over millions of names starts at once.
"""

from __future__ import annotations

import struct
from pathlib import PurePosixPath

MAX_ENCODED_BYTES = 64 << 20
"""Largest image file that is read, in bytes."""

MAX_PIXELS = 4096 * 4096
"""Largest image that is decoded, height x width."""

EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif", "jp2"})
"""File name endings, lower case, that are taken for images."""


class TileError(Exception):
    """An image that cannot be used; the text is ``cause`` or ``cause: detail``."""


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
