"""What a run says of itself: ``status.json`` and ``metrics.jsonl``.

Jobs write them, the exporter and the reports read them, so a run whose driver died still shows how far it came.
``status.json`` is replaced atomically about once a second (every ten on object storage); ``metrics.jsonl`` gains a
line an epoch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster import storage

STORE_INTERVAL = 10.0
"""Seconds between two writes of a status to object storage, where each costs a request."""

State = Literal["running", "done", "failed", "stopped"]

CONFIDENCE_BOUNDS = {f"{n / 10:g}": n / 10 for n in range(1, 11)}
"""Upper bounds, each inclusive, of the ranges in which confidences are counted; by the names of these counts."""


Count = Annotated[int, Field(ge=0, le=1 << 53)]
"""A number that a float holds to the last digit, as those who read a status may need it."""


class Status(BaseModel):
    """One moment of a run; times are Unix seconds.

    Stage times are seconds: of the first worker where it trains, summed over workers where it classifies. Fields that
    versions before this one did not write have a default.
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    kind: Literal["train", "classify"]
    state: State = "running"
    started: float
    updated: float
    progressed: float | None = None
    """When it last did something new, or was started."""
    error: str | None = None
    error_limit: float | None = None
    """Share of bad tiles at which it is stopped; None: never."""
    workers: Count = 0
    wanted_workers: Count = 0
    planned_tiles: Count = 0
    done_tiles: Count = 0
    failed_by_stage: dict[str, Count] = Field(default_factory=dict)
    seconds_by_stage: dict[str, float] = Field(default_factory=dict)
    tiles_by_class: dict[str, Count] = Field(default_factory=dict)
    unknown_tiles: Count = 0
    tiles_by_confidence: dict[str, Count] = Field(default_factory=dict)
    """By the names of :data:`CONFIDENCE_BOUNDS`."""
    confidence_sum: float = 0.0
    expected_confidence: float | None = None
    """Mean confidence in validation, as the bundle has it."""
    expected_unknown: float | None = None
    """Share of unknown tiles in validation."""
    epoch: Count | None = None
    epochs: Count | None = None
    step: Count | None = None
    loss: float | None = None
    accuracy: float | None = None


COUNTS = {
    "done_tiles",
    "failed_by_stage",
    "seconds_by_stage",
    "tiles_by_class",
    "unknown_tiles",
    "tiles_by_confidence",
    "confidence_sum",
}
"""Fields that only grow: what is done again, from a checkpoint on, is counted already."""


class StatusWriter:
    """Keeps ``status.json`` of one run current without writing more often than readers need.

    Where the run has a status of an earlier start, what that counted is kept, and so is where it stood.
    """

    def __init__(self, run: str | Path, kind: Literal["train", "classify"], **fields: Any) -> None:
        now = time.time()
        self.location = storage.join(run, "status.json")
        self.interval = STORE_INTERVAL if storage.is_uri(run) else 1.0
        kept = _earlier(run, kind)
        self.status = Status(kind=kind, started=now, updated=now, progressed=now, **kept)
        self._written = 0.0
        self.update(force=True, **fields, progressed=now)

    @property
    def is_due(self) -> bool:
        """Whether the last write is so old that the next update is written."""
        return time.time() - self._written >= self.interval

    def update(self, *, force: bool = False, **fields: Any) -> None:
        """Take over ``fields`` and write them when the last write is old enough, or at once by ``force``.

        Those of :data:`COUNTS` never fall. Without ``force`` a full disk is no error: work that waits for room need not
        end for want of its status.
        """
        now, before = time.time(), self.status.model_dump()
        grown = {name: _larger(before[name], fields[name]) for name in COUNTS & fields.keys()}
        moved = any((fields.get(name) or 0) > (before[name] or 0) for name in ("done_tiles", "step"))
        after = before | ({"progressed": now} if moved else {}) | fields | grown | {"updated": now}
        self.status = Status.model_validate(after)
        if force or self.is_due:
            try:
                storage.write_bytes(self.location, self.status.model_dump_json(indent=1).encode())
            except storage.DiskFullError:
                if force:
                    raise
            self._written = now

    def finish(self, state: State, error: str | None = None) -> None:
        """Write the last status of the run."""
        self.update(force=True, state=state, error=error)


def read_status(run: str | Path) -> Status | None:
    """The run's status, or None where it has none yet; raises as :func:`parse_status`."""
    location = storage.join(run, "status.json")
    return parse_status(storage.read_bytes(location)) if storage.exists(location) else None


def parse_status(data: bytes) -> Status:
    """The status in a ``status.json``, without what later versions may have added to it.

    Raises pydantic's ``ValidationError``, a ``ValueError``, where it is none.
    """
    return Status.model_validate_json(data, extra="ignore")


def _earlier(run: str | Path, kind: str) -> dict[str, Any]:
    """What a new start of ``run`` takes over from its status; nothing where that cannot be read."""
    try:
        status = read_status(run)
    except ValidationError:
        return {}
    if status is None or status.kind != kind:
        return {}
    return status.model_dump(include=COUNTS | {"planned_tiles", "epoch", "epochs", "step", "accuracy"})


def _larger(before: Any, after: Any) -> Any:
    """The larger of two numbers, or of two tables by key."""
    if isinstance(before, dict):
        return {key: max(before.get(key, 0), after.get(key, 0)) for key in before | after}
    return max(before, after)


def append_metrics(run: str | Path, row: dict[str, Any]) -> None:
    """Add one line to ``metrics.jsonl``; a line with the same epoch is replaced, as after a resume."""
    rows = [r for r in read_metrics(run) if r.get("epoch") != row.get("epoch")] + [row]
    data = "".join(json.dumps(r) + "\n" for r in rows)
    storage.write_bytes(storage.join(run, "metrics.jsonl"), data.encode())


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``, one an epoch; empty where there is none."""
    location = storage.join(run, "metrics.jsonl")
    if not storage.exists(location):
        return []
    return [json.loads(line) for line in storage.read_bytes(location).decode().splitlines()]


def best_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the best validation accuracy, the first where several are; None where nothing was validated."""
    judged = [row for row in rows if row.get("val_accuracy") is not None]
    return max(judged, key=lambda row: float(row["val_accuracy"])) if judged else None


def mark_failed(run: str | Path, error: str) -> None:
    """Set the state of a run whose own writer is gone."""
    status = read_status(run)
    if status is not None:
        failed = status.model_copy(update={"state": "failed", "error": error, "updated": time.time()})
        storage.write_bytes(storage.join(run, "status.json"), failed.model_dump_json(indent=1).encode())


def write_failure(run: str | Path, error: str) -> None:
    """Leave word, from any worker, of an error that no restart can mend."""
    storage.write_bytes(storage.join(run, "failure.json"), json.dumps({"error": error}).encode())


def read_failure(run: str | Path) -> str | None:
    """The error that a worker left, or None."""
    location = storage.join(run, "failure.json")
    return str(json.loads(storage.read_bytes(location))["error"]) if storage.exists(location) else None


def clear_failure(run: str | Path) -> None:
    """Forget the error of an earlier try."""
    storage.remove(storage.join(run, "failure.json"))
