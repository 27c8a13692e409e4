"""What synthetic tiles are painted with: repeatable random numbers, noise, waves, plots of land, soft edges.

Only operations that every processor rounds alike are used (no sine, no sums), so an image is the same on any machine.
Sizes are in pixels, places in tiles (from -0.5 to 0.5), colours 0..255; a field of values is float32 ``[size, size]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from training.randomness import keys

Floats = npt.NDArray[np.floating[Any]]
Palette = tuple[tuple[int, int, int], ...]


class Draws:
    """The random numbers of one tile, handed out in order: float32 in [0, 1), hashes of what the tile is."""

    def __init__(self, seed: int, label: int, number: int, size: int) -> None:
        count = 2048 + 2 * size * size  # patterns need less than half of it, grain the rest
        self._values = (keys(seed, label, number, count=count) >> np.uint64(40)).astype(np.float32) * (2**-24)
        self._at = 0

    def take(self, *shape: int) -> Floats:
        """The next ones, as an array."""
        count = prod(shape)
        self._at += count
        return self._values[self._at - count : self._at].reshape(shape)

    def between(self, low: float, high: float) -> float:
        """One number, evenly spread."""
        return low + (high - low) * float(self.take(1)[0])

    def chance(self, share: float) -> bool:
        """True in this share of tiles."""
        return self.between(0, 1) < share

    def colour(self, palette: Palette) -> Floats:
        """A colour between two neighbours of a palette, a little brighter or darker."""
        colour: Floats = self.colours(palette, 1)[0]
        return colour

    def colours(self, palette: Palette, count: int) -> Floats:
        """``[count, 3]`` of them."""
        table = np.array(palette, dtype=np.float32)
        place, light = self.take(count) * len(table), self.take(count, 1)
        first = place.astype(np.int64)
        blend = (place - np.floor(place))[:, None] * 0.5
        mixed = table[first] * (1 - blend) + table[(first + 1) % len(table)] * blend
        colours: Floats = mixed * (0.88 + 0.24 * light)
        return colours


@dataclass(frozen=True)
class Plots:
    """A patchwork of plots: at each pixel the number of its plot, the place in it (0..1), the distance to its edge."""

    number: npt.NDArray[np.int64]
    along: Floats
    across: Floats
    edge: Floats


def plots(draws: Draws, size: int, scale: float, stretch: float, stagger: float = 1.0) -> Plots:
    """``scale`` plots fit along a tile; each is ``stretch`` times as long as wide; rows are shifted by ``stagger``."""
    u, v = turned(draws, size)
    u = u * scale + draws.between(0, 8)
    row = np.floor(u)
    shift = draws.take(32) * stagger
    v = v * (scale / stretch) + draws.between(0, 8) + shift[row.astype(np.int64) & 31]
    column = np.floor(v)
    along, across = v - column, u - row
    number = (row.astype(np.int64) * 7 + column.astype(np.int64) * 19) & 63
    edge = np.minimum(np.minimum(across, 1 - across), np.minimum(along, 1 - along) * stretch)
    return Plots(number, along, across, edge)


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[Floats, Floats]:
    """Pixel centres from -0.5 to 0.5: two float32 ``[size, size]``."""
    line = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    return line[:, None], line[None, :]


def turned(draws: Draws, size: int) -> tuple[Floats, Floats]:
    """The grid in a random direction."""
    y, x = _grid(size)
    a, b = draws.between(-1, 1), draws.between(0.05, 1)
    length = sqrt(a * a + b * b)
    cosine, sine = a / length, b / length
    return cosine * x + sine * y, cosine * y - sine * x


@lru_cache(maxsize=64)
def _between_knots(size: int, cells: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """For each of ``size`` pixels: the knot before it, and how far it is to the next, eased (Perlin 2002)."""
    at = (np.arange(size, dtype=np.float32) + 0.5) * (cells / size)
    first = at.astype(np.int64)
    t = at - np.floor(at)
    return first, t * t * t * (t * (t * 6 - 15) + 10)


def noise(draws: Draws, size: int, cells: int) -> Floats:
    """Value noise in [-1, 1]: random knots, ``cells`` apart a tile, smoothly joined; float32 ``[size, size]``."""
    knots = draws.take(cells + 1, cells + 1) * 2 - 1
    first, t = _between_knots(size, cells)
    rows = knots[first] + (knots[first + 1] - knots[first]) * t[:, None]
    joined: Floats = rows[:, first] + (rows[:, first + 1] - rows[:, first]) * t
    return joined


def rough(draws: Draws, size: int, cells: int) -> Floats:
    """Noise with finer noise on it, about -1 to 1, for ragged outlines."""
    coarse, fine = noise(draws, size, cells), noise(draws, size, 3 * cells)
    outline: Floats = coarse * 0.7 + fine * 0.3 + noise(draws, size, 6 * cells) * 0.15
    return outline


def wave(x: Floats) -> Floats:
    """A smooth wave of period 1 between -1 and 1, out of parabolas."""
    t = x - np.floor(x)
    t = abs(t + t - 1)
    return t * t * (6 - 4 * t) - 1


def step(x: Floats, edge: Floats | float, softness: float) -> Floats:
    """1 where ``x`` is below ``edge``, 0 above, blended over ``softness``."""
    return np.clip((edge - x) / softness + 0.5, 0, 1)


def paint(image: Floats, cover: Floats, colour: Floats, opacity: float) -> Floats:
    """``colour`` (or an image) laid over ``image`` where ``cover`` ``[size, size]`` is 1."""
    return image + (colour - image) * (cover * opacity)[..., None]


def soften(image: Floats) -> Floats:
    """The blur of a real sensor: each pixel gives a little to its four neighbours."""
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    around = padded[2:, 1:-1] + padded[:-2, 1:-1] + padded[1:-1, 2:] + padded[1:-1, :-2]
    return image * 0.6 + around * 0.1
