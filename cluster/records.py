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
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster import storage

STORE_INTERVAL = 10.0
"""Seconds between two writes of a status to object storage, where each costs a request."""

State = Literal["running", "done", "failed"]


class Status(BaseModel):
    """One moment of a run; times are Unix seconds, stage times are seconds summed over workers."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["train", "classify"]
    state: State = "running"
    started: float
    updated: float
    error: str | None = None
    workers: int = 0
    planned_tiles: int = 0
    done_tiles: int = 0
    failed_by_stage: dict[str, int] = Field(default_factory=dict)
    seconds_by_stage: dict[str, float] = Field(default_factory=dict)
    tiles_by_class: dict[str, int] = Field(default_factory=dict)
    epoch: int | None = None
    epochs: int | None = None
    step: int | None = None
    loss: float | None = None
    accuracy: float | None = None


class StatusWriter:
    """Keeps ``status.json`` of one run current without writing more often than readers need."""

    def __init__(self, run: str | Path, kind: Literal["train", "classify"], **fields: Any) -> None:
        now = time.time()
        self.location = storage.join(run, "status.json")
        self.interval = STORE_INTERVAL if storage.is_uri(run) else 1.0
        self.status = Status(kind=kind, started=now, updated=now, **fields)
        self._written = 0.0
        self.update(force=True)

    def update(self, *, force: bool = False, **fields: Any) -> None:
        """Take over ``fields`` and write them when the last write is old enough, or at once by ``force``.

        Without ``force`` a full disk is no error: work that waits for room need not end for want of its status.
        """
        now = time.time()
        self.status = Status.model_validate(self.status.model_dump() | fields | {"updated": now})
        if force or now - self._written >= self.interval:
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
    """The run's status, or None where it has none yet."""
    location = storage.join(run, "status.json")
    if not storage.exists(location):
        return None
    return Status.model_validate_json(storage.read_bytes(location))


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
