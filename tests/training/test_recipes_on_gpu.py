"""Recipes that need a GPU to be quick: twenty real steps of each on a CPU, the whole way from shards to weights."""

from __future__ import annotations

import math
from itertools import chain, islice
from pathlib import Path

import pytest
import torch

from configs.schema import load_recipe
from training.loop import Trainer
from training.pack import pack
from training.synthetic import write_tiles

CONFIGS = Path(__file__).parent.parent.parent / "configs"
STEPS = 20

pytestmark = pytest.mark.timeout(600)  # vgg16 has 134 million weights, and a machine may have other work


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Shards with tiles as wide as those that the recipes are for, by their width."""
    root = tmp_path_factory.mktemp("tiles")
    for size, tiles in ((32, 20), (64, 80)):
        write_tiles(str(root / f"raw-{size}"), tiles, size=size)
        pack(str(root / f"raw-{size}"), str(root / f"shards-{size}"), split=(80, 10, 10))
    return {size: str(root / f"shards-{size}") for size in (32, 64)}


@pytest.mark.parametrize(
    ("name", "size", "changes"),
    [
        ("eurosat_customnet", 64, []),
        ("cifar10_vgg16", 32, ["batch_size=4", "model.weights=null"]),
        ("eurosat_vgg16", 64, ["batch_size=4", "schedule.warmup=5"]),
    ],
)
def test_a_recipe_that_needs_a_gpu_takes_twenty_steps(
    name: str, size: int, changes: list[str], packed: dict[int, str], tmp_path: Path
) -> None:
    keys = [f"shards={packed[size]}", f"runs={tmp_path}", "workers=1", *changes]
    trainer = Trainer(load_recipe(CONFIGS / f"{name}.yaml", keys), torch.device("cpu"))
    learner, losses = trainer.learner, []
    before = {key: tensor.clone() for key, tensor in learner.model.state_dict().items()}
    learner.begin_epoch(0)
    epochs = (trainer.train_loader.epoch(trainer.sampler.epoch(number)) for number in range(STEPS))
    for batch in islice(chain.from_iterable(epochs), STEPS):
        losses.append(float(learner.step(batch, trainer._learning_rate(batch.step))[0]))
    assert len(losses) == STEPS
    assert all(map(math.isfinite, losses))
    for key, tensor in learner.model.state_dict().items():
        assert not torch.equal(tensor, before[key]), key
    if name == "eurosat_customnet":
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
