"""Hostile archives, each made by its number alone: good and bad files, packed in many ways, then damaged."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from tests.geotiff import geotiff

TRAP = "/tmp/tilefleet-trap"
"""What files begin with that only a reader makes that follows names, or runs pickles."""

LARGE = 80 << 20
"""Bytes that a tile may not have."""

Files = list[tuple[str, bytes]]

PICTURES = [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("I;16", "PNG")]
PICTURES += [("P", "PNG"), ("1", "PNG"), ("RGB", "WEBP"), ("RGB", "TIFF"), ("F", "TIFF"), ("I;16", "TIFF")]
PICTURES += [("RGB", "BMP"), ("P", "GIF"), ("RGB", "JPEG2000")]
PICTURES += [("none", "GeoTIFF"), ("deflate", "GeoTIFF"), ("lzw", "GeoTIFF")]
"""Modes and formats of images; of a GeoTIFF its compression."""


class Evil:
    """What a pickle is made of: unpickled, it makes a folder."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (TRAP,)


def picture(chance: random.Random) -> bytes:
    """A small image of any kind that Pillow writes, or a GeoTIFF of many bands."""
    mode, form = chance.choice(PICTURES)
    side = chance.choice([1, 8, 32, 32, 32, 50])
    if form == "GeoTIFF":
        samples = np.frombuffer(chance.randbytes(side * side * 5 * 2), np.uint16).reshape(5, side, side)
        return geotiff(samples, compress=mode, interleave=chance.choice(["pixel", "band"]))
    buffer = io.BytesIO()
    noise = np.frombuffer(chance.randbytes(side * side * 3), np.uint8).reshape(side, side, 3)
    if mode in ("I;16", "F"):
        image = Image.fromarray(noise[:, :, 0].astype(np.uint16 if mode == "I;16" else np.float32))
    else:
        image = Image.fromarray(noise).convert(mode)
    image.save(buffer, form)
    return buffer.getvalue()


@cache
def wide_png(side: int) -> bytes:
    """A few kilobytes that claim to be ``side`` x ``side`` pixels, and are so where that is not too many."""
    lines = zlib.compress(bytes(min(side, 4096) * (1 + side) if side <= 4096 else 100), 1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)), (b"IDAT", lines), (b"IEND", b"")]
    packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def wide_jpeg(side: int) -> bytes:
    """A small JPEG whose header claims ``side`` x ``side`` pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", side, side)
    return bytes(data)


def content(chance: random.Random) -> bytes:
    """What a file with an image's name may hold."""
    makers: list[Callable[[], bytes]] = [
        lambda: b"",
        lambda: chance.randbytes(chance.choice([1, 10, 512, 3000])),
        lambda: pickle.dumps(Evil()),
        lambda: wide_png(chance.choice([4096, 4097, 60_000, 2**31 - 1])),
        lambda: wide_jpeg(chance.choice([0, 33, 4096, 65_535])),
        lambda: tar_of([("inner/1.jpg", picture(chance))], chance),
        lambda: zip_of([("inner/1.jpg", picture(chance))], chance),
        lambda: mutated(picture(chance), chance),
        lambda: mutated(picture(chance), chance),
        lambda: picture(chance) + chance.randbytes(100),
    ]
    return picture(chance) if chance.random() < 0.5 else chance.choice(makers)()


def name(chance: random.Random, number: int) -> str:
    """A name of an image, or of something that looks like one."""
    ending = chance.choice(["jpg", "JPG", "jpeg", "png", "tif", "TIFF", "webp", "gif", "bmp", "jp2", "jpg", "png"])
    title = f"{number}.{ending}"
    names = [f"t/{title}"] * 8
    names += [
        f"../../up-{title}",
        f"{TRAP}-{title}",
        f"a/../../{title}",
        f"a\\..\\{title}",
        f".{title}",
        f"__MACOSX/{title}",
    ]
    names += [f"t/same.{ending}", f"{'d/' * 60}{title}", f"{'n' * 200}{title}", f"ü/{title}"]
    names += [f"{number}", f"{number}.pkl", f"{number}.tar"]
    return chance.choice(names)


def tar_of(files: Files, chance: random.Random) -> bytes:
    """A tar in any format, with a link, a device or a folder among ``files`` now and then."""
    buffer = io.BytesIO()
    form = chance.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for title, data in files:
            info = tarfile.TarInfo(title)
            info.size = len(data)
            if chance.random() < 0.1:
                info.type = chance.choice(
                    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"S", b"3"]
                )
                info.linkname = chance.choice(["/etc/passwd", "../../up", title])
                info.size, data = 0, b""
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # the old format has no room for the name
                continue
    return buffer.getvalue()


def zip_of(files: Files, chance: random.Random) -> bytes:
    """A zip, stored or deflated, with a link or another method in it now and then."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for title, data in files:
            info = zipfile.ZipInfo(title)
            info.compress_type = chance.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED])
            if chance.random() < 0.1:
                info.external_attr = chance.choice([0o120777, 0o060644, 0o040755]) << 16
                info.compress_type = chance.choice([zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_STORED])
            file.writestr(info, data)
    return buffer.getvalue()


def mutated(data: bytes, chance: random.Random) -> bytes:
    """``data`` cut, flipped, filled with something else, or with a part of it moved, doubled or overwritten."""
    if not data:
        return data
    at, length = chance.randrange(len(data)), min(chance.choice([1, 4, 12, 100, 512, 4096]), len(data))
    away = chance.randrange(len(data))
    extremes = [
        b"\0" * length,
        b"\xff" * length,
        b"\x80" + bytes(7) + b"\x7f" * 4,
        b"7" * 11 + b"\0",
        b"-1\0",
        b"9" * 300,
    ]
    kind = chance.randrange(7)
    if kind == 0:
        return data[:at]
    if kind == 1:
        flipped = bytearray(data)
        for _ in range(chance.choice([1, 1, 3, 30])):
            flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        return bytes(flipped)
    put = data[away : away + length] if kind in (2, 3) else chance.choice(extremes)
    if kind == 6:
        put = chance.randbytes(length)
    return data[:at] + put + data[at + (0 if kind == 2 else len(put)) :]


def with_header(data: bytes, chance: random.Random) -> bytes:
    """A tar one of whose headers says something else, with a checksum that is right."""
    starts = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    if not starts:
        return data
    at = chance.choice(starts)
    header = bytearray(data[at : at + 512])
    sizes = [
        b"77777777777\0",
        b"\x80" + b"\xff" * 11,
        b"\xff" * 12,
        b"00000000000\0",
        b"00010000000\0",
        b"-0000000001\0",
    ]
    types = [bytes([code]) for code in b"01234567SLKxgD\0\xff"]
    names = [b"/etc/x.jpg\0", b"\xff\xfe.jpg\0", b"\0" * 8]
    fields = [(124, sizes), (124, sizes), (156, types), (345, [b"../" * 5]), (0, names), (386, [b"77777777777\0" * 4])]
    field, values = chance.choice(fields)
    value = chance.choice(values)
    header[field : field + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]


@cache
def bomb(kind: str) -> bytes:
    """An archive whose one tile is :data:`LARGE`: declared (``tar.gz``), or only found by inflating it (``zip``)."""
    if kind == "tar.gz":
        return gzip.compress(tar_of([("t/1.jpg", bytes(LARGE)), ("t/2.jpg", b"x")], random.Random(0)), 1)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("t/1.jpg", bytes(LARGE))
    return buffer.getvalue().replace(struct.pack("<I", LARGE), struct.pack("<I", 1000))


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "tar.gz": partial(gzip.compress, compresslevel=1),
    "tar.zst": lambda data: bytes(pa.compress(data, "zstd", asbytes=True)),
    "tar.bz2": partial(bz2.compress, compresslevel=1),
    "tar.xz": partial(lzma.compress, preset=0),
}


def write_case(number: int, seed: int, folder: Path) -> Path:
    """Make the archive of case ``number`` in ``folder``; its location."""
    chance = random.Random(f"{seed}/{number}")
    files = [(name(chance, one), content(chance)) for one in range(chance.randrange(1, 13))]
    kind = chance.choice(["tar"] * 6 + ["zip"] * 5 + ["folder"] * 3 + list(COMPRESSIONS) * 2 + ["nested", "bomb"])
    if kind == "folder":
        for one, (_, data) in enumerate(files):
            (folder / f"{one}.jpg").write_bytes(data)
        return folder
    if kind == "bomb":
        kind = chance.choice(["tar.gz", "zip"])
        data = mutated(bomb(kind), chance) if chance.random() < 0.3 else bomb(kind)
    elif kind == "zip":
        data = zip_of(files, chance)
    else:
        data = tar_of(files, chance)
        if chance.random() < 0.4:
            data = with_header(data, chance)
        if kind == "nested":
            kind = chance.choice(list(COMPRESSIONS))
            data = COMPRESSIONS[kind](data)
        if kind in COMPRESSIONS:
            data = COMPRESSIONS[kind](mutated(data, chance) if chance.random() < 0.3 else data)
    for _ in range(chance.choice([0, 0, 1, 1, 1, 4])):
        data = mutated(data, chance)
    location = folder / f"{number}.{kind}"
    location.write_bytes(data)
    return location
