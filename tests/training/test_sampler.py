"""Every tile once an epoch, in the same global order for any number of workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import Recipe
from training.sampler import Sampler, rank_slice
from training.shards import load_index, load_tiles

tiles = st.integers(1, 400)
batch_sizes = st.integers(1, 70)
worlds = st.integers(1, 9)


@settings(deadline=None)
@given(tiles, batch_sizes, st.integers(0, 2**32), st.integers(0, 5))
def test_an_epoch_holds_every_tile_once(count: int, batch_size: int, seed: int, epoch: int) -> None:
    order = Sampler(count, batch_size, seed).epoch(epoch)
    seen = np.concatenate([order.batch(step) for step in range(order.sampler.steps)])
    assert sorted(seen) == list(range(count))


@settings(deadline=None)
@given(tiles, batch_sizes, worlds)
def test_ranks_split_each_global_batch_in_order(count: int, batch_size: int, world: int) -> None:
    epoch = Sampler(count, batch_size, 7).epoch(0)
    for step in range(epoch.sampler.steps):
        shares = [epoch.share(step, rank, world) for rank in range(world)]
        alone, keys = epoch.share(step, 0, 1)
        assert np.concatenate([positions for positions, _ in shares]).tolist() == alone.tolist()
        assert np.concatenate([k for _, k in shares]).tolist() == keys.tolist()


@settings(deadline=None)
@given(tiles, batch_sizes, worlds, worlds, st.data())
def test_changing_workers_in_mid_epoch_neither_skips_nor_repeats(
    count: int, batch_size: int, before: int, after: int, data: st.DataObject
) -> None:
    epoch = Sampler(count, batch_size, 3).epoch(1)
    switch = data.draw(st.integers(0, epoch.sampler.steps))
    seen: list[int] = []
    for step in range(epoch.sampler.steps):
        world = before if step < switch else after
        for rank in range(world):
            seen += epoch.share(step, rank, world)[0].tolist()
    assert seen == epoch.order.tolist()


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), batch_sizes, st.integers(1, 14), worlds, st.data())
def test_a_window_mixes_so_many_shards_at_a_time_and_leaves_no_tile_out(
    shards: list[int], batch_size: int, window: int, world: int, data: st.DataObject
) -> None:
    sampler = Sampler(sum(shards), batch_size, data.draw(st.integers(0, 2**32)), window, tuple(shards))
    epoch = sampler.epoch(data.draw(st.integers(0, 5)))
    assert sorted(epoch.order) == list(range(sum(shards)))
    shares = [epoch.share(step, rank, world)[0] for step in range(sampler.steps) for rank in range(world)]
    assert np.concatenate(shares).tolist() == epoch.order.tolist()
    left = np.repeat(np.arange(len(shards)), shards)[epoch.order].tolist()
    while left:
        now = list(dict.fromkeys(left))[:window]
        count = sum(shards[shard] for shard in now)
        assert set(left[:count]) == set(now)
        assert not set(left[count:]) & set(now)
        left = left[count:]


def test_windows_and_what_is_in_them_differ_from_epoch_to_epoch() -> None:
    sampler = Sampler(400, 10, 0, window=2, shards=(100,) * 4)
    pairs = {frozenset((sampler.epoch(epoch).order[:200] // 100).tolist()) for epoch in range(40)}
    assert len(pairs) == 6
    first, later = (sampler.epoch(epoch).order for epoch in (0, 1))
    assert np.corrcoef(np.argsort(first) % 100, np.argsort(later) % 100)[0, 1] < 0.2
    assert abs(np.corrcoef(first[:200] % 100, np.arange(200))[0, 1]) < 0.2  # mixed, not shard after shard


def test_a_window_of_all_shards_is_the_order_without_one() -> None:
    assert Sampler(30, 7, 5, 3, (10, 10, 10)).epoch(4).order.tolist() == Sampler(30, 7, 5).epoch(4).order.tolist()


def test_windows_are_made_of_the_shards_in_which_tiles_really_lie(
    small_recipe: dict[str, object], shards: Path
) -> None:
    recipe = Recipe.model_validate(small_recipe | {"shuffle_window": 1})
    shard_of = np.array(load_tiles(shards, "train")["shard"].to_pylist())
    order = Sampler.of(recipe, load_index(shards)).epoch(0).order
    changes = int((shard_of[order][1:] != shard_of[order][:-1]).sum())
    assert changes == len(set(shard_of)) - 1 > 0
    assert (np.diff(order) != 1).any()


@settings(deadline=None, max_examples=30)
@given(tiles, batch_sizes, worlds, st.integers(0, 5))
def test_partners_are_the_tiles_of_the_global_batch_with_their_own_keys(
    count: int, batch_size: int, world: int, number: int
) -> None:
    epoch = Sampler(count, batch_size, 11, pairs=True).epoch(number)
    for step in range(epoch.sampler.steps):
        key_of = dict(zip(*(array.tolist() for array in epoch.share(step, 0, 1)), strict=True))
        shares = [epoch.partners(step, rank, world) for rank in range(world)]
        positions = np.concatenate([positions for positions, _ in shares]).tolist()
        assert sorted(positions) == sorted(key_of)
        assert np.concatenate([k for _, k in shares]).tolist() == [key_of[position] for position in positions]
        assert positions == epoch.partners(step, 0, 1)[0].tolist()
        for rank, (mine, _) in enumerate(shares):
            assert len(mine) == len(epoch.share(step, rank, world)[0])


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 50))
def test_shares_differ_by_at_most_one(count: int, world: int) -> None:
    sizes = [len(range(count)[rank_slice(count, rank, world)]) for rank in range(world)]
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1


def test_epochs_and_seeds_differ() -> None:
    orders = [Sampler(1000, 10, seed).epoch(epoch).order.tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_is_fixed_for_all_time() -> None:
    """A resumed run must find the order of the version that began it."""
    assert Sampler(10, 4, 0).epoch(0).order.tolist() == [0, 9, 1, 6, 3, 5, 4, 2, 8, 7]
    assert Sampler(10, 4, 1).epoch(2).order.tolist() == [8, 7, 5, 6, 1, 4, 3, 0, 2, 9]
