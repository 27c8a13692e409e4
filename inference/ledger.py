"""The folder of a run: whether it is free, what is done in it, and what came out.

A part file is the proof that its chunk is done, so the ledger is the listing of parts; ``_SUCCESS.json`` comes last.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

from pydantic import BaseModel, ConfigDict

from cluster import storage
from cluster.claim import LOCK
from configs.errors import UsageError
from inference import sink
from inference.plan import BadArchive, PlanFile, Terms, open_plan
from inference.sink import Summary

SUCCESS = "_SUCCESS.json"

_READERS = 16  # footers read at once: hides the delay of object storage


class Totals(BaseModel):
    """``_SUCCESS.json``. Counts are over all parts; seconds and rate are those of the run that finished."""

    model_config = ConfigDict(extra="forbid")

    tiles: int
    classified: int
    errors: int
    unknown: int
    errors_by_stage: dict[str, int]
    tiles_by_class: dict[str, int]
    bad_archives: list[BadArchive]
    chunks: int
    seconds: float
    tiles_per_second: float
    engine: str


def take(out: str, wanted: Terms) -> PlanFile | None:
    """The plan in ``out``, or None where a new run may begin; raises where ``out`` is taken by something else."""
    if storage.exists(out) and not storage.is_dir(out):
        raise UsageError(f"{out}: is a file; name a folder for the predictions")
    saved = open_plan(out)
    if saved is None:
        if any(not _is_leftover(location) for location in storage.list_files(out, recursive=True)):
            raise UsageError(f"{out}: holds something else than a classify run; choose an empty folder")
        return None
    if differing := wanted.differences(saved.terms):
        raise UsageError(f"{out}: holds another run (other {', '.join(differing)}); choose another folder")
    return saved


def _is_leftover(location: str) -> bool:
    """Whether a run that was killed while it planned may have left this file."""
    name = PurePosixPath(location).name
    return name in ("status.json", LOCK) or (name.startswith(".") and name.endswith(".tmp"))


def finished(out: str) -> set[str]:
    """Ids of the chunks that have a part file; found by listing, nothing is opened."""
    chunks = (sink.chunk_of(location) for location in storage.list_files(storage.join(out, sink.PREDICTIONS)))
    return {chunk for chunk in chunks if chunk is not None}


def add_up(out: str, chunks: Iterable[str]) -> Summary:
    """What the footers of the chunks' parts say, together."""
    with ThreadPoolExecutor(_READERS) as pool:
        return sink.summed(pool.map(lambda chunk: sink.read_summary(sink.part_location(out, chunk)), chunks))


def read_totals(out: str) -> Totals | None:
    """What a finished run came to; None where it is not finished."""
    location = storage.join(out, SUCCESS)
    return Totals.model_validate_json(storage.read_bytes(location)) if storage.exists(location) else None


def write_totals(out: str, totals: Totals, patience: float) -> None:
    """Declare the run finished; a full disk is waited for, ``patience`` seconds at most."""
    storage.write_patiently(storage.join(out, SUCCESS), totals.model_dump_json(indent=1).encode(), patience)
