"""How good a model bundle is on one split of a shard set: scores, confusion, calibration and their pictures.

In come a bundle and shards, out go ``evaluation.json``, ``confusion.png`` and ``predictions.parquet``. Plain PyTorch;
the pixels take the same way to the model as in training and in classification.

Command: ``tilefleet evaluate BUNDLE SHARDS [--split test] [-o DIR]``
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch.nn import functional

from cluster import storage
from configs.errors import TilefleetError, UsageError
from training.bundle import load_bundle
from training.calibrate import Progress, split_logits
from training.shards import TileReader, fingerprint, load_index

RESULT = "evaluation.json"
CALIBRATION_BINS = 15
PREDICTIONS_SCHEMA = pa.schema(
    [
        ("tile_id", pa.string()),
        ("label", pa.int32()),
        ("class_id", pa.int32()),  # null where the tile could not be decoded
        ("confidence", pa.float32()),  # null there too
    ]
)

Counts = npt.NDArray[np.int64]


def evaluate(
    bundle: str,
    shards: str,
    *,
    split: str = "test",
    out: str | None = None,
    device: str = "auto",
    batch_size: int = 256,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate ``bundle`` on ``split`` and return what ``evaluation.json`` then holds.

    A tile that cannot be decoded counts as wrong in accuracy and recall and is listed under ``errors``. ``loss`` is the
    mean cross-entropy, in nats, of the calibrated probabilities of all others. ``out`` defaults to ``evaluation``
    beside a bundle that lies in a run. Raises :class:`UsageError` where the split is empty or there is no place for
    the results, and :class:`TilefleetError` where the bundle was made for other classes.
    """
    model, info = load_bundle(bundle)
    index = load_index(shards)
    _check_classes(bundle, info.classes, shards, index.classes)
    index.require(shards, split)
    out = _place(bundle, out)
    reader = TileReader(shards, split)
    logits, errors = split_logits(model, info, reader, _device(device), batch_size, progress)

    labels = torch.from_numpy(reader.labels.astype(np.int64))
    decoded = torch.tensor([error is None for error in errors])
    confidence, predicted = torch.softmax(logits, dim=1).max(dim=1)
    before = torch.softmax(logits * info.temperature, dim=1).amax(dim=1)  # without temperature scaling
    right = (predicted == labels)[decoded].numpy()
    confusion = count_confusion(labels[decoded].numpy(), predicted[decoded].numpy(), len(info.classes))
    undecodable = np.bincount(labels[~decoded].numpy(), minlength=len(info.classes))
    loss = float(functional.cross_entropy(logits[decoded], labels[decoded])) if decoded.any() else 0.0
    result = {
        "bundle": bundle,
        "bundle_digest": info.digest,
        "shards": shards,
        "data_fingerprint": fingerprint(shards),
        "split": split,
        "tiles": len(reader),
        "undecodable": int(undecodable.sum()),
        "errors": [{"tile_id": i, "error": e} for i, e in zip(reader.tile_ids, errors, strict=True) if e is not None],
        "loss": loss,
        **scores(confusion, info.classes, undecodable),
        "confusion": confusion.tolist(),
        "classes": info.classes,
        "temperature": info.temperature,
        "calibration": calibration(confidence[decoded].numpy(), right),
        "calibration_before": calibration(before[decoded].numpy(), right),
    }
    columns = [
        reader.tile_ids,
        pa.array(reader.labels, pa.int32()),
        pa.array(predicted.numpy(), pa.int32(), mask=~decoded.numpy()),
        pa.array(confidence.numpy(), pa.float32(), mask=~decoded.numpy()),
    ]
    _write_parquet(pa.table(columns, schema=PREDICTIONS_SCHEMA), storage.join(out, "predictions.parquet"))
    plot_confusion(confusion, info.classes, storage.join(out, "confusion.png"))
    storage.write_bytes(storage.join(out, RESULT), json.dumps(result, indent=1).encode())
    return result


def count_confusion(labels: Counts, predicted: Counts, classes: int) -> Counts:
    """int64 ``[classes, classes]``: how many tiles of the row's class were given the column's."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes).astype(np.int64)


def scores(confusion: Counts, classes: Sequence[str], undecodable: Counts | None = None) -> dict[str, Any]:
    """Accuracy, macro averages and the scores of each class; a quotient with nothing below the line is 0.

    ``confusion`` is int64 ``[classes, classes]``, rows true, columns predicted; ``undecodable`` is int64 ``[classes]``,
    tiles of each class that got no prediction: they raise the support, so recall and accuracy count them as wrong.
    """
    right = np.diagonal(confusion).astype(np.float64)
    support = confusion.sum(axis=1) + (0 if undecodable is None else undecodable)
    precision = _over(right, confusion.sum(axis=0))
    recall = _over(right, support)
    f1 = _over(2 * precision * recall, precision + recall)
    return {
        "accuracy": float(_over(right.sum(), support.sum())),
        "macro_precision": float(precision.mean()),
        "macro_recall": float(recall.mean()),
        "macro_f1": float(f1.mean()),
        "per_class": {
            name: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "support": int(support[i]),
            }
            for i, name in enumerate(classes)
        },
    }


def calibration(confidence: npt.NDArray[np.float32], right: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Reliability bins and the expected calibration error (Guo et al., "On calibration of modern neural networks").

    ``confidence`` is float32 ``[tiles]``, ``right`` bool ``[tiles]``. Bin *i* of :data:`CALIBRATION_BINS` holds
    confidences in (i / bins, (i + 1) / bins]; the error is the mean over tiles of the distance between their bin's
    accuracy and its mean confidence.
    """
    place = np.clip(np.ceil(confidence.astype(np.float64) * CALIBRATION_BINS).astype(np.int64) - 1, 0, None)
    tiles = np.bincount(place, minlength=CALIBRATION_BINS)
    accuracy = _over(np.bincount(place, right, CALIBRATION_BINS), tiles)
    mean = _over(np.bincount(place, confidence, CALIBRATION_BINS), tiles)
    return {
        "ece": float(_over((tiles * np.abs(accuracy - mean)).sum(), tiles.sum())),
        "bins": [
            {
                "low": i / CALIBRATION_BINS,
                "high": (i + 1) / CALIBRATION_BINS,
                "tiles": int(tiles[i]),
                "accuracy": float(accuracy[i]),
                "confidence": float(mean[i]),
            }
            for i in range(CALIBRATION_BINS)
        ],
    }


def plot_confusion(confusion: Counts, classes: Sequence[str], path: str) -> None:
    """Write a PNG of the matrix: counts in the cells, coloured by the share of the row's class."""
    count = len(classes)
    few = count <= 15
    side = (0.62 if few else 0.36) * count + 2.6
    figure = Figure(figsize=(side + 0.6, side), layout="constrained", dpi=130)
    axes = figure.add_subplot()
    share = _over(confusion, confusion.sum(axis=1, keepdims=True))
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


def plot_curves(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Write a PNG of loss and accuracy over epochs from the rows of ``metrics.jsonl``; the best epoch is marked."""
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=130)
    losses, accuracies = figure.subplots(1, 2)
    _plot_panel(losses, rows, "loss")
    _plot_panel(accuracies, rows, "accuracy")
    accuracies.yaxis.set_major_formatter(PercentFormatter(1))
    judged = [row for row in rows if row.get("val_accuracy") is not None]
    if judged:
        best = max(judged, key=lambda row: float(row["val_accuracy"]))
        accuracies.plot(best["epoch"], best["val_accuracy"], "o", color="#d1495b", markersize=7, zorder=4)
        for axes in (losses, accuracies):
            axes.axvline(best["epoch"], color="#d1495b", linewidth=1, linestyle=":")
        accuracies.set_title(f"best: {best['val_accuracy']:.2%} in epoch {best['epoch']}", fontsize=10, loc="right")
    accuracies.legend(frameon=False, loc="lower right")
    _write_png(figure, path)


def _plot_panel(axes: Axes, rows: Sequence[dict[str, Any]], quantity: str) -> None:
    for part, name, colour in (("train", "training", "#8d99a6"), ("val", "validation", "#1f6fb2")):
        points = [(r["epoch"], r[f"{part}_{quantity}"]) for r in rows if r.get(f"{part}_{quantity}") is not None]
        style = "o-" if len(points) <= 30 else "-"
        axes.plot([x for x, _ in points], [y for _, y in points], style, color=colour, markersize=3.5, label=name)
    axes.set_title(quantity, fontsize=11, loc="left", fontweight="bold")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.margins(x=0.03 if len(rows) > 1 else 1)
    axes.grid(axis="y", color="#e3e7ec", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _check_classes(bundle: str, ours: list[str], shards: str, theirs: list[str]) -> None:
    for number, (our, their) in enumerate(zip_longest(ours, theirs)):
        if our != their:
            raise TilefleetError(
                f"{bundle}: made for other classes than {shards}: class {number} is {our or 'missing'} in the bundle "
                f"and {their or 'missing'} in the shards; evaluate on shards of the classes it was trained with"
            )


def _place(bundle: str, out: str | None) -> str:
    if out is None:
        run, _, name = bundle.rstrip("/").rpartition("/")
        if not name or not storage.exists(storage.join(run or ".", "config.yaml")):
            raise UsageError(f"{bundle}: does not lie in a run folder; say where the results go with `-o DIR`")
        out = storage.join(run or ".", "evaluation")
    if storage.list_files(out) and not storage.exists(storage.join(out, RESULT)):
        raise UsageError(f"{out}: holds something else than an evaluation; choose another folder with `-o DIR`")
    storage.make_dirs(out)
    return out


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device: {name} asked for, but there is no GPU that torch can use; say cpu or auto")
    return torch.device(name)


def _over(numerator: Any, denominator: Any) -> Any:
    """Elementwise quotient as float64, 0 where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator))
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator != 0)


def _write_png(figure: Figure, path: str) -> None:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", bbox_inches="tight")
    storage.write_bytes(path, stream.getvalue())


def _write_parquet(table: pa.Table, path: str) -> None:
    stream = io.BytesIO()
    pq.write_table(table, stream)
    storage.write_bytes(path, stream.getvalue())
