"""The plots of a run and of an evaluation, each written as a PNG: curves, confusion, calibration, unknown images.

In come rows of ``metrics.jsonl`` and what ``evaluation.json`` holds; nothing is measured here. No colour stands alone:
line styles, markers or words say the same, and the palette (Okabe and Ito, 2008) keeps apart for the colour-blind.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cluster import storage
from cluster.records import best_row
from configs.schema import Recipe
from training.optim import rate

TRAINING, VALIDATION, ALARM = "#8d99a6", "#0072b2", "#d55e00"


def plot_confusion(confusion: npt.NDArray[np.int64], classes: Sequence[str], path: str) -> None:
    """Write a PNG of the matrix: counts in the cells, coloured by the share of the row's class."""
    count = len(classes)
    few = count <= 15
    side = (0.62 if few else 0.36) * count + 2.6
    figure = Figure(figsize=(side + 0.6, side), layout="constrained", dpi=130)
    axes = figure.add_subplot()
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(confusion):
        colour = "white" if share[row, column] > 0.5 else "#1b2a3a"
        text = str(confusion[row, column])
        axes.text(column, row, text, ha="center", va="center", fontsize=9 if few else 6, color=colour)
    axes.set_xticks(range(count), classes, rotation=45 if few else 90, ha="right", va="center", rotation_mode="anchor")
    axes.set_yticks(range(count), classes)
    axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#dde3ea", linewidth=0.6)
    axes.tick_params(which="both", length=0, labelsize=9, pad=6)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted class", fontsize=11)
    axes.set_ylabel("true class", fontsize=11)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, format=PercentFormatter(1, decimals=0))
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)
    _write_png(figure, path)


def plot_curves(rows: Sequence[dict[str, Any]], path: str, recipe: Recipe | None = None) -> None:
    """Write a PNG of loss, accuracy, learning rate and rate over epochs from the rows of ``metrics.jsonl``.

    The loss of each step is drawn behind the means of the epochs, and the best epoch is marked. ``recipe`` gives the
    learning rate of each step; without it, and for a plateau, it is that of the end of each epoch.
    """
    figure = Figure(figsize=(10, 7), layout="constrained", dpi=130)
    losses, accuracies, rates, speeds = figure.subplots(2, 2).flat
    _plot_steps(losses, rows)
    for axes, quantity in ((losses, "loss"), (accuracies, "accuracy")):
        for part, name, colour in (("train", "training", TRAINING), ("val", "validation", VALIDATION)):
            _plot_epochs(axes, rows, f"{part}_{quantity}", colour, name)
    accuracies.yaxis.set_major_formatter(PercentFormatter(1))
    steps = [] if recipe is None or recipe.schedule.name == "plateau" else _learning_rates(rows, recipe)
    if steps:
        rates.plot(*zip(*steps, strict=True), color=VALIDATION, linewidth=1.5)
    else:
        _plot_epochs(rates, rows, "learning_rate", VALIDATION)
    rates.set_ylim(bottom=0)
    _plot_epochs(speeds, rows, "tiles_per_second", VALIDATION)
    speeds.set_ylim(bottom=0)
    if best := best_row(rows):
        accuracies.plot(best["epoch"], best["val_accuracy"], "D", color=ALARM, markersize=7, zorder=4)
        for axes in (losses, accuracies):
            axes.axvline(best["epoch"], color=ALARM, linewidth=1, linestyle=":")
        accuracies.set_title(f"best: {best['val_accuracy']:.2%} in epoch {best['epoch']}", fontsize=10, loc="right")
    for axes, title in ((losses, "loss"), (accuracies, "accuracy"), (rates, "learning rate"), (speeds, "tiles/s")):
        _style(axes, title, "epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(0, 1.02 * max((row["epoch"] for row in rows), default=1))
    if rows:
        losses.legend(frameon=False, loc="upper right")
        accuracies.legend(frameon=False, loc="lower right")
    _write_png(figure, path)


def plot_calibration(after: dict[str, Any], before: dict[str, Any], path: str) -> None:
    """Write a PNG of two reliability diagrams, before and after temperature scaling, from :func:`calibration` bins."""
    figure = Figure(figsize=(9, 4.6), layout="constrained", dpi=130)
    panels = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(4, 1))
    for column, (title, result) in enumerate((("before", before), ("after", after))):
        diagram, counts = panels[:, column]
        bins = [bin for bin in result["bins"] if bin["tiles"]]
        middle, width = [(bin["low"] + bin["high"]) / 2 for bin in bins], 0.9 / max(1, len(result["bins"]))
        accuracy, sure = [bin["accuracy"] for bin in bins], [bin["confidence"] for bin in bins]
        diagram.bar(middle, accuracy, width, color=VALIDATION, label="accuracy")
        diagram.plot(sure, accuracy, "o", color=ALARM, markersize=4, label="at its mean confidence")
        diagram.plot([0, 1], [0, 1], "--", color="#1b2a3a", linewidth=1, label="as right as it is sure")
        diagram.set_xlim(0, 1)
        diagram.set_ylim(0, 1.02)
        diagram.yaxis.set_major_formatter(PercentFormatter(1))
        _style(diagram, f"{title} temperature scaling")
        diagram.set_title(f"ECE {result['ece']:.2%}", fontsize=10, loc="right")
        counts.bar(middle, [bin["tiles"] for bin in bins], width, color=TRAINING)
        counts.xaxis.set_major_formatter(PercentFormatter(1))
        _style(counts, "", "confidence")
    panels[0, 0].set_ylabel("accuracy")
    panels[1, 0].set_ylabel("tiles")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    _write_png(figure, path)


def plot_unknown(
    known: npt.NDArray[np.float32], foreign: npt.NDArray[np.float32], threshold: float, title: str, path: str
) -> None:
    """Write a PNG of how far known tiles and foreign images are, distances float32 ``[N]`` and ``[M]``, are spread.

    Bars are shares of their own set, on a root scale, so that the few tiles that matter at the threshold can be seen.
    """
    figure = Figure(figsize=(9, 4), layout="constrained", dpi=130)
    axes = figure.add_subplot()
    both = np.concatenate([known, foreign])
    edges = np.geomspace(max(both.min(), 1e-3), max(both.max(), 2e-3), 41)
    styles: tuple[dict[str, Any], ...] = (
        {"color": VALIDATION, "alpha": 0.55},
        {"facecolor": "none", "edgecolor": ALARM, "hatch": "////", "linewidth": 1.2},
    )
    for distances, name, style in zip((known, foreign), ("known tiles", "foreign images"), styles, strict=True):
        share = np.histogram(distances, edges)[0] / len(distances)
        axes.stairs(share, edges, fill=True, label=f"{name} ({len(distances):,})", **style)
    axes.axvline(threshold, color="#1b2a3a", linestyle="--", linewidth=1.2, label=f"threshold {threshold:.1f}")
    axes.set_xscale("log")
    axes.set_yscale("function", functions=(np.sqrt, np.square))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("share of the set")
    _style(axes, title, "distance from what was learnt; unknown right of the threshold")
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    _write_png(figure, path)


def _plot_steps(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """The training loss of each step; those of epoch e lie between e - 1 and e."""
    points = [
        (row["epoch"] - 1 + (step + 1) / len(row["losses"]), loss)
        for row in rows
        for step, loss in enumerate(row.get("losses") or [])
    ]
    if points:
        axes.plot(
            *zip(*points, strict=True), "-", color=TRAINING, linewidth=0.6, alpha=0.5, label="training, each step"
        )


def _plot_epochs(axes: Axes, rows: Sequence[dict[str, Any]], key: str, colour: str, label: str | None = None) -> None:
    points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
    style = "o-" if len(points) <= 30 else "-"
    axes.plot([x for x, _ in points], [y for _, y in points], style, color=colour, markersize=3.5, label=label)


def _learning_rates(rows: Sequence[dict[str, Any]], recipe: Recipe) -> list[tuple[float, float]]:
    """Epoch and learning rate of each step that was made."""
    if not rows or not rows[0].get("losses"):
        return []
    steps = len(rows[0]["losses"])
    full = recipe.optimizer.learning_rate
    return [
        ((step + 1) / steps, full * rate(recipe.schedule, step, steps, recipe.epochs))
        for step in range(steps * len(rows))
    ]


def _style(axes: Axes, title: str, xlabel: str = "") -> None:
    axes.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axes.set_xlabel(xlabel)
    axes.grid(axis="y", color="#e3e7ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _write_png(figure: Figure, path: str) -> None:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", bbox_inches="tight")
    storage.write_bytes(path, stream.getvalue())
