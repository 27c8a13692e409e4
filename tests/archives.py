"""Archives and models that tests make, and what a plan and a run of them give back."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from configs.errors import TilefleetError
from inference.plan import BadArchive, Chunk, Terms, open_plan, write_plan
from inference.readers import Tile, read_chunk

CLASSES = ["Water", "Forest", "Crop"]
"""Of the models made here, which take tiles of 32 pixels."""

TERMS = Terms(
    bundle_digest="d",
    archives=("/a", "s3://b/c"),
    tiles_per_chunk=2,
    batch_size=8,
    probabilities=False,
    engine="torch-f32",
    threads=1,
)


class Planned(NamedTuple):
    """A plan that was written and read back whole."""

    chunks: list[Chunk]
    bad: list[BadArchive]
    tiles: int


def tar_bytes(files: Sequence[tuple[str, bytes]], tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_tar(path: Path, files: Sequence[tuple[str, bytes]], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    path.write_bytes(tar_bytes(files, tar_format))
    return path


@cache
def jpeg(number: int) -> bytes:
    """A tile of noise, another for each number."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def tile_files(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    """Names and bytes of so many different tiles."""
    return [(f"t/{number}.jpg", jpeg(number)) for number in range(first, first + count)]


def save_model(folder: Path, seed: int = 0) -> str:
    """The bundle of an untrained network."""
    import torch

    from training.bundle import BundleInfo, save_bundle
    from training.models import build

    torch.manual_seed(seed)
    info = BundleInfo(architecture="cnn", classes=CLASSES, tile_size=32, mean=[0.5] * 3, std=[0.25] * 3)
    save_bundle(folder, build("cnn", len(CLASSES), 32), info)
    return str(folder)


def parts(out: Path) -> dict[str, tuple[int, int]]:
    """Name of each part -> when it was written and its inode, which a rewrite would change."""
    found = {path.name: path.stat() for path in (out / "predictions").glob("part-*.parquet")}
    return {name: (stat.st_mtime_ns, stat.st_ino) for name, stat in found.items()}


def planned(archives: Sequence[object], out: Path, tiles_per_chunk: int = 1000, terms: Terms = TERMS) -> Planned:
    """The plan of ``archives``, kept in ``out``; an empty one where there is nothing to classify."""
    try:
        write_plan(str(out), [str(archive) for archive in archives], lambda sample: terms, tiles_per_chunk)
    except TilefleetError as error:
        if "nothing to classify" not in str(error):
            raise
        archive, _, reason = str(error).partition(": ")
        return Planned([], [BadArchive(archive, reason)], 0)
    plan = open_plan(str(out))
    assert plan
    return Planned(list(plan), plan.bad, plan.tiles)


def tiles_of(archives: Sequence[object], out: Path, tiles_per_chunk: int = 1000) -> list[Tile]:
    """All tiles of ``archives``, through the plan."""
    found = []
    for chunk in planned(archives, out, tiles_per_chunk).chunks:
        tiles = list(read_chunk(chunk))
        assert chunk.tiles in (None, len(tiles))
        found += tiles
    return found
