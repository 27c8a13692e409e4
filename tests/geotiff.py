"""GeoTIFFs of many bands, as satellites deliver them, made in memory."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile

INFRARED = 8
"""The band, counted from 1, in which the classes that :func:`write_classes` makes differ."""


def geotiff(samples: NDArray[Any], tags: dict[str, dict[str, str]] | None = None, **options: Any) -> bytes:
    """A GeoTIFF of ``samples`` ``[bands, height, width]``; ``options`` are GDAL's, ``tags`` its metadata by domain."""
    bands, height, width = samples.shape
    with MemoryFile() as memory, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        shape = {"count": bands, "height": height, "width": width, "dtype": samples.dtype}
        with memory.open(driver="GTiff", **shape, **options) as raster:
            raster.write(samples)
            for domain, pairs in (tags or {}).items():
                raster.update_tags(ns=domain, **pairs)
        return bytes(memory.read())


def scene(label: int, seed: int, bands: int = 13, side: int = 16) -> NDArray[np.uint16]:
    """Samples of a tile of class ``label``, 0 or 1: noise that is the same for both in all bands but the infrared."""
    chance = np.random.default_rng(seed)
    samples = chance.integers(200, 2800, (bands, side, side), dtype=np.uint16)
    samples[INFRARED - 1] = chance.integers(*((300, 1200), (1800, 2700))[label], (side, side))
    return samples


def write_classes(folder: Path, tiles: int, **options: Any) -> Path:
    """Class folders ``Bare`` and ``Vegetation`` of so many GeoTIFFs each, of 13 bands in 16 bit."""
    for label, name in enumerate(("Bare", "Vegetation")):
        (folder / name).mkdir(parents=True)
        for number in range(tiles):
            data = geotiff(scene(label, 2 * number + label), compress="deflate", predictor=2, **options)
            (folder / name / f"{name}_{number}.tif").write_bytes(data)
    return folder
