"""Caches of tiles: the same pixels whichever is used, no reading once all is kept, and only what fits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from configs.errors import TilefleetError
from configs.schema import Cache
from training import cache
from training.cache import DecodedTiles, EncodedTiles, keep_tiles
from training.loader import RankLoader
from training.sampler import Sampler
from training.shards import TileReader, load_index, load_tiles

CPU = torch.device("cpu")
KINDS = [kind for kind in get_args(Cache) if kind != "auto"]


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    """A shard set of the test's own."""
    return Path(shutil.copytree(shards, tmp_path / "copy"))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_the_same_with_any_cache(shards: Path, kind: Cache) -> None:
    reader, size = TileReader(shards, "train"), load_index(shards).tile_size
    plain, kept = (RankLoader(reader, size, 1, 2, cache=which) for which in ("none", kind))
    sampler = Sampler(len(reader), 7, seed=3)
    for number in range(3):
        epoch = sampler.epoch(number)
        for expected, batch in zip(plain.epoch(epoch), kept.epoch(epoch), strict=True):
            assert torch.equal(expected.pixels, batch.pixels)
            assert torch.equal(expected.labels, batch.labels)
            assert torch.equal(expected.keys, batch.keys)


@pytest.mark.parametrize("kind", ["device", "decoded", "encoded"])
def test_nothing_is_read_once_all_is_kept(copy: Path, kind: Cache) -> None:
    tiles = keep_tiles(reader := TileReader(copy, "train"), load_index(copy).tile_size, CPU, kind)
    everything = np.arange(len(reader))
    first = tiles.load(everything)
    shutil.rmtree(copy / "train")
    assert torch.equal(tiles.load(everything[::-1].copy()), first.flip(0))


def test_without_a_cache_everything_is_read_again(copy: Path) -> None:
    tiles = keep_tiles(TileReader(copy, "train"), load_index(copy).tile_size, CPU, "none")
    tiles.load(np.arange(4))
    shutil.rmtree(copy / "train")
    with pytest.raises(TilefleetError, match="shard is missing"):
        tiles.load(np.arange(4))


def test_encoded_tiles_are_kept_as_far_as_there_is_room(copy: Path) -> None:
    reader = TileReader(copy, "train")
    room = sum(map(len, reader.read(range(5)))) + 1
    tiles = EncodedTiles(reader, load_index(copy).tile_size, room)
    tiles.load(np.arange(len(reader)))
    shutil.rmtree(copy / "train")
    tiles.load(np.arange(5))
    with pytest.raises(TilefleetError, match="shard is missing"):
        tiles.load(np.arange(6, len(reader)))


def test_what_fits_is_chosen(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, size = TileReader(shards, "train"), load_index(shards).tile_size
    pixels = len(reader) * 3 * size**2
    for free, kind in ((5 * pixels, DecodedTiles), (3 * pixels, EncodedTiles)):
        monkeypatch.setattr(cache, "free_memory", lambda free=free: free)
        assert isinstance(keep_tiles(reader, size, CPU), kind)
    monkeypatch.setattr(cache, "free_memory", lambda: 5 * pixels)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two processes on this host would keep twice as much
    assert isinstance(keep_tiles(reader, size, CPU), EncodedTiles)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_tile_is_named_with_any_cache(copy: Path, kind: Cache) -> None:
    row = load_tiles(copy, "train").to_pylist()[9]
    data = bytearray((copy / row["shard"]).read_bytes())
    data[row["offset"] + row["size"] // 2] ^= 1
    (copy / row["shard"]).write_bytes(data)
    tiles = keep_tiles(reader := TileReader(copy, "train"), load_index(copy).tile_size, CPU, kind)
    with pytest.raises(TilefleetError, match="tile " + row["tile_id"] + " changed since"):
        tiles.load(np.arange(len(reader)))


def test_free_memory_is_what_the_control_group_leaves(tmp_path: Path) -> None:
    limit, used, details = [tmp_path / name for name in ("limit", "used", "details")]
    used.write_text("900\n")
    details.write_text("anon 500\ninactive_file 250\nfile 400\n")
    limit.write_text("1000\n")

    def free(details: Path = details) -> int:
        return cache._free_of_group(str(limit), str(used), str(details), "inactive_file")

    assert free() == 350
    assert free(tmp_path / "nowhere") > 1 << 60
    limit.write_text("max\n")
    assert free() > 1 << 60
    assert 0 < cache.free_memory() < 1 << 50
