"""Every tile once an epoch, in the same global order for any number of workers."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from training.sampler import Sampler, rank_slice

tiles = st.integers(1, 400)
batch_sizes = st.integers(1, 70)
worlds = st.integers(1, 9)


@given(tiles, batch_sizes, st.integers(0, 2**32), st.integers(0, 5))
def test_an_epoch_holds_every_tile_once(count: int, batch_size: int, seed: int, epoch: int) -> None:
    order = Sampler(count, batch_size, seed).epoch(epoch)
    seen = np.concatenate([order.batch(step) for step in range(order.sampler.steps)])
    assert sorted(seen) == list(range(count))


@given(tiles, batch_sizes, worlds)
def test_ranks_split_each_global_batch_in_order(count: int, batch_size: int, world: int) -> None:
    epoch = Sampler(count, batch_size, 7).epoch(0)
    for step in range(epoch.sampler.steps):
        shares = [epoch.share(step, rank, world) for rank in range(world)]
        alone, keys = epoch.share(step, 0, 1)
        assert np.concatenate([positions for positions, _ in shares]).tolist() == alone.tolist()
        assert np.concatenate([k for _, k in shares]).tolist() == keys.tolist()


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
