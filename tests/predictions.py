"""Predictions that tests make without a model, and archives of any kind to make them of."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from cluster.records import StatusWriter
from inference import sink
from inference.archive import list_archives
from inference.ledger import Totals, write_totals
from inference.plan import Chunk, PlanFile, Terms, chunk_id, open_plan, write_plan
from inference.predictor import Predictions
from tests.archives import TERMS, tar_bytes, write_tar

CLASSES = ["Field", "Lake <i>", "Town"]


def plan_of(out: str, archives: Sequence[str], tiles_per_chunk: int = 1000, terms: Terms = TERMS) -> PlanFile:
    """The plan of what ``archives`` name, kept in ``out``."""
    write_plan(out, list_archives(archives), lambda sample: terms, tiles_per_chunk)
    plan = open_plan(out)
    assert plan
    return plan


def predictions(folder: Path, *, finished: bool) -> str:
    """A tar of 42 tiles, of which numbers 20 and 21 are errors, in chunks of 20, 20 and 2, and one of no use.

    Where the run is not ``finished`` the first chunk alone is done.
    """
    (folder / "archives").mkdir()
    out = str(folder / "out")
    write_tar(folder / "archives" / "a.tar", [(f"a/tile-{number}.png", png(number)) for number in range(42)])
    (folder / "archives" / "torn.tar").touch()
    plan = plan_of(out, [str(folder / "archives")], 20)
    errors = {20: "not an image", 21: "image file over the limit: 99 bytes, 9 allowed"}
    for chunk, numbers in zip(plan, (range(20), range(20, 40), range(40, 42)), strict=True):
        if finished or chunk.id == chunk_id(0):
            tiles = [(n % 3, n / 42, False) for n in numbers]
            write_part(out, chunk, [f"a/tile-{n}" for n in numbers], tiles, errors)
    status = StatusWriter(out, "classify", planned_tiles=42)
    status.finish("done" if finished else "failed", None if finished else "the disk is full")
    if finished:
        finish(out)
    return out


def write_part(
    out: str,
    chunk: Chunk,
    tile_ids: Sequence[str],
    tiles: Sequence[tuple[int, float, bool]],
    errors: dict[int, str] | None = None,
    damage: str | None = None,
) -> None:
    """The part of a chunk from (class, confidence, failed) of its tiles; below 0.1 is unknown.

    ``errors`` are by the number with which an id ends.
    """
    by_id = {f"a/tile-{number}": error for number, error in (errors or {}).items()}
    why = [by_id.get(i, "torn: here" if tile[2] else None) for i, tile in zip(tile_ids, tiles, strict=True)]
    failed = np.array([error is not None for error in why])
    confidence = np.array([tile[1] for tile in tiles], np.float32)
    part = sink.Part(chunk.archive, CLASSES)
    predicted = Predictions(
        class_id=np.where(failed, -1, [tile[0] for tile in tiles]).astype(np.int32),
        confidence=confidence,
        probabilities=np.zeros((len(tiles), len(CLASSES)), np.float32),
        is_unknown=~failed & (confidence < 0.1),
        errors=why,
        seconds={"read": 0.5, "forward": 1.0},
    )
    part.add(list(tile_ids), [None] * len(tiles), predicted)
    part.write(sink.part_location(out, chunk.id), damage)


def finish(out: str) -> None:
    """Leave what a run leaves at its end."""
    parts = sorted(Path(out, "predictions").iterdir())
    total = sink.summed(sink.read_summary(str(part)) for part in parts)
    counts = total.model_dump(include=Totals.model_fields.keys() - {"seconds", "bad_archives"})
    end = {"bad_archives": [], "chunks": len(parts), "seconds": 3.0, "tiles_per_second": 1234.0, "engine": "torch-f32"}
    write_totals(out, Totals(**counts, **end), 0)


def make_archive(folder: Path, kind: str, files: dict[str, bytes]) -> str:
    """An archive of a kind from names and contents; returns what a user would name."""
    for name, data in files.items():
        path = folder / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    if kind == "folder":
        return str(folder / "files")
    if kind == "images":
        return str(folder / "files" / "d" / "*")
    target = folder / f"a.{kind}"
    if kind == "list":
        target = folder / "a.txt"
        target.write_text("".join(f"files/{name}\n" for name in files))
    elif kind == "zip":
        with zipfile.ZipFile(target, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        compression = {"tar.gz": "gzip", "tar.zst": "zstd"}[kind]
        with pa.CompressedOutputStream(str(target), compression) as stream:
            stream.write(tar_bytes(list(files.items())))
    return str(target)


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()
