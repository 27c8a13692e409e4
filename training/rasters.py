"""TIFFs of any bands and any samples become pixels: GDAL reads them, through rasterio, from memory.

Bytes come in, uint8 channels go out. Nothing but these bytes is opened, whatever names a file holds of others: sidecars
and georeferencing are not looked for, GDAL's own metadata is hidden from it, and neither masks nor overviews, which may
lie elsewhere, are asked for.
"""

from __future__ import annotations

import logging
import struct
import warnings
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from training.encoded import DAMAGED, MAX_PIXELS, Bands, TileError, tiff_entries

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

MAX_RASTER_BYTES = 512 << 20
"""Largest raster that is decoded, all its bands together, and the largest block of one; GDAL holds a block whole."""

_METADATA, _UNKNOWN = 42112, 42111

_SETTINGS = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_PAM_ENABLED": "NO"}


def decode_raster(data: bytes, bands: Bands) -> NDArray[np.uint8]:
    """The ``bands`` of a TIFF, uint8 ``[channels, height, width]``.

    What is no number, infinite or the file's own "no data" becomes 0. Raises :class:`TileError` for anything that is
    not one whole raster of real numbers with these bands, within the limits.
    """
    rasterio = _rasterio()
    try:
        with (
            rasterio.Env(session=rasterio.session.DummySession(), **_SETTINGS),
            rasterio.io.MemoryFile(_without_metadata(data)) as memory,
            memory.open(driver="GTiff", GEOREF_SOURCES="NONE") as raster,
        ):
            _check(raster, bands)
            missing = raster.nodatavals
            return np.stack([to_pixels(raster.read(n), bands, missing[n - 1]) for n in bands.numbers])
    except TileError:
        raise
    except Exception as error:  # rasterio raises many types on damaged data
        raise TileError(DAMAGED) from error


def to_pixels(samples: NDArray[Any], bands: Bands, missing: float | None = None) -> NDArray[np.uint8]:
    """Samples of any real type, ``[height, width]``, as uint8: ``bands`` says which become 0 and 255.

    What is not finite, or equal to ``missing``, becomes 0.
    """
    values = samples.astype(np.float64)
    with np.errstate(all="ignore"):
        scaled = ((values - bands.lowest) / (bands.highest - bands.lowest) * 255).round().clip(0, 255)
        scaled[~np.isfinite(values) | (samples == missing)] = 0
    return scaled.astype(np.uint8)


def require_bands(bands: Bands, count: int) -> None:
    """Raise :class:`TileError` where an image of ``count`` bands lacks one of ``bands``."""
    if max(bands.numbers) > count:
        raise TileError(f"band {max(bands.numbers)} asked for, the image has {count}")


def _without_metadata(data: bytes) -> bytes:
    """``data`` with GDAL's own XML under a number that means nothing to GDAL.

    It says nothing about samples, can name other files, and where it is damaged rasterio prints a stack trace.
    """
    entries = [entry for tag, entry in tiff_entries(data) if tag == _METADATA]
    if not entries:
        return data
    patched = bytearray(data)
    for entry in entries:
        struct.pack_into("<H" if data.startswith(b"II") else ">H", patched, entry, _UNKNOWN)
    return bytes(patched)


def _check(raster: DatasetReader, bands: Bands) -> None:
    """What must be so before a block is read, as that takes memory."""
    if pages := len(raster.subdatasets):
        raise TileError(f"animated or multi-page image: {pages} frames")
    if raster.height * raster.width > MAX_PIXELS:
        raise TileError(f"image over the pixel limit: {raster.width}x{raster.height}, {MAX_PIXELS} pixels allowed")
    require_bands(bands, raster.count)
    if "complex" in raster.dtypes[0]:
        raise TileError("pixel format not supported: complex numbers")
    each = np.dtype(raster.dtypes[0]).itemsize
    rows, columns = raster.block_shapes[0]
    if max(raster.height * raster.width, rows * columns) * raster.count * each > MAX_RASTER_BYTES:
        size = f"{raster.width}x{raster.height} of {raster.count} bands in blocks of {columns}x{rows}"
        raise TileError(f"image over the byte limit: {size}, {MAX_RASTER_BYTES} bytes allowed")


@cache
def _rasterio() -> ModuleType:
    """rasterio, which takes a third of a second to import, with neither its warnings nor GDAL's on stderr."""
    logging.getLogger("rasterio").setLevel(logging.CRITICAL)
    import rasterio
    import rasterio.io
    import rasterio.session

    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    module: ModuleType = rasterio
    return module
