"""The page that compares runs: what it says of each, what it draws, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure

from cluster.records import append_metrics
from configs.errors import TilefleetError, UsageError
from configs.schema import Recipe
from inference import compare as page
from inference.compare import compare, differences
from tests.page import Page
from training import models
from training.bundle import BundleInfo, save_bundle

CLASSES = ["Field", "Lake <i>"]


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Two finished runs that were evaluated, the second of which learned less by heart."""
    first = write_run(tmp_path / "runs" / "plain", train=(0.5, 0.99), val=(0.6, 0.55))
    second = write_run(
        tmp_path / "runs" / "cured <i>",
        train=(0.4, 0.6),
        val=(0.5, 0.7),
        model={"name": "cnn", "arguments": {"dropout": 0.8}},
        augment={"flips": True},
    )
    return [first, second]


def test_runs_stand_side_by_side_with_what_differs(runs: list[str], tmp_path: Path) -> None:
    assert compare(runs) == str(tmp_path / "runs" / "compare.html")

    shown = Page(tmp_path / "runs" / "compare.html")
    shown.assert_self_contained()
    parameters = sum(parameter.numel() for parameter in models.build("cnn", 2, 16).parameters())
    for words in (
        "2 runs compared",
        f"parameters {parameters:,} {parameters:,}",
        "epochs 2 of 3 2 of 3",
        "best val accuracy epoch 1: 60.00% epoch 2: 70.00%",
        "test accuracy 75.00% 75.00%",
        "tiles/s 175 175",  # 100 in the first second, 200 in the three after it
        "time in training 4.0 s 4.0 s",
        "plain 99.00% 55.00% +44.0 0.5000 in 1 0.9000",
        "cured <i> 60.00% 70.00% -10.0",
        "augment.flips false true",
        "model.arguments.dropout – 0.8",
        "Recall by class class plain cured <i> Field 50.0% 50.0% Lake <i> 100.0% 100.0%",
        "F1 by class",
    ):
        assert words in shown.text, words
    assert "optimizer" not in shown.text
    assert "different tiles" not in shown.text
    assert len(shown.alts) == 2


def test_runs_that_say_little_have_dashes(runs: list[str], tmp_path: Path) -> None:
    bare = tmp_path / "runs" / "bare"
    write_recipe(bare)
    append_metrics(bare, {"epoch": 1, "train_loss": 1.0, "val_loss": None, "val_accuracy": None})

    shown = Page(compare([runs[0], str(bare)], str(tmp_path / "page.html")))

    assert "test accuracy 75.00% –" in shown.text
    assert "bare – – – – –" in shown.text
    alone = Page(compare([str(bare), write_bare(tmp_path / "other")], str(tmp_path / "page.html")))
    assert "None of the runs is evaluated yet" in alone.text
    assert "Nothing but their names" in alone.text


def test_scores_on_different_tiles_are_marked(runs: list[str], tmp_path: Path) -> None:
    location = Path(runs[1], "evaluation", "evaluation.json")
    location.write_text(json.dumps(json.loads(location.read_text()) | {"split": "val"}))

    shown = Page(compare(runs))

    assert "evaluated on different tiles" in shown.text
    assert "test accuracy 75.00% of val: 75.00%" in shown.text


def test_runs_of_one_name_are_told_apart_by_their_folders(runs: list[str], tmp_path: Path) -> None:
    copy = str(shutil.copytree(runs[0], tmp_path / "elsewhere" / "plain"))

    shown = Page(compare([runs[0], copy + "/"]))

    assert "runs/plain, elsewhere/plain" in shown.text
    assert (tmp_path / "compare.html").exists()


def test_the_page_is_named_from_here(runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert compare(["runs/plain", "runs/cured <i>/"]) == "runs/compare.html"
    monkeypatch.chdir(tmp_path / "runs")
    assert compare(["plain", "cured <i>"]) == "compare.html"


def test_the_gap_is_filled_where_training_is_the_better_one(runs: list[str]) -> None:
    figure = Figure()
    page._draw_gaps([page.read_run(location, location) for location in runs], figure)

    accuracy_of_first, accuracy_of_second = figure.axes[:2]
    assert [axes.get_title("left").splitlines()[1] for axes in figure.axes[:2]] == [
        "gap +44.0 points",
        "gap -10.0 points",
    ]
    overfit, _ = accuracy_of_first.collections
    assert len(overfit.get_paths()) == 1
    overfit, other = accuracy_of_second.collections
    assert not overfit.get_paths()
    assert len(other.get_paths()) == 1
    assert accuracy_of_first.get_ylim() == accuracy_of_second.get_ylim()


def test_many_runs_are_drawn(runs: list[str], tmp_path: Path) -> None:
    copies = [str(shutil.copytree(runs[0], tmp_path / "many" / str(number))) for number in range(9)]

    assert len(Page(compare(copies)).alts) == 2


def test_only_keys_that_differ_are_told() -> None:
    common: dict[str, Any] = {"shards": "s", "epochs": 1, "batch_size": 2}
    one = Recipe.model_validate(common | {"name": "one", "model": {"name": "cnn"}})
    other = Recipe.model_validate(common | {"name": "other", "model": {"name": "vgg16"}, "early_stopping": 3})

    assert differences([one, other]) == {"model.name": ["cnn", "vgg16"], "early_stopping": [None, 3]}
    assert differences([one, one]) == {}


def test_what_cannot_be_compared_is_named(runs: list[str], tmp_path: Path) -> None:
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "plan.parquet").touch()
    (tmp_path / "empty").mkdir()
    write_recipe(tmp_path / "new")
    damaged = Path(shutil.copytree(runs[0], tmp_path / "damaged"))
    (damaged / "metrics.jsonl").write_text('{"half": [')

    for name, error, words in (
        ("missing", UsageError, "no such folder"),
        ("predictions", UsageError, "holds predictions, and only runs can be compared"),
        ("empty", UsageError, "not a run, config.yaml is missing"),
        ("new", TilefleetError, "no epoch is finished yet"),
        ("damaged", TilefleetError, "a record in it is damaged"),
    ):
        with pytest.raises(error, match=f"{name}: {words}"):
            compare([runs[0], str(tmp_path / name)])
    with pytest.raises(UsageError, match="plain: named twice"):
        compare([runs[0], runs[1], runs[0] + "/"])
    with pytest.raises(UsageError, match="is a folder; name the HTML file"):
        compare(runs, str(tmp_path))
    assert not list(tmp_path.rglob("*.html"))


def write_run(location: Path, train: tuple[float, float], val: tuple[float, float], **keys: Any) -> str:
    recipe = write_recipe(location, **keys)
    for number in range(2):
        row = {
            "epoch": number + 1,
            "train_loss": 1 - train[number],
            "train_accuracy": train[number],
            "val_loss": 0.5 + 0.4 * number,
            "val_accuracy": val[number],
            "tiles_per_second": 100.0 + 100 * number,
            "seconds": 1.0 + 2 * number,
        }
        append_metrics(location, row)
    info = BundleInfo(architecture="cnn", classes=CLASSES, tile_size=16, mean=[0.5] * 3, std=[0.2] * 3)
    torch.manual_seed(0)
    save_bundle(location / "bundle", models.build(recipe.model.name, 2, 16), info)
    scores = {name: {"recall": recall, "f1": recall} for name, recall in zip(CLASSES, (0.5, 1.0), strict=True)}
    evaluation = {
        "accuracy": 0.75,
        "macro_f1": 0.74,
        "split": "test",
        "data_fingerprint": "0",
        "calibration": {"ece": 0.01},
        "per_class": scores,
    }
    (location / "evaluation").mkdir()
    (location / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    return str(location)


def write_bare(location: Path) -> str:
    write_recipe(location)
    append_metrics(location, {"epoch": 1, "train_loss": float(np.float32(1))})
    return str(location)


def write_recipe(location: Path, **keys: Any) -> Recipe:
    location.mkdir(parents=True)
    tree = {"name": "any", "shards": "s", "model": {"name": "cnn"}, "epochs": 3, "batch_size": 4} | keys
    recipe = Recipe.model_validate(tree)
    (location / "config.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return recipe
