"""Batch statistics over all workers: those of one worker, counted right, under the names that torch gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.schema import Recipe
from tests.runs import losses, torchrun, write_recipe
from training import models
from training.batchnorm import GlobalBatchNorm2d, replace_batch_norm, set_presence
from training.bundle import load_bundle
from training.loop import Trainer


def pair() -> tuple[nn.BatchNorm2d, nn.Module]:
    """torch's layer and ours, with the same weights, neither of them trivial."""
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(4, momentum=0.3)
    nn.init.uniform_(plain.weight, 0.5, 2)
    nn.init.normal_(plain.bias)
    ours = nn.Sequential(nn.BatchNorm2d(4, momentum=0.3))
    ours.load_state_dict({f"0.{key}": value for key, value in plain.state_dict().items()})
    return plain, replace_batch_norm(ours)


def tiles(count: int) -> Tensor:
    """Far from zero compared to their spread, where careless sums of squares go wrong."""
    return torch.randn(count, 4, 5, 6, generator=torch.manual_seed(1)) + 1000


@pytest.mark.parametrize("count", [1, 7])
def test_it_is_batch_normalisation_forward_backward_and_in_what_it_remembers(count: int) -> None:
    plain, ours = pair()
    set_presence(ours, torch.ones(count))
    found = []
    for layer in (plain, ours):
        x = tiles(count).requires_grad_()
        out = layer(x)
        (out * torch.arange(out.numel()).view_as(out).sin()).sum().backward()
        parameters = [p.grad for p in layer.parameters()]
        found.append([out.detach(), x.grad, *parameters, *layer.state_dict().values(), layer.eval()(x).detach()])
    for a, b in zip(*found, strict=True):
        assert a is not None
        assert b is not None
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_type_and_layout_stay(kind: torch.dtype) -> None:
    _, ours = pair()
    set_presence(ours, torch.ones(3))
    out = ours(torch.randn(3, 4, 5, 6).to(kind).contiguous(memory_format=torch.channels_last))
    assert out.dtype == kind
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_blanks_are_not_counted() -> None:
    _, ours = pair()
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    set_presence(ours, torch.zeros(1))
    assert ours(torch.zeros(1, 4, 5, 6)).isfinite().all()
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


def test_it_takes_the_place_of_every_layer_under_the_same_names() -> None:
    plain, ours = models.build("tilenet", 10, 32), replace_batch_norm(models.build("tilenet", 10, 32))
    kinds = [type(module) for module in ours.modules()]
    assert nn.BatchNorm2d not in kinds
    assert kinds.count(GlobalBatchNorm2d) == 16
    assert list(plain.state_dict()) == list(ours.state_dict())


@pytest.mark.process
def test_any_number_of_workers_trains_the_same_network_with_batch_statistics(small_recipe: dict[str, Any]) -> None:
    """The learning rate is low, as ReLU near zero makes of any rounding a step in the gradient (of the losses still
    moves one by 5e-3). Of 9 tiles some workers have more than others; the last step of an epoch has one tile in all.
    """
    changes: dict[str, Any] = {"model": {"name": "tilenet"}, "sync_batch_norm": True, "batch_size": 9}
    slow = {"name": "sgd", "learning_rate": 1e-5, "momentum": 0}
    alone = Recipe.model_validate(small_recipe | changes | {"optimizer": slow, "schedule": {"warmup": 0}})
    trainer = Trainer(alone, torch.device("cpu"))
    assert len(trainer.train_loader.reader) % 9 == 1
    trainer.fit()
    for workers in (2, 3):
        shared = alone.model_copy(update={"name": f"on-{workers}"})
        torchrun(workers, "-m", "training.loop", write_recipe(shared, Path(shared.runs)), timeout=200)
        assert len(losses(shared)) >= 20
        assert losses(shared) == pytest.approx(losses(alone), abs=1e-5)
        a, b = (load_bundle(f"{run.run}/bundle")[0].state_dict() for run in (alone, shared))
        assert all(torch.allclose(a[key], b[key], rtol=1e-3, atol=1e-5) for key in a if "running" in key)
