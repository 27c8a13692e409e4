"""One self-contained HTML page about a training run or about predictions.

In comes the folder of either, out goes a page that loads nothing from elsewhere: pictures are data URIs, there is no
script, and all text from the data is escaped. Predictions are read a part at a time, so memory stays that of one chunk.

Command: ``tilefleet report RUN_OR_PREDICTIONS [-o page.html]``
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from PIL import Image

from cluster import storage
from cluster.records import best_row, read_metrics, read_status
from configs.errors import TilefleetError, UsageError
from inference import sink
from inference.archive import PLAN, Chunk, read_chunk, read_plan
from inference.page import read_json, read_png, render
from training.bundle import INFO, read_info
from training.decode import decode_image
from training.encoded import TileError
from training.shards import TileReader, fingerprint

HISTOGRAM_BINS = 20
LEAST_CONFIDENT = 24
WRONG_TILES = 24
EXAMPLES_OF_A_CLASS = 6
CLASSES_WITH_EXAMPLES = 10
EXAMPLES_OF_AN_ERROR = 3
EVALUATION_PLOTS = ("confusion", "calibration", "unknown")
PICTURE_PIXELS = 128
"""Longest side of a tile's picture on a page; larger tiles are made smaller."""


class Tile(NamedTuple):
    """A tile worth showing; ``place`` is the chunk it comes from, ``truth`` its true class where that is known."""

    confidence: float
    tile_id: str
    place: str
    predicted: str
    truth: str | None = None


BY_CONFIDENCE = attrgetter("confidence")


@dataclass
class Tally:
    """What a page says of predictions, gathered part by part."""

    histogram: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(HISTOGRAM_BINS, np.int64))
    least: list[Tile] = field(default_factory=list)
    most: dict[str, list[Tile]] = field(default_factory=dict)
    causes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def add(self, chunk: str, rows: pa.Table) -> None:
        """Take the rows of one part in; of each ranking only the best are kept."""
        failed = rows.filter(pc.is_valid(rows["error"]))
        for tile_id, archive, error in zip(
            *(failed[name].to_pylist() for name in ("tile_id", "archive", "error")), strict=True
        ):
            cause = error.partition(":")[0]
            self.causes[cause] += 1
            if self.causes[cause] <= EXAMPLES_OF_AN_ERROR:
                self.examples.setdefault(cause, []).append((f"{archive}: {tile_id}", error))
        good = rows.filter(pc.is_null(rows["error"]))
        confidence = good["confidence"].to_numpy()
        class_id = good["class_id"].to_numpy()
        self.histogram += np.histogram(confidence, HISTOGRAM_BINS, (0, 1))[0]

        def tiles(positions: Iterable[int]) -> list[Tile]:
            return [
                Tile(float(confidence[i]), good["tile_id"][i].as_py(), chunk, good["class_name"][i].as_py())
                for i in map(int, positions)
            ]

        order = np.argsort(confidence, kind="stable")
        self.least = sorted(self.least + tiles(order[:LEAST_CONFIDENT]), key=BY_CONFIDENCE)[:LEAST_CONFIDENT]
        falling = np.argsort(-confidence, kind="stable")
        for number in np.unique(class_id):
            best = tiles(falling[class_id[falling] == number][:EXAMPLES_OF_A_CLASS])
            kept = self.most.get(best[0].predicted, []) + best
            self.most[best[0].predicted] = sorted(kept, key=BY_CONFIDENCE, reverse=True)[:EXAMPLES_OF_A_CLASS]


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
        if storage.exists(storage.join(location, PLAN)):
            page = render("predictions.html", **describe_predictions(location))
        elif storage.exists(storage.join(location, "config.yaml")):
            page = render("run.html", **describe_run(location))
        else:
            raise UsageError(
                f"{location}: neither a run (config.yaml) nor predictions ({PLAN}); name the folder of one"
            )
    except (ValueError, KeyError, yaml.YAMLError) as error:
        raise TilefleetError(f"{location}: a record in it is damaged ({str(error).splitlines()[0]})") from error
    storage.write_bytes(out, page.encode())
    return out


def describe_predictions(location: str) -> dict[str, Any]:
    """Everything that ``predictions.html`` shows."""
    planned = read_plan(location)
    if planned is None:
        raise UsageError(f"{location}: {PLAN} is gone")
    plan, terms = planned
    parts = [p for p in storage.list_files(storage.join(location, sink.PREDICTIONS)) if sink.chunk_of(p)]
    total = sink.summed(map(sink.read_summary, parts))
    tally = Tally()
    columns = ["tile_id", "archive", "class_id", "class_name", "confidence", "error"]
    for part in parts:
        tally.add(str(sink.chunk_of(part)), pq.read_table(pa.BufferReader(storage.read_bytes(part)), columns=columns))
    by_class = sorted(total.tiles_by_class.items(), key=lambda item: -item[1])
    shown = {name: tally.most[name] for name, _ in by_class[:CLASSES_WITH_EXAMPLES] if name in tally.most}
    chunks = {chunk.id: chunk for chunk in plan.chunks}
    pictures, gone = _from_archives([*tally.least, *(tile for tiles in shown.values() for tile in tiles)], chunks)
    return {
        "name": location.rstrip("/").rpartition("/")[2],
        "planned": plan.tiles,
        "total": total,
        "by_class": by_class,
        "histogram": tally.histogram.tolist(),
        "least": tally.least,
        "most": shown,
        "pictures": pictures,
        "gone": gone,
        "causes": tally.causes.most_common(),
        "examples": tally.examples,
        "bad": plan.bad,
        "archives": len({chunk.archive for chunk in plan.chunks}),
        "parts": len(parts),
        "chunks": len(plan.chunks),
        "engine": terms.engine,
        "success": read_json(storage.join(location, "_SUCCESS.json")),
        "status": read_status(location),
    }


def describe_run(location: str) -> dict[str, Any]:
    """Everything that ``run.html`` shows."""
    config = storage.read_bytes(storage.join(location, "config.yaml")).decode()
    bundle = storage.join(location, "bundle")
    evaluation = read_json(storage.join(location, "evaluation", "evaluation.json"))
    rows = read_metrics(location)
    right, wrong = _ranked(storage.join(location, "evaluation", "predictions.parquet"), evaluation)
    pictures, gone = _from_shards([*right, *wrong], evaluation)
    return {
        "name": location.rstrip("/").rpartition("/")[2],
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
        "pictures": pictures,
        "gone": gone,
    }


def _share_of_waiting(rows: Sequence[dict[str, Any]]) -> float | None:
    """The share of training in which the first worker stood still for its next batch; None where no row says so."""
    timed = [row for row in rows if row.get("seconds") and row.get("seconds_waiting") is not None]
    return sum(row["seconds_waiting"] for row in timed) / sum(row["seconds"] for row in timed) if timed else None


def _ranked(location: str, evaluation: dict[str, Any] | None) -> tuple[list[Tile], list[Tile]]:
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
        [Tile(r["confidence"], r["tile_id"], "", classes[r["class_id"]], classes[r["label"]]) for r in found]
        for found in (rows.take(positions).to_pylist() for positions in chosen)
    )
    return right, wrong


def _from_shards(tiles: Sequence[Tile], evaluation: dict[str, Any] | None) -> tuple[dict[Tile, str], list[str]]:
    """Pictures of tiles of the evaluated split as data URIs, and why some are missing."""
    if evaluation is None:
        return {}, []
    shards = evaluation["shards"]
    try:
        if fingerprint(shards) != evaluation["data_fingerprint"]:
            return {}, [f"{shards}: packed anew since the evaluation, so its tiles are not shown"]
        reader = TileReader(shards, evaluation["split"])
        positions = {tile_id: position for position, tile_id in enumerate(reader.tile_ids)}
        found = {tile: _picture(reader.read([positions[tile.tile_id]])[0]) for tile in tiles}
    except (OSError, TilefleetError) as error:
        return {}, [f"The tiles cannot be shown, as their shards are gone or changed ({error})"]
    return {tile: picture for tile, picture in found.items() if picture}, []


def _from_archives(tiles: Sequence[Tile], chunks: dict[str, Chunk]) -> tuple[dict[Tile, str], list[str]]:
    """Pictures of classified tiles as data URIs, each chunk read once, and which archives cannot be read any more."""
    wanted: dict[str, list[Tile]] = {}
    for tile in tiles:
        wanted.setdefault(tile.place, []).append(tile)
    pictures: dict[Tile, str] = {}
    gone: dict[str, str] = {}
    for place in sorted(wanted):
        archive = chunks[place].archive
        if archive in gone:
            continue
        try:
            encoded = {tile.tile_id: tile.data for tile in read_chunk(chunks[place])}
        except TilefleetError as error:
            gone[archive] = str(error).partition(";")[0]
            continue
        found = {tile: _picture(encoded.get(tile.tile_id) or b"") for tile in wanted[place]}
        pictures |= {tile: picture for tile, picture in found.items() if picture}
    return pictures, list(gone.values())


def _picture(data: bytes) -> str | None:
    """An encoded tile as a small JPEG in a data URI: decoded first, so that nothing but pixels gets to the page."""
    try:
        image = Image.fromarray(decode_image(data).permute(1, 2, 0).numpy())
    except TileError:
        return None
    image.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
