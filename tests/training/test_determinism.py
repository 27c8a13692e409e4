"""Deterministic runs: torch is told so for their time, and the one layer that stands in the way is replaced."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn

from configs.schema import Recipe
from training import models
from training.bundle import load_bundle
from training.determinism import CUBLAS, MatrixPool2d, deterministic, replace_pooling
from training.loop import Trainer


def settings() -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark, os.environ.get(CUBLAS)


@pytest.mark.parametrize("workspace", [None, ":16:8"])
def test_settings_hold_in_the_block_and_are_undone_even_after_an_error(
    workspace: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(CUBLAS, raising=False)
    if workspace:
        monkeypatch.setenv(CUBLAS, workspace)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = settings()
    with deterministic(False):
        assert settings() == before

    def fail() -> None:
        with deterministic(True):
            assert settings() == (True, True, False, workspace or ":4096:8")
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert settings() == before


def test_what_is_not_deterministic_is_refused_in_the_block() -> None:
    pool = nn.MaxUnpool2d(2)
    values, places = nn.MaxPool2d(2, return_indices=True)(torch.randn(1, 1, 4, 4))
    pool(values, places)
    with deterministic(True), pytest.raises(RuntimeError, match="deterministic"):
        pool(values, places)


@pytest.mark.parametrize("inputs", [(2, 2), (1, 1), (7, 7), (5, 9), (14, 3)])
@pytest.mark.parametrize("output", [1, 7, (2, 3), (None, 4)])
def test_pooling_by_matrices_is_adaptive_average_pooling(inputs: tuple[int, int], output: Any) -> None:
    found = []
    for layer in (nn.AdaptiveAvgPool2d(output), MatrixPool2d(output)):
        x = torch.randn(2, 3, *inputs, generator=torch.manual_seed(0)).requires_grad_()
        out = layer(x)
        (out * torch.arange(out.numel()).view_as(out).sin()).sum().backward()
        found.append((out.detach(), x.grad))
    for a, b in zip(*found, strict=True):
        assert a is not None
        assert b is not None
        assert torch.allclose(a, b, atol=1e-5)


def test_pooling_is_replaced_under_the_same_names() -> None:
    with torch.device("meta"):
        plain, ours = models.build("vgg16", 10, 32), replace_pooling(models.build("vgg16", 10, 32))
    assert any(isinstance(module, MatrixPool2d) for module in ours.modules())
    assert list(plain.state_dict()) == list(ours.state_dict())


def test_a_deterministic_run_trains_with_the_settings_and_leaves_none_behind(small_recipe: dict[str, Any]) -> None:
    before, seen, bundles = settings(), [], []
    for name in ("one", "two"):
        keys = {"name": name, "model": {"name": "tilenet"}, "deterministic": True, "epochs": 1}
        trainer = Trainer(Recipe.model_validate(small_recipe | keys), torch.device("cpu"))
        trainer.report = lambda _: seen.append(settings())
        trainer.fit()
        bundles.append(load_bundle(f"{trainer.recipe.run}/bundle")[0].state_dict())
    assert seen == [(True, True, False, ":4096:8")] * 2
    assert settings() == before
    assert all(torch.equal(bundles[0][key], bundles[1][key]) for key in bundles[0])
