"""One self-contained HTML page about a training run or about predictions.

In comes the folder of either, out goes a page that loads nothing from elsewhere: pictures are data URIs, there is no
script, and all text from the data is escaped. Predictions are streamed (see :mod:`inference.tally`), so memory is the
same for a thousand rows and for millions.

Command: ``tilefleet report RUN_OR_PREDICTIONS [-o page.html]``
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from cluster import storage
from cluster.records import Status, best_row, read_metrics, read_status
from configs.errors import TilefleetError, UsageError
from inference import pictures
from inference.engines import Trial
from inference.ledger import read_totals
from inference.page import read_json, read_png, render
from inference.plan import PLAN, PlanFile, open_plan
from inference.sink import Summary
from inference.tally import Example, Tally, overview
from training.bundle import INFO, read_info

WRONG_TILES = 24
CLASSES_WITH_EXAMPLES = 12
EVALUATION_PLOTS = ("confusion", "calibration", "unknown")
SILENT_SECONDS = 120.0
"""A run without news for so long is most likely dead, whatever its status says."""


class ClassFound(NamedTuple):
    """What was found of one class; ``confidence`` is summed over its tiles, ``most`` and ``least`` are by it."""

    name: str
    tiles: int
    unknown: int
    confidence: float
    most: list[Example]
    least: list[Example]


def report(location: str, out: str | None = None) -> str:
    """Write the page about ``location`` to ``out``, by default ``report.html`` in that folder; returns where it is.

    Raises :class:`UsageError` where the folder is neither a run nor predictions, :class:`TilefleetError` where a record
    in it is damaged.
    """
    out = out or storage.join(location, "report.html")
    if not storage.exists(location):
        raise UsageError(f"{location}: no such folder")
    if storage.is_dir(out):
        raise UsageError(f"{out}: is a folder; name the HTML file to write")
    try:
        if plan := open_plan(location):
            page = render("predictions.html", **describe_predictions(location, plan))
        elif storage.exists(storage.join(location, "config.yaml")):
            page = render("run.html", **describe_run(location))
        elif (status := read_status(location)) and status.kind == "classify":
            why = f"; {status.state}: {status.error}" if status.error else "; try again once it is"
            raise TilefleetError(f"{location}: not planned yet{why}")
        else:
            raise UsageError(
                f"{location}: neither a run (config.yaml) nor predictions ({PLAN}); name the folder of one"
            )
    except (ValueError, KeyError, yaml.YAMLError) as error:
        raise TilefleetError(f"{location}: a record in it is damaged ({str(error).splitlines()[0]})") from error
    storage.write_bytes(out, page.encode())
    return out


def describe_predictions(location: str, plan: PlanFile) -> dict[str, Any]:
    """Everything that ``predictions.html`` shows."""
    status, success = read_status(location), read_totals(location)
    trials = {name: Trial.model_validate(trial) for name, trial in plan.terms.trials.items()}
    view = overview(location, plan)
    tally, total = view.tally, view.total
    by_class = sorted(_classes(total, tally), key=lambda found: -found.tiles)
    shown = [found for found in by_class[:CLASSES_WITH_EXAMPLES] if found.tiles]
    rankings = [tally.least_of_all, tally.unknown, *(end for found in shown for end in (found.most, found.least))]
    found, gone = pictures.from_archives(rankings, plan)
    return {
        "name": _name(location),
        "state": _state(status, finished=success is not None),
        "terms": plan.terms,
        "trials": sorted(trials.items(), key=lambda item: -(item[1].tiles_per_second or 0)),
        "view": view,
        "total": total,
        "tally": tally,
        "by_class": by_class,
        "shown": shown,
        "pictures": found,
        "gone": gone,
        "causes": tally.causes.most_common(),
        "bad": sorted({bad.archive: bad.reason for bad in plan.bad}.items() | total.bad_archives.items()),
        "chunks": plan.chunks,
        "seconds": status.seconds_by_stage if status and status.seconds_by_stage else total.seconds,
        "success": success,
        "status": status,
    }


def _classes(total: Summary, tally: Tally) -> list[ClassFound]:
    return [
        ClassFound(
            name,
            total.tiles_by_class[name],
            int(tally.unknown_by_class[number]),
            float(tally.confidence_by_class[number]),
            tally.most.of(number),
            tally.least.of(number),
        )
        for number, name in enumerate(tally.classes)
    ]


def _state(status: Status | None, *, finished: bool) -> str:
    """In one word what a classification does."""
    if finished:
        return "done"
    if status is None or status.state == "done":
        return "unfinished"
    silent = status.state == "running" and time.time() - status.updated > SILENT_SECONDS
    return "stopped" if silent else status.state


def describe_run(location: str) -> dict[str, Any]:
    """Everything that ``run.html`` shows."""
    config = storage.read_bytes(storage.join(location, "config.yaml")).decode()
    bundle = storage.join(location, "bundle")
    evaluation = read_json(storage.join(location, "evaluation", "evaluation.json"))
    rows = read_metrics(location)
    right, wrong = _ranked(storage.join(location, "evaluation", "predictions.parquet"), evaluation)
    found, gone = pictures.from_shards([*right, *wrong], evaluation)
    return {
        "name": _name(location),
        "config": config,
        "recipe": yaml.safe_load(config),
        "bundle": read_info(bundle) if storage.exists(storage.join(bundle, INFO)) else None,
        "status": read_status(location),
        "rows": rows,
        "best": best_row(rows),
        "curves": read_png(storage.join(location, "curves.png")),
        "evaluation": evaluation,
        "predictions": read_png(storage.join(location, "predictions.png")),
        "waiting": _share_of_waiting(rows),
        **{name: read_png(storage.join(location, "evaluation", f"{name}.png")) for name in EVALUATION_PLOTS},
        "right": right,
        "wrong": wrong,
        "pictures": found,
        "gone": gone,
    }


def _share_of_waiting(rows: Sequence[dict[str, Any]]) -> float | None:
    """The share of training in which the first worker stood still for its next batch; None where no row says so."""
    timed = [row for row in rows if row.get("seconds") and row.get("seconds_waiting") is not None]
    return sum(row["seconds_waiting"] for row in timed) / sum(row["seconds"] for row in timed) if timed else None


def _ranked(location: str, evaluation: dict[str, Any] | None) -> tuple[list[Example], list[Example]]:
    """Of an evaluation's tiles, the most confident right one of each class and the most confident wrong ones of all."""
    if evaluation is None or not storage.exists(location):
        return [], []
    rows = pq.read_table(pa.BufferReader(storage.read_bytes(location)))
    rows = rows.filter(pc.is_valid(rows["class_id"])).sort_by([("confidence", "descending")])
    labels, hit = rows["label"].to_numpy(), pc.equal(rows["label"], rows["class_id"]).to_numpy()
    first_of_class = np.unique(labels[hit], return_index=True)[1]
    chosen = (np.flatnonzero(hit)[first_of_class], np.flatnonzero(~hit)[:WRONG_TILES])
    classes = evaluation["classes"]
    right, wrong = (
        [Example(r["confidence"], r["tile_id"], classes[r["class_id"]], classes[r["label"]]) for r in found]
        for found in (rows.take(positions).to_pylist() for positions in chosen)
    )
    return right, wrong


def _name(location: str) -> str:
    return location.rstrip("/").rpartition("/")[2]
