"""What a classification says of itself: its ``status.json``, kept current while it plans, works and ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cluster import storage
from cluster.records import State, StatusWriter
from configs.errors import TilefleetError
from inference.plan import PlanFile, Progress
from inference.sink import Summary
from training.bundle import BundleInfo


class Account:
    """The status of the run in ``out``, by a bundle of which ``info`` is known."""

    def __init__(self, out: str, info: BundleInfo, max_error_share: float) -> None:
        self.status = StatusWriter(
            out,
            "classify",
            error_limit=max_error_share if max_error_share < 1 else None,
            expected_confidence=info.metrics.get("val_confidence"),
            expected_unknown=info.metrics.get("val_unknown"),
        )

    def of_planning(self, progress: Progress | None) -> Progress:
        """``progress``, by which the status also learns that planning goes on."""

        def note(stage: str, done: int, total: int) -> None:
            self.status.update(progressed=time.time())
            if progress:
                progress(stage, done, total)

        return note

    def of_tiles(
        self, total: Summary, plan: PlanFile, progress: Progress | None = None, workers: int | None = None
    ) -> None:
        """Tell what came of all tiles that are done, and how many ``workers`` there are where that was looked up."""
        planned = max(plan.tiles, total.tiles)  # those of compressed tars are only counted as they are read
        self.status.update(
            planned_tiles=planned,
            done_tiles=total.tiles,
            failed_by_stage=total.errors_by_stage,
            seconds_by_stage=total.seconds,
            tiles_by_class=total.tiles_by_class,
            unknown_tiles=total.unknown,
            tiles_by_confidence=total.tiles_by_confidence,
            confidence_sum=total.confidence_sum,
            workers=self.status.status.workers if workers is None else workers,
        )
        if progress:
            progress("classify", total.tiles, planned)

    @contextmanager
    def of_the_end(self) -> Iterator[None]:
        """Tell that the block failed, and why, or that an interrupt stopped it; a full disk must not hide that."""
        try:
            yield
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            state: State = "stopped" if stopped else "failed"
            reason = None if stopped else str(error) or type(error).__name__
            try:
                self.status.finish(state, reason)
            except TilefleetError:  # the disk is full: the room of the old status does for the new one
                storage.remove(self.status.location)
                with suppress(TilefleetError):
                    self.status.finish(state, reason)
            raise
