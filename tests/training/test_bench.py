"""The benchmarks: what they report follows from what was measured, on the same tiles, network and processes."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tilefleet
from configs.errors import UsageError
from configs.schema import Recipe
from tests.runs import torchrun
from training import models
from training.bench import PLAIN, prepare, summary
from training.loop import Trainer
from training.parts import measure_ingest, measure_model
from training.shards import load_tiles

CPU = torch.device("cpu")
ROUND = {"first": 500.0, "loader": 3000.0, "model": 1000.0, "both": 950.0, "ray": 940.0, "plain": 400.0, "waiting": 0.1}


def no_progress(stage: str, done: int, total: int) -> None:
    """Takes what a progress line would show."""


def run(*arguments: object) -> tuple[str, dict[str, Any]]:
    """The table of a benchmark, and its last line."""
    result = CliRunner().invoke(tilefleet.app, ["bench", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    *lines, last = result.stdout.splitlines()
    return "\n".join(lines), json.loads(last)


def test_ratios_are_medians_of_those_of_each_round() -> None:
    """A machine that is twice as slow in one round changes rates, not ratios."""
    slow = {name: value / 2 for name, value in ROUND.items()}
    odd = ROUND | {"both": 100.0}
    result = summary([ROUND, slow, odd])
    assert result["both_over_model"] == 0.95
    assert result["loader_over_model"] == 3
    assert result["ray_over_torchrun"] == pytest.approx(940 / 950)
    assert result["over_plain"] == 950 / 400
    assert result["tiles_per_second"]["both"] == 475
    assert result["rounds"] == [ROUND, slow, odd]


@pytest.mark.parametrize(("loader", "limit"), [(900.0, "loader"), (1100.0, "model")])
def test_the_slower_of_loader_and_model_is_the_limit(loader: float, limit: str) -> None:
    assert summary([ROUND | {"loader": loader}])["limit"] == limit


def test_a_model_that_the_plain_script_does_not_have_is_compared_with_nothing() -> None:
    assert "over_plain" not in summary([{name: value for name, value in ROUND.items() if name != "plain"}])


def test_parts_are_measured_without_a_process_group(small_recipe: dict[str, Any]) -> None:
    trainer = Trainer(Recipe.model_validate(small_recipe), CPU)
    before = [value.clone() for value in trainer.learner.model.state_dict().values()]
    found = measure_ingest(trainer)
    assert set(found) == {"first", "loader", "read", "decode", "gather", "read_bytes"}
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.learner.model.state_dict().values(), strict=True))
    found |= measure_model(trainer)
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.learner.model.state_dict().values(), strict=True))
    assert all(rate > 0 for rate in found.values())


def test_all_parts_get_the_same_tiles(small_recipe: dict[str, Any], shards: Path) -> None:
    small = Recipe.model_validate(small_recipe)
    with prepare(small, str(shards), 64, no_progress) as prepared:
        folder, recipe = prepared.folder, prepared.recipe
        packed = set(load_tiles(recipe.shards, "train")["sha256"].to_pylist())
        assert packed <= set(load_tiles(shards, "train")["sha256"].to_pylist())
        assert len(packed) == prepared.index.tiles("train") == len(list(prepared.images.glob("*/*.jpg"))) == 64
        assert prepared.index.tile_size == 32
    assert not folder.exists()


def test_synthetic_tiles_where_no_shards_are_named(small_recipe: dict[str, Any]) -> None:
    with prepare(Recipe.model_validate(small_recipe), None, 33, no_progress) as prepared:
        assert prepared.index.tiles("train") == 40  # as many of each of the eight classes
        assert prepared.index.tiles("val") == 8


@pytest.mark.parametrize(
    ("changes", "says"), [({"epochs": 1}, "epochs: "), ({"batch_size": 100}, "batch_size: 100 is more than the 64")]
)
def test_what_cannot_be_measured_is_refused(
    small_recipe: dict[str, Any], shards: Path, changes: dict[str, Any], says: str
) -> None:
    recipe = Recipe.model_validate(small_recipe | changes)
    with pytest.raises(UsageError, match=says), prepare(recipe, str(shards), 64, no_progress):
        pass


def test_one_shard_set_at_a_time() -> None:
    with pytest.raises(UsageError, match="one shard set at a time, not a, b"):
        run("ingest", "a", "b", "epochs=3")


def test_the_plain_script_stands_alone_and_has_the_same_network() -> None:
    nodes = list(ast.walk(ast.parse(PLAIN.read_text())))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= {"argparse", "json", "time", "torch", "torchvision"}
    specification = importlib.util.spec_from_file_location("plain_ddp", PLAIN)
    assert specification
    assert specification.loader
    plain = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(plain)
    ours, theirs = models.build("cnn", 10, 32).eval(), plain.Net(10, 32).eval()
    named = zip(theirs.state_dict(), ours.state_dict().values(), strict=True)
    theirs.load_state_dict(dict(named))
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)


@pytest.mark.process
def test_the_plain_script_runs(shards: Path) -> None:
    settings = ["--size=32", "--batch-size=8", "--epochs=2", "--num-workers=1"]
    printed = torchrun(2, PLAIN, shards.parent / "raw", *settings)
    found = json.loads(printed.splitlines()[-1])
    assert found["tiles"] == 24 * 8
    assert found["tiles_per_second"] == pytest.approx(found["tiles"] / found["seconds"][1])


@pytest.mark.process
def test_ingest_sums_over_ranks(shards: Path) -> None:
    table, found = run("ingest", shards, "--tiles", 64, "--rounds", 1, "--workers", 2, "batch_size=16")
    (ranks,) = found["rounds"]
    assert len(ranks) == found["workers"] == 2
    for name, rate in found["tiles_per_second"].items():
        assert rate == pytest.approx(sum(rank[name] for rank in ranks))
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert found["limit"] == max(found["shares"], key=found["shares"].__getitem__)
    assert (found["tiles"], found["batch_size"]) == (64, 16)
    assert "loader, first epoch" in table


@pytest.mark.ray
@pytest.mark.process
def test_train_measures_each_part(ray_session: None, shards: Path) -> None:
    settings = ["batch_size=16", "epochs=2", "precision=f32"]
    table, found = run("train", shards, "--tiles", 64, "--rounds", 1, *settings)
    rates = found["tiles_per_second"]
    assert set(rates) == {"model", "both", "ray", "plain", "first", "loader"}
    assert found["over_plain"] == rates["both"] / rates["plain"]
    assert found["ray_over_torchrun"] == rates["ray"] / rates["both"]
    assert "whole loop, Ray Train" in table
