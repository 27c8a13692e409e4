"""Labelled tiles that look like land cover seen from a satellite, for the demo, the tests and the benchmarks.

In go a class and a number, out comes always the same image. Classes overlap a little, as real ones do: a straight river
and a wide road, a green field and a pasture. ``write_tiles`` makes class folders to pack.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from PIL import Image

from cluster import storage
from configs.errors import UsageError
from training.survey import Progress, in_order
from training.texture import Draws, Floats, noise, paint, plots, rough, soften, step, turned, wave

CLASSES: tuple[str, ...] = ("Crop", "Desert", "Forest", "Highway", "Pasture", "River", "Urban", "Water")
"""Class names, sorted, so that a label here is the label in a shard set of all of them."""

_BATCH = 50  # tiles a thread makes at a time

# Colours are muted and a little blue, as in true-colour Sentinel-2 tiles without atmospheric correction.
_SOIL = ((139, 118, 103), (158, 140, 122), (118, 104, 97), (171, 156, 134))
_GREEN = ((82, 100, 79), (94, 112, 82), (74, 92, 84), (106, 117, 88))
_WOOD = ((45, 66, 63), (52, 72, 62), (40, 58, 62), (58, 76, 66))
_WATER = ((38, 62, 92), (46, 74, 98), (34, 52, 80), (62, 88, 98))
_SILT = ((88, 100, 100), (104, 108, 104), (74, 92, 96), (96, 96, 92))
_ASPHALT = ((122, 122, 124), (142, 140, 138), (104, 108, 112), (156, 152, 146))
_ROOF = ((150, 142, 138), (166, 128, 114), (188, 184, 180), (118, 116, 120))
_SAND = ((190, 163, 132), (201, 178, 148), (176, 148, 120), (184, 160, 138))


def tile(label: int, number: int, size: int = 64, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Tile ``number`` of class ``label`` (a position in :data:`CLASSES`): uint8 ``[size, size, 3]``, RGB."""
    draws = Draws(seed, label, number, size)
    painted = _PAINTERS[CLASSES[label]](draws, size)
    gain, haze = draws.between(0.82, 1.1), draws.between(0, 22)
    tint = np.array([0.8, 0.95, 1.15], dtype=np.float32) * haze
    grain = (draws.take(size, size, 1) - 0.5) * draws.between(4, 12)
    pixels: npt.NDArray[np.uint8] = np.clip(soften(painted) * gain + tint + grain, 0, 255).astype(np.uint8)
    return pixels


def write_tiles(
    out: str,
    tiles_per_class: int,
    *,
    size: int = 64,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write ``out/CLASS/CLASS_NUMBER.jpg`` (quality 90) with ``workers`` threads, by default one a core.

    Raises :class:`UsageError` where ``out`` holds something already.
    """
    if storage.list_files(out, recursive=True):
        raise UsageError(f"{out}: holds something already; choose a new or empty folder")
    for name in CLASSES:
        storage.make_dirs(storage.join(out, name))

    def write(batch: tuple[int, range]) -> int:
        label, numbers = batch
        for number in numbers:
            buffer = io.BytesIO()
            Image.fromarray(tile(label, number, size, seed)).save(buffer, "JPEG", quality=90)
            name = f"{CLASSES[label]}_{number}.jpg"
            storage.write_bytes(storage.join(out, CLASSES[label], name), buffer.getvalue())
        return len(numbers)

    starts = range(0, tiles_per_class, _BATCH)
    batches = [(k, range(i, min(i + _BATCH, tiles_per_class))) for i in starts for k in range(len(CLASSES))]
    workers = workers or os.cpu_count() or 1
    done = 0
    with ThreadPoolExecutor(workers) as threads:
        for count in in_order(threads, write, batches, 2 * workers):
            done += count
            if progress:
                progress("draw", done, tiles_per_class * len(CLASSES))


def _farmland(draws: Draws, size: int, scale: float, green: float) -> Floats:
    """Fields with rows and borders; about the share ``green`` of them is under green crops."""
    fields = plots(draws, size, scale, draws.between(0.8, 2.4))
    is_green = draws.take(64, 1) < green
    colours = np.where(is_green, draws.colours(_GREEN, 64), draws.colours(_SOIL, 64))
    strength = draws.take(64) * 14
    place = np.where((draws.take(64) < 0.5)[fields.number], fields.along, fields.across)
    rows = (draws.take(64) * 9 + 4)[fields.number] * place
    light = wave(rows) * strength[fields.number] + (noise(draws, size, 6) + noise(draws, size, 14)) * 9
    image = colours[fields.number] + light[..., None]
    width = draws.between(0.0, 1.4) * scale / size
    border = draws.colour(_WOOD if draws.chance(0.5) else _SAND) * 0.9
    return paint(image, step(fields.edge, width, scale / size), border, 0.8)


def _crop(draws: Draws, size: int) -> Floats:
    return _farmland(draws, size, draws.between(1.2, 3.6), draws.between(0.1, 0.8))


def _pasture(draws: Draws, size: int) -> Floats:
    fields = plots(draws, size, draws.between(0.7, 2.2), draws.between(0.8, 1.8))
    base = draws.colour(_GREEN)
    image: Floats = base + (draws.colours(_GREEN, 64) - base)[fields.number] * draws.between(0.2, 0.7)
    mottle = noise(draws, size, 4) * 16 + noise(draws, size, 11) * 12
    image = image + mottle[..., None] * np.array([1.0, 0.85, 0.7], dtype=np.float32)
    hedge = draws.between(-1.0, 1.8) / size
    image = paint(image, step(fields.edge, hedge, 1.5 / size), draws.colour(_WOOD), 0.75)
    trees = noise(draws, size, size // 4) - draws.between(0.55, 1.0)
    return paint(image, step(-trees, 0, 0.2), draws.colour(_WOOD), 0.8)


def _forest(draws: Draws, size: int) -> Floats:
    crowns = noise(draws, size, max(4, size // 3)) * 9 + noise(draws, size, size // 6) * 7
    stands = noise(draws, size, 3)
    dark, light = draws.colours(_WOOD, 2)
    image: Floats = dark + (light - dark) * (stands * 0.5 + 0.5)[..., None] + crowns[..., None]
    if draws.chance(0.35):
        clearing = draws.between(0.2, 0.6) - rough(draws, size, 3)
        image = paint(image, step(clearing, 0, 0.15), draws.colour(_GREEN), 0.8)
    return image


def _water(draws: Draws, size: int) -> Floats:
    u, _ = turned(draws, size)
    deep, shallow = draws.colours(_WATER, 2)
    depth = np.clip(u * draws.between(0, 1.0) + 0.4 + noise(draws, size, 3) * 0.2, 0, 1)
    image: Floats = (
        deep + (shallow - deep) * depth[..., None] + (noise(draws, size, 12) * draws.between(0, 4))[..., None]
    )
    if draws.chance(0.35):
        shore = u + noise(draws, size, 4) * 0.12 - draws.between(0.15, 0.5)
        land = draws.colour(_GREEN if draws.chance(0.6) else _SAND) + (noise(draws, size, 12) * 8)[..., None]
        image = paint(image, step(-shore, 0, 2 / size), land, 1.0)
    return image


def _river(draws: Draws, size: int) -> Floats:
    u, v = turned(draws, size)
    bend = wave(v * draws.between(0.4, 1.1) + draws.between(0, 1)) * (draws.between(0.03, 0.22))
    bend = bend + noise(draws, size, 3) * draws.between(0.0, 0.1)
    away = abs(u + bend + draws.between(-0.15, 0.15))
    width = draws.between(0.025, 0.11)
    image = _countryside(draws, size)
    bank = width + draws.between(0.0, 0.06) + noise(draws, size, 8) * 0.02
    image = paint(image, step(away, bank, 2 / size), draws.colour(_WOOD), 0.7)
    water = draws.colour(_SILT if draws.chance(0.4) else _WATER)
    return paint(image, step(away, width, 1.5 / size), water, 0.95)


def _highway(draws: Draws, size: int) -> Floats:
    image = _countryside(draws, size)
    asphalt = draws.colour(_ASPHALT)
    for _ in range(2 if draws.chance(0.3) else 1):
        u, v = turned(draws, size)
        bend = wave(v * draws.between(0.15, 0.45) + draws.between(0, 1)) * (draws.between(0.0, 0.12))
        away = abs(u + bend + draws.between(-0.2, 0.2))
        width = draws.between(0.016, 0.05)
        image = paint(image, step(away, width * 1.9, 1.5 / size), draws.colour(_GREEN), 0.5)
        image = paint(image, step(away, width, 1.2 / size), asphalt, 0.92)
        if width > 0.035:
            image = paint(image, step(away, 0.004, 0.8 / size), asphalt * 0.75, 0.7)
    return image


def _urban(draws: Draws, size: int) -> Floats:
    blocks = draws.between(3, 5.5)
    streets = plots(draws, size, blocks, draws.between(1, 2), 0.6)
    houses = plots(draws, size, blocks * draws.between(2.4, 4.2), draws.between(0.9, 1.8), 0.5)
    roofs = draws.colours(_ROOF, 64)[houses.number] * (draws.take(64, 1) * 0.35 + 0.8)[houses.number]
    garden = draws.colour(_GREEN) * 0.92 + (noise(draws, size, 12) * 10)[..., None]
    built = (draws.take(64) < draws.between(0.6, 0.95))[houses.number] * step(-houses.edge, -0.14, 0.12)
    image = paint(garden, built, roofs, 1.0)
    return paint(image, step(streets.edge, 0.08, blocks / size), draws.colour(_ASPHALT), 0.85)


def _desert(draws: Draws, size: int) -> Floats:
    u, _ = turned(draws, size)
    warp = noise(draws, size, 3) * draws.between(0.06, 0.2) + noise(draws, size, 7) * 0.03
    ridge = wave((u + warp) * draws.between(3, 9))
    image: Floats = draws.colour(_SAND) + (ridge * draws.between(3, 16) + noise(draws, size, 4) * 12)[..., None]
    if draws.chance(0.35):
        rock = draws.between(0.15, 0.5) - rough(draws, size, 3)
        image = paint(image, step(rock, 0, 0.2), draws.colour(_SOIL), 0.7)
    return image


_PAINTERS: dict[str, Callable[[Draws, int], Floats]] = {
    "Crop": _crop,
    "Desert": _desert,
    "Forest": _forest,
    "Highway": _highway,
    "Pasture": _pasture,
    "River": _river,
    "Urban": _urban,
    "Water": _water,
}


def _countryside(draws: Draws, size: int) -> Floats:
    """What a road or a river runs through."""
    if draws.chance(0.25):
        return _pasture(draws, size)
    return _farmland(draws, size, draws.between(1.2, 3.2), draws.between(0.2, 0.9))
