"""Tiles of a split, kept in memory once they were read: as pixels where all fit, otherwise as many encoded ones as fit.

A process keeps the tiles that it has used; after a few epochs that is all of them, and training no longer reads or
decodes. What is kept never changes what is trained, only how fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from configs.errors import TilefleetError
from configs.schema import Cache
from training.decode import decode_tiles
from training.encoded import channels
from training.sampler import Positions
from training.shards import TileReader

SHARE = 4
"""The processes of a host may fill one part in so many of its free memory; each takes an equal part of that."""


class Tiles(Protocol):
    """The tiles of one split by position."""

    def load(self, positions: Positions) -> Tensor:
        """uint8 ``[B, channels, size, size]``; raises :class:`TilefleetError` where one cannot be read or decoded."""


def keep_tiles(reader: TileReader, tile_size: int, device: torch.device, cache: Cache = "auto") -> Tiles:
    """The tiles of ``reader`` behind the cache that is asked for, or that fits, for a model on ``device``."""
    decoded = len(reader) * channels(reader.bands) * tile_size**2
    if cache == "device" or (cache == "auto" and device.type == "cuda" and decoded < _free_on(device) / SHARE):
        return DecodedTiles(reader, tile_size, device)
    room = free_memory() // (SHARE * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if cache == "decoded" or (cache == "auto" and decoded < room):
        return DecodedTiles(reader, tile_size, torch.device("cpu"))
    return EncodedTiles(reader, tile_size, 0 if cache == "none" else room)


class DecodedTiles:
    """All tiles as pixels on ``device``, each decoded when it is first asked for."""

    def __init__(self, reader: TileReader, tile_size: int, device: torch.device) -> None:
        self._reader = reader
        self._size = tile_size
        shape = (channels(reader.bands), tile_size, tile_size)
        self._pixels = torch.empty((len(reader), *shape), dtype=torch.uint8, device=device)
        self._have = np.zeros(len(reader), bool)

    def load(self, positions: Positions) -> Tensor:
        """uint8 ``[B, channels, size, size]`` on the device of the cache."""
        missing = positions[~self._have[positions]]
        if len(missing):
            pixels = _decode(self._reader, self._reader.read(missing.tolist()), missing, self._size)
            self._pixels[self._places(missing)] = pixels.to(self._pixels.device)
            self._have[missing] = True
        return self._pixels[self._places(positions)]

    def _places(self, positions: Positions) -> Tensor:
        return torch.from_numpy(positions).to(self._pixels.device)


class EncodedTiles:
    """Encoded tiles, of which the first ``room`` bytes that are read are kept; decoded each time."""

    def __init__(self, reader: TileReader, tile_size: int, room: int) -> None:
        self._reader = reader
        self._size = tile_size
        self._room = room
        self._kept: dict[int, bytes] = {}

    def load(self, positions: Positions) -> Tensor:
        """uint8 ``[B, channels, size, size]`` on the CPU."""
        wanted = positions.tolist()
        missing = [position for position in wanted if position not in self._kept]
        found = dict(zip(missing, self._reader.read(missing), strict=True))
        encoded = [self._kept[position] if position in self._kept else found[position] for position in wanted]
        pixels = _decode(self._reader, encoded, positions, self._size)
        for position, data in found.items():
            if len(data) <= self._room:
                self._kept[position] = data
                self._room -= len(data)
        return pixels


def free_memory() -> int:
    """Bytes that this process and its children may still take: what the host has, less where a control group allows
    less.
    """
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    kib = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    host = kib * 1024 if kib is not None else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return min(host, *(_free_of_group(*files) for files in _GROUPS))


_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)
"""Where a control group (version 2, version 1) says what it allows, what is taken, and what could be given back."""


def _free_of_group(limit: str, used: str, details: str, reclaimable: str) -> int:
    """Bytes that a control group leaves; without one, or without a limit, more than any host has."""
    try:
        allowed = int(Path(limit).read_text())
        lines = (line.split() for line in Path(details).read_text().splitlines())
        back = next(int(count) for name, count in lines if name == reclaimable)
        return max(0, allowed - int(Path(used).read_text()) + back)
    except (OSError, ValueError, StopIteration):  # ValueError: "max" stands for no limit
        return sys.maxsize


def _free_on(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0])


def _decode(reader: TileReader, encoded: Sequence[bytes], positions: Positions, tile_size: int) -> Tensor:
    pixels, errors = decode_tiles(encoded, tile_size, reader.bands)
    for position, error in zip(positions, errors, strict=True):
        if error is not None:
            raise TilefleetError(f"{reader.root}: tile {reader.tile_ids[position]}: {error}")
    return pixels
