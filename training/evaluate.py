"""How good a model bundle is on one split of a shard set: scores, confusion, calibration, what it takes for unknown.

In come a bundle and shards, out go ``evaluation.json``, ``predictions.parquet`` and plots. Plain PyTorch; the pixels
take the same way to the model as in training and in classification.

Command: ``tilefleet evaluate BUNDLE SHARDS [--split test] [--foreign IMAGES] [-o DIR]``
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
from torch.nn import functional

from cluster import storage
from configs.errors import TilefleetError, UsageError
from training.bundle import load_bundle
from training.calibrate import Progress, judge_split
from training.foreign import judge_unknown
from training.images import list_images
from training.plots import plot_calibration, plot_confusion
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
    foreign: str | None = None,
    device: str = "auto",
    batch_size: int = 256,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate ``bundle`` on ``split`` and return what ``evaluation.json`` then holds.

    A tile that cannot be decoded counts as wrong in accuracy and recall and is listed under ``errors``. ``loss`` is the
    mean cross-entropy, in nats, of the calibrated probabilities of all others. ``out`` defaults to ``evaluation``
    beside a bundle that lies in a run. ``foreign`` names images of anything else (see :mod:`training.images`), by which
    the unknown threshold is judged. Raises :class:`UsageError` where the split is empty or there is no place for the
    results, and :class:`TilefleetError` where the bundle was made for other classes.
    """
    judge, info = load_bundle(bundle)
    index = load_index(shards)
    _check_classes(bundle, info.classes, shards, index.classes)
    index.require(shards, split)
    if foreign and info.unknown_threshold is None:
        raise UsageError(f"{bundle}: was not calibrated, as its shards had no val split; train it on ones that do")
    strangers = list_images(foreign) if foreign else []
    out = _place(bundle, out)
    reader = TileReader(shards, split)
    logits, distances, errors = judge_split(judge, info, reader, _device(device), batch_size, progress)

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
    plot_calibration(result["calibration"], result["calibration_before"], storage.join(out, "calibration.png"))
    storage.remove(storage.join(out, "unknown.png"))  # of an earlier evaluation
    if foreign:
        known = distances[decoded].numpy()
        if not len(known):
            raise TilefleetError(f"{shards}: no tile of split {split!r} can be decoded; `tilefleet verify` tells more")
        plot = storage.join(out, "unknown.png")
        also = progress and (lambda done, total: progress(len(reader) + done, len(reader) + total))
        result["foreign"] = {"source": foreign, **judge_unknown(judge, info, known, strangers, plot, also)}
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


def _write_parquet(table: pa.Table, path: str) -> None:
    stream = io.BytesIO()
    pq.write_table(table, stream)
    storage.write_bytes(path, stream.getvalue())
