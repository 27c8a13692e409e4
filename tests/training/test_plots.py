"""The plots of runs and evaluations: what is drawn where, for few and for many rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from configs.schema import Recipe
from training import plots
from training.evaluate import calibration
from training.plots import plot_calibration, plot_confusion, plot_curves, plot_unknown


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """Every figure that is written, as it was drawn."""
    figures: list[Figure] = []
    write = plots._write_png

    def keep(figure: Figure, path: str) -> None:
        figures.append(figure)
        write(figure, path)

    monkeypatch.setattr(plots, "_write_png", keep)
    return figures


@pytest.mark.parametrize("classes", [1, 10, 43])
def test_confusion_is_drawn_for_few_and_many_classes(tmp_path: Path, classes: int) -> None:
    confusion = np.diag(np.random.default_rng(0).integers(0, 3000, classes))
    confusion[-1, :] = 7
    confusion[0, :] = 0  # a class without a tile

    plot_confusion(confusion, [f"Class {i}" for i in range(classes)], str(tmp_path / "confusion.png"))

    assert Image.open(tmp_path / "confusion.png").format == "PNG"


@pytest.mark.parametrize("epochs", [0, 1, 40])
def test_curves_are_drawn_with_and_without_validation(tmp_path: Path, epochs: int) -> None:
    bare = [{"epoch": row["epoch"], "train_loss": 1.0, "val_loss": None, "val_accuracy": None} for row in rows(epochs)]

    plot_curves(bare, str(tmp_path / "train.png"))
    plot_curves(rows(epochs), str(tmp_path / "both.png"))

    assert Image.open(tmp_path / "train.png").width > 1000
    assert Image.open(tmp_path / "both.png").width > 1000


def test_the_loss_of_each_step_lies_before_the_end_of_its_epoch(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_curves(rows(2), str(tmp_path / "curves.png"))

    steps, epochs, *_ = drawn[0].axes[0].get_lines()
    assert list(steps.get_xdata()) == [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
    assert list(steps.get_ydata()) == [4, 3, 2, 1, 4, 3, 2, 1]
    assert list(epochs.get_xdata()) == [1, 2]
    assert drawn[0].axes[1].get_title("right") == "best: 50.00% in epoch 2"


def test_the_learning_rate_is_that_of_each_step(
    tmp_path: Path, drawn: list[Figure], small_recipe: dict[str, Any]
) -> None:
    schedule = {"name": "constant", "warmup": 4}
    recipe = Recipe.model_validate(small_recipe | {"schedule": schedule, "optimizer": {"learning_rate": 0.2}})
    plateau = Recipe.model_validate(small_recipe | {"schedule": {"name": "plateau"}})

    plot_curves(rows(2), str(tmp_path / "one.png"), recipe)
    plot_curves(rows(2), str(tmp_path / "other.png"), plateau)

    (steps,), (epochs,) = (figure.axes[2].get_lines() for figure in drawn)
    assert list(steps.get_xdata()) == [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
    assert list(steps.get_ydata()) == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2, 0.2, 0.2])
    assert list(epochs.get_ydata()) == [0.1, 0.1]


def test_reliability_is_drawn_before_and_after(tmp_path: Path, drawn: list[Figure]) -> None:
    right = np.arange(10) < 8
    after, before = (calibration(np.full(10, sure, np.float32), right) for sure in (0.8, 0.99))

    plot_calibration(after, before, str(tmp_path / "calibration.png"))

    assert [axes.get_title("right") for axes in drawn[0].axes[:2]] == ["ECE 19.00%", "ECE 0.00%"]
    assert [bar.get_height() for bar in drawn[0].axes[0].patches] == [0.8]
    assert [bar.get_height() for bar in drawn[0].axes[2].patches] == [10]


@pytest.mark.parametrize("known", [[0.9, 0.95, 1.0], [1.0]])
def test_scores_of_known_and_foreign_are_shares_of_their_own_set(
    tmp_path: Path, drawn: list[Figure], known: list[float]
) -> None:
    scores = np.array(known, np.float32), np.array([0.2, 1.0], np.float32)

    plot_unknown(*scores, 0.5, "a title", str(tmp_path / "unknown.png"))

    assert [sum(patch.get_data().values) for patch in drawn[0].axes[0].patches] == pytest.approx([1, 1])
    assert drawn[0].axes[0].get_title("left") == "a title"


def rows(epochs: int) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            "train_loss": 1 / epoch,
            "train_accuracy": 0.5,
            "val_loss": 1.0,
            "val_accuracy": epoch / 4 if epoch < 4 else 0.0,
            "learning_rate": 0.1,
            "tiles_per_second": 100.0,
            "losses": [4.0, 3.0, 2.0, 1.0],
        }
        for epoch in range(1, epochs + 1)
    ]
