"""Recipes: typed, strict, with one clear line for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs.errors import UsageError
from configs.schema import Recipe, load_recipe, parse_overrides
from training import models

SHIPPED = sorted((Path(__file__).parent.parent.parent / "configs").glob("*.yaml"))
GOOD = "name: a\nshards: s\nmodel: {name: cnn}\nepochs: 1\nbatch_size: 8\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_recipe_loads_and_builds_its_model(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    with torch.device("meta"):
        models.build(recipe.model.name, 10, 64, **recipe.model.arguments)


def test_overrides_reach_nested_keys_and_have_yaml_types(file: Path) -> None:
    recipe = load_recipe(file, ["optimizer.learning_rate=0.5", "trace=true", "name=b", "optimizer.name=sgd"])
    assert (recipe.optimizer.learning_rate, recipe.trace, recipe.run) == (0.5, True, "runs/b")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("epoch=3", "epoch: unknown key; did you mean epochs?"),
        ("optimizer.lerning_rate=1", "optimizer.lerning_rate: unknown key; did you mean learning_rate?"),
        ("epochs=many", "epochs: input should be a valid integer"),
        ("epochs=0", "epochs: input should be greater than 0"),
        ("batch_size=-4", "batch_size: input should be greater than 0"),
        ("optimizer.name=lion", "optimizer.name: input should be 'sgd', 'adam' or 'adamw'"),
        ("name=../x", "name: string should match"),
        ("model.arguments.channels=4", "model.arguments: value error, channels: the shards say so"),
        ("epochs", "key=value"),
        ("epochs.x=1", "epochs is a value"),
    ],
)
def test_a_wrong_key_or_value_is_named(file: Path, override: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        load_recipe(file, [override])
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a recipe"),
        ("- 1", "not a recipe"),
        ("a: [", "not YAML"),
        ("name: a", "model: missing"),
        (GOOD + "colour: red\n", "colour: unknown key"),
    ],
)
def test_a_wrong_file_is_named(file: Path, text: str, says: str) -> None:
    file.write_text(text)
    with pytest.raises(UsageError, match=r"recipe\.yaml") as error:
        load_recipe(file)
    assert says in str(error.value)


def test_no_such_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_a_recipe_survives_its_own_dump() -> None:
    recipe = Recipe.model_validate(
        parse_overrides(GOOD.replace(": ", "=").splitlines()[:2])
        | {"model": {"name": "cnn"}, "epochs": 1, "batch_size": 8}
    )
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
