"""Archives that tests make, and the tiles that a plan of them gives back."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from configs.errors import TilefleetError
from inference.plan import BadArchive, Chunk, Terms, open_plan, write_plan
from inference.readers import Tile, read_chunk

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


def planned(archives: Sequence[object], out: Path, tiles_per_chunk: int = 1000) -> Planned:
    """The plan of ``archives``, kept in ``out``; an empty one where there is nothing to classify."""
    try:
        write_plan(str(out), [str(archive) for archive in archives], lambda sample: TERMS, tiles_per_chunk)
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
