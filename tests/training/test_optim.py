"""Learning rates and class weights: functions of where the run is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import ScheduleConfig
from training.optim import class_weights, rate
from training.progress import Progress


def rates(epochs: int = 10, steps: int = 20, **schedule: object) -> list[float]:
    config = ScheduleConfig.model_validate(schedule)
    return [rate(config, step, steps, epochs) for step in range(steps * epochs)]


def test_warmup_rises_in_a_line_to_the_full_rate() -> None:
    assert rates(name="constant", warmup=4)[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_from_the_full_rate_to_nearly_nothing() -> None:
    values = rates(name="cosine", warmup=10)
    assert values[10] == 1.0
    assert values[10:] == sorted(values[10:], reverse=True)
    assert 0 <= values[-1] < 1e-3


def test_step_falls_every_few_epochs() -> None:
    values = rates(name="step", warmup=0, every_epochs=4, factor=0.5)
    assert [values[epoch * 20] for epoch in range(10)] == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_one_cycle_is_that_of_torch() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=200, div_factor=25, final_div_factor=1e4 / 25, cycle_momentum=False
    )
    expected = []
    for _ in range(200):
        expected.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    assert rates(name="one_cycle") == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_a_plateau_lowers_the_rate_after_patience_epochs_without_a_lower_loss() -> None:
    progress, drops = Progress(), []
    for loss in (1.0, 0.9, 0.9, 0.95, 0.8, 0.85, 0.85, 0.85, 0.85):
        progress = progress.after_epoch(loss, 0.5, patience=2)
        drops.append(progress.drops)
    assert drops == [0, 0, 0, 1, 1, 1, 2, 2, 3]
    config = ScheduleConfig(name="plateau", warmup=0, factor=0.1)
    assert rate(config, 100, 20, 10, drops=2) == pytest.approx(0.01)


def test_an_empty_validation_split_always_counts_as_better() -> None:
    progress = Progress()
    for _ in range(5):
        progress = progress.after_epoch(math.nan, math.nan, patience=1)
        assert (progress.epochs_since_best, progress.drops) == (0, 0)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=200))
def test_class_weights_give_each_class_the_same_say(labels: list[int]) -> None:
    weights = class_weights(torch.tensor(labels), 6)
    says = torch.zeros(6).index_add(0, torch.tensor(labels), weights[torch.tensor(labels)])
    present = says[says > 0]
    assert torch.allclose(present, present[0].expand_as(present), rtol=1e-4)
    assert float(weights[torch.tensor(labels)].mean()) == pytest.approx(1, rel=1e-4)
