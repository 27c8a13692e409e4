"""Randomness without state: functions of what they are for."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from training.randomness import TileDropout, keys, mix, replace_dropout, set_tile_keys, symmetric_beta, uniform


def tile_keys(count: int, step: int = 0) -> torch.Tensor:
    return torch.from_numpy(keys(0, step, count=count).view("int64"))


def test_uniform_is_uniform_and_independent_between_purposes() -> None:
    a, b = uniform(tile_keys(20_000), "a"), uniform(tile_keys(20_000), "b")
    assert a.min() >= 0
    assert a.max() < 1
    assert abs(a.mean() - 0.5) < 0.01
    assert abs(a.std() - 12**-0.5) < 0.01
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.03


@pytest.mark.parametrize(
    ("alpha", "below"),
    [
        (0.5, lambda x: 2 / math.pi * math.asin(math.sqrt(x))),
        (1, lambda x: x),
        (2, lambda x: 3 * x**2 - 2 * x**3),
    ],
)
def test_symmetric_beta_has_its_distribution(alpha: float, below: Callable[[float], float]) -> None:
    values = symmetric_beta(tile_keys(20_000), "mixup", alpha)
    for x in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
        assert float((values < x).float().mean()) == pytest.approx(below(x), abs=0.015)


@pytest.mark.parametrize("alpha", [1e-3, 0.01, 1e3])
def test_symmetric_beta_stays_between_nought_and_one_for_any_alpha(alpha: float) -> None:
    values = symmetric_beta(tile_keys(20_000), "mixup", alpha)
    assert values.isfinite().all()
    assert values.min() >= 0
    assert values.max() <= 1
    assert float(values.mean()) == pytest.approx(0.5, abs=0.02)


def test_mix_has_no_collision_on_neighbours() -> None:
    assert len(set(keys(0, 1, count=10_000).tolist())) == 10_000
    assert mix(keys(0, count=3)).dtype == "uint64"


def test_dropout_keeps_the_expected_share_and_scale() -> None:
    layer = TileDropout(0.25, layer=0)
    layer.tile_keys = tile_keys(64)
    out = layer(torch.ones(64, 500))
    assert set(out.unique().tolist()) == {0.0, torch.tensor(4 / 3).item()}
    assert abs((out == 0).float().mean() - 0.25) < 0.01
    rows, columns = (out == 0).float().mean(1), (out == 0).float().mean(0)
    assert rows.std() < 0.04  # binomial: sqrt(.25 * .75 / 500) = .019
    assert columns.std() < 0.1


def test_dropout_masks_belong_to_tiles_and_not_to_workers() -> None:
    layer = TileDropout(0.5, layer=1)
    x, all_keys = torch.ones(10, 4, 3, 3), tile_keys(10)
    layer.tile_keys = all_keys
    whole = layer(x)
    layer.tile_keys = all_keys[4:]
    assert torch.equal(layer(x[4:]), whole[4:])
    layer.tile_keys = tile_keys(10, step=1)
    assert not torch.equal(layer(x), whole)


def test_dropout_differs_between_layers_and_is_idle_in_evaluation() -> None:
    model = replace_dropout(nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5))))
    set_tile_keys(model, tile_keys(8))
    first, second = [m for m in model.modules() if isinstance(m, TileDropout)]
    x = torch.ones(8, 100)
    assert not torch.equal(first(x), second(x))
    model.eval()
    assert torch.equal(model(x), x)
