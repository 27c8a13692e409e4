"""Encoded images become pixels: one way for packing, training and inference, with limits before anything is decoded.

Plain JPEG goes to torchvision's decoder in batches; everything else goes to Pillow. An image that cannot be used raises
or returns a reason of the form ``cause`` or ``cause: detail``, so that reports can count by cause.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as vision

from training.encoded import MAX_ENCODED_BYTES, MAX_PIXELS, TileError, jpeg_shape

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

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # the limit above is an error instead


def decode_image(data: bytes) -> Tensor:
    """One encoded image to RGB pixels, uint8 ``[3, height, width]``.

    Grey is repeated to three channels, alpha is dropped, CMYK and palettes are converted, 16-bit samples keep their
    high byte. Raises :class:`TileError` for anything that is not one whole image within the limits.
    """
    _check_encoded(data)
    shape = jpeg_shape(data)
    if shape is not None and shape[2] in (1, 3):
        _check_pixels(shape[0], shape[1])
        try:
            pixels: Tensor = decode_jpeg(_buffer(data), ImageReadMode.RGB)
            return pixels
        except RuntimeError as error:
            raise TileError("image is cut short or damaged") from error
    return _decode_with_pillow(data)


def decode_tiles(encoded: Sequence[bytes], size: int) -> tuple[Tensor, list[str | None]]:
    """A batch of encoded images to one tensor.

    Returns uint8 ``[len(encoded), 3, size, size]`` and, for each tile, None or why it could not be decoded (its pixels
    are then zero). Tiles of another size are resized (bilinear, antialiased), one at a time so that memory is bounded.
    """
    pixels = torch.zeros(len(encoded), 3, size, size, dtype=torch.uint8)
    errors: list[str | None] = [None] * len(encoded)
    fits = [i for i, data in enumerate(encoded) if jpeg_shape(data) in ((size, size, 3), (size, size, 1))]
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
            pixels[i] = resize(decode_image(data), size)
        except TileError as error:
            errors[i] = str(error)
    return pixels, errors


def resize(image: Tensor, size: int) -> Tensor:
    """uint8 ``[3, height, width]`` to ``[3, size, size]``; the same tensor where it already fits."""
    if image.shape[-2:] == (size, size):
        return image
    resized: Tensor = vision.resize(image, [size, size], antialias=True)
    return resized


def image_extension(data: bytes) -> str:
    """The usual file ending of an image by its content, without the dot; :class:`TileError` for anything else."""
    if jpeg_shape(data) is not None:
        return "jpg"
    with _open(data) as image:
        return _FORMAT_EXTENSION[str(image.format)]


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
        raise TileError("not an image") from error
    except Image.DecompressionBombError as error:
        raise TileError("image over the pixel limit") from error
    except Exception as error:  # Pillow's parsers raise many types on damaged headers
        raise TileError("image is cut short or damaged") from error
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


def _decode_with_pillow(data: bytes) -> Tensor:
    with _open(data) as image:
        if image.format == "JPEG2000" and not _jpeg2000_is_whole(data):  # its decoder fills in what is missing
            raise TileError("image is cut short or damaged")
        try:
            if image.mode.startswith("I"):
                samples = np.asarray(image).astype(np.int64)
                if samples.min() < 0 or samples.max() > 0xFFFF:
                    raise TileError(f"pixel format not supported: {image.mode} beyond 16 bit")
                array = np.repeat((samples >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
            elif image.mode == "F":
                raise TileError("pixel format not supported: floating point")
            else:
                array = np.array(image.convert("RGB"))
        except TileError:
            raise
        except Exception as error:  # Pillow's decoders raise many types on damaged data
            raise TileError("image is cut short or damaged") from error
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()
