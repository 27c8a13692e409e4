"""The same tiles before and after training: which tiles, and what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from configs.schema import Recipe
from training import grids, show
from training.bundle import BundleInfo, save_bundle
from training.grids import COLUMNS, TILES, prediction_grids
from training.learner import Learner, untrained
from training.shards import TileReader, load_index

RIGHT, WRONG = (28, 122, 74), (179, 38, 30)


@pytest.fixture
def recipe(small_recipe: dict[str, Any]) -> Recipe:
    """A run that is finished, whose model takes every tile for class 2."""
    recipe = Recipe.model_validate(small_recipe)
    finish(recipe)
    return recipe


def test_the_same_tiles_are_judged_by_both_models(recipe: Recipe, tmp_path: Path) -> None:
    assert prediction_grids(recipe, str(tmp_path / "grid.png")) is None

    sheet, tiles = Image.open(tmp_path / "grid.png"), load_index(recipe.shards).tiles("val")
    before, after = (
        [frame_at(sheet, half * sheet.height // 2, number) for number in range(tiles)] for half in range(2)
    )
    for one, other in zip(before, after, strict=True):
        inner = (8, 8, show.FRAME - 8, show.FRAME - 8)
        assert one.crop(inner).tobytes() == other.crop(inner).tobytes()
    reader = TileReader(recipe.shards, "val")
    classes = load_index(recipe.shards).classes
    labels = reader.labels[show.choose([classes[label] for label in reader.labels], TILES)]
    assert [frame.getpixel((1, 1)) for frame in after] == [RIGHT if label == 2 else WRONG for label in labels]


def test_the_model_before_is_the_one_that_training_starts_from(recipe: Recipe) -> None:
    index = load_index(recipe.shards)
    labels = torch.from_numpy(TileReader(recipe.shards, "train").labels.astype(np.int64))

    ours = untrained(recipe, index).state_dict()
    torch.manual_seed(9)
    theirs = Learner(recipe, index, labels, torch.device("cpu"), fresh=True).best.state_dict()

    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_that_are_gone_leave_the_half_after_training(small_recipe: dict[str, Any], tmp_path: Path) -> None:
    small_recipe["model"] = {"name": "cnn", "weights": str(tmp_path / "gone.safetensors")}
    recipe = Recipe.model_validate(small_recipe)
    finish(recipe)

    assert "gone.safetensors: no such file" in str(prediction_grids(recipe, str(tmp_path / "grid.png")))

    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": None})})
    assert prediction_grids(recipe, str(tmp_path / "both.png")) is None
    assert Image.open(tmp_path / "both.png").height == 2 * Image.open(tmp_path / "grid.png").height


def test_a_right_and_a_wrong_tile_can_be_told_apart_without_colour() -> None:
    pixels = torch.zeros(3, 16, 16, dtype=torch.uint8)

    right, wrong = (grids._frame(pixels, truth, "Lake", 0.876) for truth in ("Lake", "Town"))

    assert right.captions == ("✓ Lake 88%", "is Lake")
    assert wrong.captions == ("✗ Lake 88%", "is Town")


def finish(recipe: Recipe) -> None:
    """Write the bundle of a run."""
    index = load_index(recipe.shards)
    model = untrained(recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": None})}), index)
    head = list(model.children())[-1]
    assert isinstance(head, torch.nn.Linear)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.nn.functional.one_hot(torch.tensor(2), len(index.classes)))
    info = BundleInfo(
        architecture="cnn", classes=index.classes, tile_size=index.tile_size, mean=index.mean, std=index.std
    )
    save_bundle(f"{recipe.run}/bundle", model, info)


def frame_at(sheet: Image.Image, top: int, number: int) -> Image.Image:
    """The frame of a tile in the half that begins at ``top``, below its title; a frame has two lines of words."""
    left = 10 + number % COLUMNS * (show.FRAME + 10)
    top += 42 + number // COLUMNS * (show.FRAME + 42)
    return sheet.crop((left, top, left + show.FRAME, top + show.FRAME))
