"""Encoded images become pixels: one way for packing, training and inference, with limits before anything is decoded.

Plain JPEG goes to torchvision's decoder in batches, TIFFs of chosen bands to GDAL (:mod:`training.rasters`), everything
else to Pillow. An image that cannot be used raises or returns a reason of the form ``cause`` or ``cause: detail``, so
that reports can count by cause.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as vision

from training.encoded import (
    DAMAGED,
    MAX_BANDS,
    MAX_ENCODED_BYTES,
    MAX_PIXELS,
    Bands,
    NotColourError,
    TileError,
    channels,
    is_tiff,
    jpeg_shape,
    tiff_bands,
)
from training.rasters import decode_raster, require_bands, to_pixels

_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000")
_FORMAT_EXTENSION = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "TIFF": "tif",
    "BMP": "bmp",
    "GIF": "gif",
    "JPEG2000": "jp2",
}

# What Pillow says of a bad image stands in the error.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def decode_image(data: bytes, bands: Bands | None = None) -> Tensor:
    """One encoded image to pixels, uint8 ``[channels, height, width]``: its ``bands``, or red, green and blue.

    In RGB grey is repeated to three channels, alpha is dropped, CMYK and palettes are converted, 16-bit samples keep
    their high byte. ``bands`` are those that the file holds, but for palettes, which are looked up, and for the 16-bit
    colours of a PNG, of which Pillow gives the high byte. Raises :class:`TileError` for anything that is not one whole
    image within the limits.
    """
    _check_encoded(data)
    if bands is not None:
        array = decode_raster(data, bands) if is_tiff(data) else _decode_bands(data, bands)
        return torch.from_numpy(array)
    shape = jpeg_shape(data)
    if shape is not None and shape[2] in (1, 3):
        _check_pixels(shape[0], shape[1])
        try:
            pixels: Tensor = decode_jpeg(_buffer(data), ImageReadMode.RGB)
            return pixels
        except RuntimeError as error:
            raise TileError(DAMAGED) from error
    return _decode_with_pillow(data)


def check_image(data: bytes) -> None:
    """Raise :class:`TileError` for what cannot be decoded, whichever of its bands count."""
    try:
        decode_image(data)
    except NotColourError:
        count = min(tiff_bands(data) or 1, MAX_BANDS)
        decode_image(data, Bands(numbers=tuple(range(1, count + 1)), highest=1))


def decode_tiles(encoded: Sequence[bytes], size: int, bands: Bands | None = None) -> tuple[Tensor, list[str | None]]:
    """A batch of encoded images to one tensor.

    Returns uint8 ``[len(encoded), channels, size, size]`` and, for each tile, None or why it could not be decoded (its
    pixels are then zero). Tiles of another size are resized (bilinear, antialiased), one at a time so that memory is
    bounded.
    """
    pixels = torch.zeros(len(encoded), channels(bands), size, size, dtype=torch.uint8)
    errors: list[str | None] = [None] * len(encoded)
    plain = enumerate(encoded if bands is None else ())
    fits = [i for i, data in plain if jpeg_shape(data) in ((size, size, 3), (size, size, 1))]
    if fits:
        try:
            images = decode_jpeg([_buffer(encoded[i]) for i in fits], ImageReadMode.RGB)
            pixels[fits] = torch.stack(images)
        except RuntimeError:  # one of them is damaged; below they are decoded singly to find it
            fits = []
    done = set(fits)
    for i, data in enumerate(encoded):
        if i in done:
            continue
        try:
            pixels[i] = resize(decode_image(data, bands), size)
        except TileError as error:
            errors[i] = str(error)
    return pixels, errors


def resize(image: Tensor, size: int) -> Tensor:
    """uint8 ``[channels, height, width]`` to ``[channels, size, size]``; the same tensor where it already fits."""
    if image.shape[-2:] == (size, size):
        return image
    resized: Tensor = vision.resize(image, [size, size], antialias=True)
    return resized


def image_extension(data: bytes) -> str:
    """The usual file ending of an image by its content, without the dot; :class:`TileError` for anything else."""
    if jpeg_shape(data) is not None:
        return "jpg"
    if is_tiff(data):
        return "tif"
    with _open(data) as image:
        return _FORMAT_EXTENSION[str(image.format)]


def picture(pixels: Tensor) -> Image.Image:
    """A tile of uint8 ``[channels, height, width]`` for people: its first three channels as red, green and blue, or in
    grey where it has fewer.
    """
    shown = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
    return Image.fromarray(shown.permute(1, 2, 0).numpy())


def _check_encoded(data: bytes) -> None:
    if not data:
        raise TileError("empty file")
    if len(data) > MAX_ENCODED_BYTES:
        raise TileError(f"image file over the limit: {len(data)} bytes, {MAX_ENCODED_BYTES} allowed")


def _check_pixels(height: int, width: int) -> None:
    if height == 0 or width == 0:
        raise TileError("image has no pixels")
    if height * width > MAX_PIXELS:
        raise TileError(f"image over the pixel limit: {width}x{height}, {MAX_PIXELS} pixels allowed")


def _buffer(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a copy, as tensors over read-only memory warn


def _open(data: bytes) -> Image.Image:
    _check_encoded(data)
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        _check_pixels(image.height, image.width)
        frames = getattr(image, "n_frames", 1)
    except TileError:
        raise
    except UnidentifiedImageError as error:
        if count := tiff_bands(data):
            raise NotColourError(
                f"not an RGB image: {count} bands; choose some with `tilefleet pack --bands`"
            ) from error
        raise TileError("not an image") from error
    except Image.DecompressionBombError as error:
        raise TileError("image over the pixel limit") from error
    except Exception as error:  # Pillow's parsers raise many types on damaged headers
        raise TileError(DAMAGED) from error
    if frames != 1 and image.format != "MPO":
        raise TileError(f"animated or multi-page image: {frames} frames")
    return image


def _jpeg2000_is_whole(data: bytes) -> bool:
    """Whether the boxes of a JPEG 2000 file (ISO/IEC 15444-1, Annex I) fill it and its code stream has an end."""
    at = 0
    while at < len(data) and not data.startswith(b"\xff\x4f\xff\x51", at):
        length = int.from_bytes(data[at : at + 4], "big")
        if length == 1:
            length = int.from_bytes(data[at + 8 : at + 16], "big")
        if length == 0:
            break
        at += max(length, 8)
    return at == len(data) or (at < len(data) and data.endswith(b"\xff\xd9"))


@contextmanager
def _decoding(data: bytes) -> Iterator[Image.Image]:
    """An image for Pillow to decode in the block; what it raises on damaged data becomes a :class:`TileError`."""
    with _open(data) as image:
        if image.format == "JPEG2000" and not _jpeg2000_is_whole(data):  # its decoder fills in what is missing
            raise TileError(DAMAGED)
        try:
            yield image
        except TileError:
            raise
        except Exception as error:  # Pillow's decoders raise many types on damaged data
            raise TileError(DAMAGED) from error


def _decode_bands(data: bytes, bands: Bands) -> NDArray[np.uint8]:
    with _decoding(data) as image:
        if image.mode in ("P", "PA"):
            samples = image.convert("RGBA" if image.has_transparency_data else "RGB")
        else:
            samples = image.convert("L") if image.mode == "1" else image
        array = np.atleast_3d(np.asarray(samples))
        require_bands(bands, array.shape[2])
        return np.stack([to_pixels(array[:, :, number - 1], bands) for number in bands.numbers])


def _decode_with_pillow(data: bytes) -> Tensor:
    with _decoding(data) as image:
        if image.mode.startswith("I"):
            samples = np.asarray(image).astype(np.int64)
            if samples.min() < 0 or samples.max() > 0xFFFF:
                raise NotColourError(f"pixel format not supported: {image.mode} beyond 16 bit")
            array = np.repeat((samples >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
        elif image.mode == "F":
            raise NotColourError("pixel format not supported: floating point")
        else:
            array = np.array(image.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()
