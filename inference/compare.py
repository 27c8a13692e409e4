"""One self-contained HTML page that compares several training runs: scores, curves, overfit, recipes, classes.

In come the folders of the runs, out goes a page made as the others are (see :mod:`inference.page`). Nothing is measured
anew: what is not in a run's records is a dash.

Command: ``tilefleet report RUN RUN... [-o page.html]``
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cluster import storage
from cluster.records import best_row, read_metrics
from configs.errors import TilefleetError, UsageError
from configs.schema import Recipe, validate
from inference.archive import PLAN
from inference.page import png_uri, read_json, render
from training import models
from training.bundle import INFO, BundleInfo, read_info

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Of Okabe and Ito (2008), told apart by the colour-blind; the marker tells a run too."""

MARKERS = "osD^vPX*<>"
BESIDE = 4
"""Runs side by side in the picture of the overfit."""


@dataclass(frozen=True)
class Run:
    """What the records of one run say; ``rows`` are those of ``metrics.jsonl``, at least one."""

    name: str
    recipe: Recipe
    rows: list[dict[str, Any]]
    info: BundleInfo | None
    evaluation: dict[str, Any] | None

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the best validation accuracy."""
        return best_row(self.rows)

    @property
    def gap(self) -> float | None:
        """How much better the last epoch is on what it was trained on than in validation, in accuracy."""
        train, val = self.rows[-1].get("train_accuracy"), self.rows[-1].get("val_accuracy")
        return None if train is None or val is None else train - val

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Epochs, and the values of ``key`` at their ends."""
        rows = [row for row in self.rows if row.get(key) is not None]
        return [row["epoch"] for row in rows], [row[key] for row in rows]


def compare(locations: Sequence[str], out: str | None = None) -> str:
    """Write the page that compares the runs at ``locations`` to ``out``; returns where it is.

    By default it is ``compare.html`` in the folder that the runs share. Raises :class:`UsageError` where one is no run
    or named twice, :class:`TilefleetError` where one has no finished epoch or a record of it is damaged.
    """
    places = [location.rstrip("/") for location in locations]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice:
        raise UsageError(f"{twice}: named twice; name each run once")
    out = out or _default_page(places)
    if storage.is_dir(out):
        raise UsageError(f"{out}: is a folder; name the HTML file to write")
    above = len(_shared(places))
    names = ["/".join(storage.absolute(place).split("/")[above:]) for place in places]
    runs = [read_run(place, name) for place, name in zip(places, names, strict=True)]
    storage.write_bytes(out, render("compare.html", **describe(runs)).encode())
    return out


def read_run(location: str, name: str) -> Run:
    """The records of the run at ``location``; raises as :func:`compare` does."""
    config = storage.join(location, "config.yaml")
    if not storage.exists(location):
        raise UsageError(f"{location}: no such folder")
    if storage.exists(storage.join(location, PLAN)):
        raise UsageError(f"{location}: holds predictions, and only runs can be compared; make its page by itself")
    if not storage.exists(config):
        raise UsageError(f"{location}: not a run, config.yaml is missing; name the folder of one")
    try:
        run = Run(
            name,
            validate(Recipe, yaml.safe_load(storage.read_bytes(config)), config),
            read_metrics(location),
            read_info(bundle) if storage.exists(storage.join(bundle := f"{location}/bundle", INFO)) else None,
            read_json(storage.join(location, "evaluation", "evaluation.json")),
        )
    except (ValueError, KeyError, yaml.YAMLError) as error:
        raise TilefleetError(f"{location}: a record in it is damaged ({str(error).splitlines()[0]})") from error
    if not run.rows:
        raise TilefleetError(f"{location}: no epoch is finished yet, so there is nothing to compare")
    return run


def describe(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that ``compare.html`` shows."""
    evaluated = [run for run in runs if run.evaluation]
    judged_on = {(run.evaluation["data_fingerprint"], run.evaluation["split"]) for run in runs if run.evaluation}
    return {
        "name": f"{len(runs)} runs",
        "runs": [_summary(run) for run in runs],
        "differences": differences([run.recipe for run in runs]),
        "curves": _draw(partial(_draw_curves, runs)),
        "gaps": _draw(partial(_draw_gaps, runs)),
        "heat": {score: _heat(evaluated, score) for score in ("recall", "f1")} if evaluated else {},
        "evaluated": [run.name for run in evaluated],
        "other_tiles": len(judged_on) > 1,
        "other_shards": len({run.info.data_fingerprint for run in runs if run.info}) > 1,
    }


def differences(recipes: Sequence[Recipe]) -> dict[str, list[Any]]:
    """Dotted recipe key -> its value in each recipe, for the keys whose values are not all equal; names aside."""
    flat = [dict(_flatten(recipe.model_dump(mode="json", exclude={"name"}))) for recipe in recipes]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    rows = {key: [values.get(key) for values in flat] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def _flatten(tree: dict[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{above}{key}.")
        else:
            yield above + key, value


def _summary(run: Run) -> dict[str, Any]:
    """A run's line in the tables; None stands for what its records do not say."""
    timed = [row for row in run.rows if row.get("seconds") and row.get("tiles_per_second") is not None]
    seconds = sum(row["seconds"] for row in timed)
    judged = run.evaluation or {}
    epochs, losses = run.curve("val_loss")
    return {
        "name": run.name,
        "recipe": run.recipe,
        "parameters": _parameters(run.info) if run.info else None,
        "epochs": len(run.rows),
        "best": run.best,
        "accuracy": judged.get("accuracy"),
        "split": judged.get("split"),
        "macro_f1": judged.get("macro_f1"),
        "ece": judged["calibration"]["ece"] if judged else None,
        "auroc": judged["foreign"]["auroc"] if judged.get("foreign") else None,
        "tiles_per_second": sum(row["tiles_per_second"] * row["seconds"] for row in timed) / seconds if timed else None,
        "seconds": seconds if timed else None,
        "train": run.rows[-1].get("train_accuracy"),
        "val": run.rows[-1].get("val_accuracy"),
        "gap": run.gap,
        "least_loss": min(zip(losses, epochs, strict=True), default=None),
        "last_loss": losses[-1] if losses else None,
    }


def _parameters(info: BundleInfo) -> int:
    classes, size = len(info.classes), info.tile_size
    with torch.device("meta"):  # shapes only, without memory for the weights
        model = models.build(info.architecture, classes, size, channels=info.channels, **info.arguments)
    return sum(parameter.numel() for parameter in model.parameters())


def _heat(runs: Sequence[Run], score: str) -> list[tuple[str, list[tuple[float, float] | None]]]:
    """For each class, its score in each run with its place between the lowest (0) and the highest (1) of all."""
    tables = [run.evaluation["per_class"] for run in runs if run.evaluation]
    every = [row[score] for table in tables for row in table.values()]
    low, reach = min(every), (max(every) - min(every)) or 1.0
    classes = dict.fromkeys(name for table in tables for name in table)
    return [
        (name, [(t[name][score], (t[name][score] - low) / reach) if name in t else None for t in tables])
        for name in classes
    ]


def _draw_curves(runs: Sequence[Run], figure: Figure) -> None:
    """Validation accuracy, and the losses of training (dashed) and validation, of all runs in one picture."""
    figure.set_size_inches(10, 4.2 + 0.25 * (len(runs) // 3))
    accuracies, losses = figure.subplots(1, 2)
    for number, run in enumerate(runs):
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 4}
        style["markevery"] = max(1, len(run.rows) // 15)
        accuracies.plot(*run.curve("val_accuracy"), label=run.name, **style)
        losses.plot(*run.curve("val_loss"), **style)
        losses.plot(*run.curve("train_loss"), color=style["color"], linestyle="--", linewidth=1.2)
    losses.plot([], [], "-", color="#5b6b7b", label="validation")
    losses.plot([], [], "--", color="#5b6b7b", label="training")
    losses.legend(frameon=False, loc="upper right")
    accuracies.yaxis.set_major_formatter(PercentFormatter(1))
    _style(accuracies, "validation accuracy")
    _style(losses, "loss")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, handles=accuracies.get_lines())


def _draw_gaps(runs: Sequence[Run], figure: Figure) -> None:
    """A column for each run, all of one scale: accuracy above loss, the gap of training and validation filled.

    The gap is orange where training is the better one, which is the overfit, and grey elsewhere.
    """
    blocks, columns = -(-len(runs) // BESIDE), min(len(runs), BESIDE)
    figure.set_size_inches(max(6, 3 * columns), 4.6 * blocks)
    panels = figure.subplots(2 * blocks, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_visible(False)
    for row, quantity in enumerate(("accuracy", "loss")):
        first = panels[row][0]
        for number, run in enumerate(runs):
            axes = panels[2 * (number // BESIDE) + row][number % BESIDE]
            axes.set_visible(True)
            if axes is not first:
                axes.sharey(first)
            _draw_gap(axes, run, quantity)
            gap = "" if run.gap is None else f"gap {100 * run.gap:+.1f} points"
            _style(axes, f"{run.name}\n{gap}" if row == 0 else "")
            if number % BESIDE == 0:
                axes.set_ylabel(quantity)
        if quantity == "accuracy":
            first.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panels[0][0].legend(frameon=False, loc="lower right", fontsize=9)


def _draw_gap(axes: Axes, run: Run, quantity: str) -> None:
    train, val = (dict(zip(*run.curve(f"{part}_{quantity}"), strict=True)) for part in ("train", "val"))
    both = sorted(train.keys() & val.keys())
    ours, theirs = np.array([train[e] for e in both]), np.array([val[e] for e in both])
    overfit = ours > theirs if quantity == "accuracy" else ours < theirs
    for where, colour in ((overfit, COLOURS[1]), (~overfit, "#8d99a6")):
        axes.fill_between(both, ours, theirs, where=where, interpolate=True, color=colour, alpha=0.25, linewidth=0)
    axes.plot(list(train), list(train.values()), "--", color="#5b6b7b", label="training")
    axes.plot(list(val), list(val.values()), "-", color=COLOURS[0], label="validation")


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=6))
    axes.grid(axis="y", color="#e3e7ec", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _draw(draw: Any) -> str:
    figure = Figure(layout="constrained", dpi=130)
    draw(figure)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", bbox_inches="tight")
    return png_uri(stream.getvalue())


def _default_page(places: Sequence[str]) -> str:
    """``compare.html`` in the innermost folder that holds all of ``places``, as a path from here where it is below."""
    shared = "/".join(_shared(places))
    if not shared or shared.endswith(":/"):
        raise UsageError(f"{places[0]} and {places[-1]} share no folder; say where the page goes with `-o page.html`")
    return f"{shared}/compare.html".removeprefix(f"{storage.absolute('.')}/")


def _shared(places: Sequence[str]) -> list[str]:
    """The parts of the path of the innermost folder that holds all of ``places``."""
    folders = [storage.absolute(place).split("/")[:-1] for place in places]
    levels = takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False))
    return [names[0] for names in levels]
