"""Raw tiles become a shard set: leak-free splits, shards that are the same to the byte on every run, an index.

In goes a source (:mod:`training.sources`), out comes the folder that :mod:`training.shards` describes. A first pass
reads and decodes every tile (:mod:`training.survey`), the second writes. ``tilefleet pack SOURCE OUT`` runs it.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from webdataset import TarWriter

from cluster import storage
from configs.errors import TilefleetError, UsageError
from training.decode import decode_image, resize
from training.encoded import Bands, TileError
from training.raw import first_few
from training.shards import INDEX, MARKER, SPLITS, TILES, TILES_SCHEMA, Index, Shard, save_index
from training.sources import RawTile, open_source
from training.splits import (
    assign_splits,
    count_by_class,
    count_contradictions,
    find_leaks,
    plan_shards,
    take_val,
    warnings,
)
from training.survey import Progress, Survey, in_order, mean_std, survey, usual_size
from training.tars import scan_tar

MAX_SIZE = 4096
"""Largest side of a resized tile, in pixels."""


def pack(
    source: str,
    out: str,
    *,
    split: Sequence[int] = (80, 10, 10),
    seed: int = 0,
    tiles_per_shard: int = 1000,
    size: int | None = None,
    bands: Bands | None = None,
    workers: int | None = None,
    skip_damaged: bool = False,
    progress: Progress | None = None,
) -> Index:
    """Pack the tiles of ``source`` (see :func:`open_source`) into a new shard set at ``out``; returns its index.

    ``split`` are the shares of train, val and test. Splits that the source gives are kept: where it has no val split,
    that one is taken out of train with the share val/(train+val), 1/9 for 80,10,10; where it has no test split, test
    stays empty. A tile with the pixels of one in a more protected given split (test before val before train) is left
    out and counted, as a published test split must not change. ``size`` in pixels resizes and re-encodes tiles of
    another size. ``bands`` says which bands are the channels of a tile, red, green and blue unless given; the shards
    hold all that the source has. ``workers`` is the number of threads; what is written does not depend on it. Raises
    :class:`UsageError` for wrong arguments or an ``out`` that holds something else, :class:`TilefleetError` for bad
    data; nothing is left then.
    """
    _check_arguments(split, tiles_per_shard, size, bands, workers)
    workers = workers or os.cpu_count() or 1
    report: Progress = progress or (lambda stage, done, total: None)
    with closing(open_source(source)) as raw:
        target = _check_out(source, out)
        found = survey(raw, size, workers, report, bands)
        _check_usable(source, found, skip_damaged)
        found, splits, leaks = _assign(source, found, split, seed)
        labels, contents = _labels_and_contents(found)
        given = [name for name in SPLITS if any(tile.split == name for tile in raw.tiles)]
        counts = count_by_class(raw.classes, labels, splits)
        tile_ids = [tile.tile_id for tile in found.tiles]
        plan = plan_shards(tile_ids, [facts.room for facts in found.facts], splits, seed, tiles_per_shard)
        with _unfinished(_check_out(source, out)):  # again, as the first pass may have taken an hour
            shards, tiles_sha256 = _write_shards(source, target, found, plan, workers, report)
            mean, std = mean_std([facts for facts, name in zip(found.facts, splits, strict=True) if name == "train"])
            tile_size = size or usual_size(found.facts)
            other_size = sum((facts.height, facts.width) != (tile_size, tile_size) for facts in found.facts)
            packed = {
                "source": raw.name,
                "seed": seed,
                "split": list(split),
                "tiles_per_shard": tiles_per_shard,
                "size": size,
                "given_splits": given,
                "left_out": raw.left_out | leaks,
                "damaged": found.damaged,
                "resized": other_size if size else 0,
                "other_size": 0 if size else other_size,
                "equal_pixels_other_label": count_contradictions(labels, contents),
                "tiles_by_class": counts,
                "warnings": list(warnings(counts, split, given)),
            }
            index = Index(
                classes=raw.classes,
                tile_size=tile_size,
                bands=bands,
                mean=mean,
                std=std,
                splits=shards,
                tiles_sha256=tiles_sha256,
                packed=packed,
            )
            return save_index(target, index)


def _assign(source: str, found: Survey, shares: Sequence[int], seed: int) -> tuple[Survey, list[str], dict[str, int]]:
    """The tiles to pack, the split of each, and by reason how many are not packed as their pixels would leak."""
    given = [tile.split for tile in found.tiles]
    if not any(given):
        return found, assign_splits(*_labels_and_contents(found), shares, seed), {}
    leaks = find_leaks([facts.content for facts in found.facts], given)
    kept = [position for position, leak in enumerate(leaks) if leak is None]
    found = replace(found, tiles=[found.tiles[i] for i in kept], facts=[found.facts[i] for i in kept])
    labels, contents = _labels_and_contents(found)
    splits = [tile.split for tile in found.tiles]
    if all(tile.split != "val" for tile in found.raw.tiles):
        splits = take_val(labels, contents, splits, shares, seed)
    trained = {label for label, split in zip(labels, splits, strict=True) if split == "train"}
    if lost := [name for label, name in enumerate(found.raw.classes) if label not in trained]:
        raise TilefleetError(
            f"{source}: no train tile of {', '.join(lost)} is left, as all are damaged or have equal pixels in another "
            "split; add others"
        )
    return found, splits, dict(Counter(f"equal pixels in the {leak} split" for leak in leaks if leak))


def _labels_and_contents(found: Survey) -> tuple[list[int], list[bytes]]:
    return [tile.label for tile in found.tiles], [facts.content for facts in found.facts]


def _write_shards(
    source: str, out: str, found: Survey, plan: dict[str, list[int]], workers: int, report: Progress
) -> tuple[dict[str, list[Shard]], str]:
    """The second pass: all shards and ``tiles.parquet``; returns the shards by split and the digest of the table."""

    def write(item: tuple[str, list[int]]) -> tuple[Shard, pa.Table]:
        return _write_shard(source, out, found, *item)

    shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    table = io.BytesIO()
    done = 0
    for split in SPLITS:
        storage.make_dirs(storage.join(out, split))
    with pq.ParquetWriter(table, TILES_SCHEMA) as writer, ThreadPoolExecutor(workers) as threads:
        for shard, rows in in_order(threads, write, plan.items(), workers + 1):
            writer.write_table(rows, row_group_size=max(1, rows.num_rows))
            shards[shard.name.split("/")[0]].append(shard)
            done += shard.tiles
            report("write", done, len(found.tiles))
    storage.write_bytes(storage.join(out, TILES), table.getvalue())
    return shards, hashlib.sha256(table.getvalue()).hexdigest()


def _write_shard(source: str, out: str, found: Survey, name: str, positions: list[int]) -> tuple[Shard, pa.Table]:
    """One tar, and its rows of ``tiles.parquet`` with the offsets that are found in it."""
    buffer = io.BytesIO()
    images: dict[str, tuple[RawTile, str]] = {}
    with closing(TarWriter(buffer, encoder=False, user="tilefleet", group="tilefleet", mode=0o444, mtime=0)) as tar:
        for position in positions:
            tile = found.tiles[position]
            extension, data = _stored(source, found, position)
            tar.write({"__key__": tile.tile_id, extension: data, "cls": str(tile.label).encode()})
            images[f"{tile.tile_id}.{extension}"] = tile, hashlib.sha256(data).hexdigest()
    members = {member.name: member for member in scan_tar(buffer).members}
    rows = [
        {"tile_id": tile.tile_id, "split": name.split("/")[0], "shard": name, "label": tile.label}
        | {"offset": members[key].offset, "size": members[key].size, "sha256": digest, "source": tile.source}
        for key, (tile, digest) in images.items()
    ]
    data = buffer.getvalue()
    storage.write_bytes(storage.join(out, name), data)
    shard = Shard(name=name, tiles=len(rows), bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    return shard, pa.Table.from_pylist(rows, schema=TILES_SCHEMA)


def _stored(source: str, found: Survey, position: int) -> tuple[str, bytes]:
    """Ending and bytes of a tile as the shard keeps them: as they came, or resized and encoded again."""
    tile, facts, size = found.tiles[position], found.facts[position], found.size
    try:
        data = found.raw.read(tile)
    except TileError as error:
        raise TilefleetError(f"{source}: {tile.source} can no longer be read ({error}); pack again") from error
    if hashlib.sha256(data).hexdigest() != facts.sha256:
        raise TilefleetError(f"{source}: {tile.source} changed while it was packed; pack again")
    if size is None or (facts.height, facts.width) == (size, size):
        return facts.extension, data
    image = Image.fromarray(resize(decode_image(data), size).permute(1, 2, 0).numpy())
    buffer = io.BytesIO()
    if facts.extension == "jpg":
        image.save(buffer, "JPEG", quality=95)
        return "jpg", buffer.getvalue()
    image.save(buffer, "PNG")
    return "png", buffer.getvalue()


def _check_arguments(
    split: Sequence[int], tiles_per_shard: int, size: int | None, bands: Bands | None, workers: int | None
) -> None:
    if len(split) != 3 or min(split) < 0 or split[0] == 0:
        shown = ",".join(map(str, split))
        raise UsageError(f"--split {shown}: three shares of 0 or more are needed, and one for train, as 80,10,10")
    if tiles_per_shard < 1:
        raise UsageError(f"--tiles-per-shard {tiles_per_shard}: 1 is the least")
    if size is not None and not 1 <= size <= MAX_SIZE:
        raise UsageError(f"--size {size}: it must lie between 1 and {MAX_SIZE} pixels")
    if size is not None and bands is not None:
        raise UsageError("--size: tiles with --bands are kept as they are, as resized samples are others; leave it out")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: 1 is the least")


def _check_out(source: str, out: str) -> str:
    """``out`` as an absolute location, if a shard set may be written there."""
    origin, target = storage.absolute(source).rstrip("/"), storage.absolute(out).rstrip("/")
    if (target + "/").startswith(origin + "/"):
        raise UsageError(f"{out}: lies inside the source {source}; choose a folder outside it")
    if not storage.exists(target) or storage.exists(storage.join(target, MARKER)):
        return target
    if not storage.is_dir(target):
        raise UsageError(f"{out}: is a file; choose a new or empty folder")
    if storage.exists(storage.join(target, INDEX)):
        raise UsageError(f"{out}: already holds a shard set; choose another folder, or delete it first")
    if storage.is_uri(target) or any(Path(target).iterdir()):
        raise UsageError(f"{out}: holds something else; choose a new or empty folder")
    return target


def _check_usable(source: str, found: Survey, skip_damaged: bool) -> None:
    if found.damaged and not skip_damaged:
        named = first_few([f"{entry['source']} ({entry['reason']})" for entry in found.damaged])
        raise TilefleetError(
            f"{source}: {len(found.damaged)} of {len(found.raw.tiles)} images cannot be used: {named}; "
            "repair them, or leave them out with --skip-damaged"
        )
    lost = set(range(len(found.raw.classes))) - {tile.label for tile in found.tiles}
    if lost:
        names = ", ".join(found.raw.classes[label] for label in sorted(lost))
        raise TilefleetError(f"{source}: all images of {names} are damaged; repair them or delete the class folder")


@contextmanager
def _unfinished(out: str) -> Iterator[None]:
    """A clean folder for the time of the block, marked as unfinished; after an error nothing is left in it."""
    existed = storage.exists(out)
    if storage.exists(storage.join(out, MARKER)):
        storage.remove_tree(out)  # what a killed pack left
    storage.make_dirs(out)
    try:
        storage.write_bytes(storage.join(out, MARKER), b"a shard set is being made here\n")
        yield
        storage.remove(storage.join(out, MARKER))
    except BaseException:
        storage.remove_tree(out)
        if existed:
            storage.make_dirs(out)
        raise
