"""The judge: a model's own logits over the temperature, and Mahalanobis distances that tell the unfamiliar."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from training import models
from training.judge import Judge, Reference, fit_reference

PLAIN = Reference(centre=torch.zeros(1), whitening=torch.eye(1), means=torch.zeros(1, 1))


def features_of(reference: Reference, features: Tensor) -> Tensor:
    """Distances of ``features``, for which body and head have nothing to do."""
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(features.shape[1], 2))
    with torch.inference_mode():
        distances: Tensor = Judge(model, 1.0, reference)(features)[1]
    return distances


@pytest.mark.parametrize("name", sorted(models.BUILDERS))
def test_logits_are_those_of_the_model_over_the_temperature(name: str) -> None:
    torch.manual_seed(0)
    model = models.build(name, 5, 32).eval()
    x = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        expected = model(x) / 2.5
        logits, distances = Judge(copy.deepcopy(model), 2.5)(x)
    assert torch.equal(logits, expected)
    assert torch.equal(distances, torch.zeros(3))


def test_distances_are_those_of_mahalanobis_to_the_nearest_class() -> None:
    generator = torch.manual_seed(1)
    mixing = torch.randn(6, 6, generator=generator)
    means = 4 * torch.randn(3, 6, generator=generator)
    labels = torch.arange(30_000) % 3
    reference = fit_reference(means[labels] + torch.randn(30_000, 6, generator=generator) @ mixing.T, labels)
    points = 6 * torch.randn(50, 6, generator=generator)
    inverse = torch.linalg.inv((mixing @ mixing.T).double())
    away = (points[:, None] - means).double()
    expected = torch.einsum("pcf,fg,pcg->pc", away, inverse, away).amin(1).sqrt().float()
    assert torch.allclose(features_of(reference, points), expected, rtol=0.05)


def test_what_is_unlike_all_classes_is_far() -> None:
    generator = torch.manual_seed(2)
    labels = torch.arange(400) % 4
    known = torch.nn.functional.one_hot(labels, 50) * 8.0 + torch.randn(400, 50, generator=generator)
    foreign = torch.randn(100, 50, generator=generator) + 8 * torch.nn.functional.one_hot(torch.tensor([30]), 50)
    reference = fit_reference(known[:300], labels[:300])
    assert features_of(reference, known[300:]).max() < features_of(reference, foreign).min()


@pytest.mark.parametrize("tiles", [1, 2, 10, 39])
def test_few_tiles_idle_features_and_missing_classes_still_give_finite_distances(tiles: int) -> None:
    generator = torch.manual_seed(3)
    features = torch.randn(tiles, 40, generator=generator).relu()
    features[:, 7] = 0
    reference = fit_reference(features, torch.arange(tiles) % 3 * 2)
    assert len(reference.means) == min(3, tiles)
    assert features_of(reference, torch.randn(20, 40, generator=generator)).isfinite().all()


def test_a_tile_at_the_mean_of_its_class_has_no_distance() -> None:
    assert features_of(PLAIN, torch.tensor([[0.0], [3.0], [-4.0]])).tolist() == [0, 3, 4]


def test_a_feature_that_is_no_number_stays_none() -> None:
    assert features_of(PLAIN, torch.tensor([[float("nan")]])).isnan().all()
