"""A status tells what a run has come to over all its starts, and is read whatever version wrote it."""

from __future__ import annotations

import json
import math
import time
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import ValidationError

from cluster.records import StatusWriter, mark_failed, parse_status, read_status

OLD = {
    "kind": "classify",
    "state": "done",
    "started": 1.0,
    "updated": 2.0,
    "error": None,
    "workers": 2,
    "planned_tiles": 30,
    "done_tiles": 30,
    "failed_by_stage": {"read": 1},
    "seconds_by_stage": {"read": 0.5},
    "tiles_by_class": {"Crop": 29},
    "epoch": None,
    "loss": None,
}


def test_a_status_of_an_older_version_has_defaults_for_what_it_lacks() -> None:
    status = parse_status(json.dumps(OLD).encode())
    assert (status.done_tiles, status.tiles_by_class) == (30, {"Crop": 29})
    assert (status.progressed, status.error_limit, status.wanted_workers) == (None, None, 0)
    assert (status.unknown_tiles, status.tiles_by_confidence, status.expected_unknown) == (0, {}, None)


def test_of_a_later_version_what_is_not_known_here_is_left_out() -> None:
    status = parse_status(json.dumps(OLD | {"mood": "good"}).encode())
    assert "mood" not in status.model_dump()


@pytest.mark.parametrize(
    "change", [{"state": "asleep"}, {"kind": "dance"}, {"done_tiles": -1}, {"workers": 10**400}, {"started": "soon"}]
)
def test_what_is_no_status_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        parse_status(json.dumps(OLD | change).encode())


def test_a_writer_knows_its_fields(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="moood"):
        StatusWriter(tmp_path, "train").update(moood="good")


def test_what_was_counted_never_falls_neither_in_a_run_nor_when_it_is_started_again(tmp_path: Path) -> None:
    first = StatusWriter(tmp_path, "train", planned_tiles=100)
    first.update(force=True, done_tiles=60, step=6, seconds_by_stage={"wait": 2.0, "train": 8.0}, loss=0.5)
    first.finish("failed", "lost a host")
    again = StatusWriter(tmp_path, "train", planned_tiles=100, done_tiles=40)  # from its checkpoint
    status = read_status(tmp_path)
    assert status
    assert (status.state, status.error, status.loss) == ("running", None, None)
    assert (status.done_tiles, status.step) == (60, 6)
    assert status.seconds_by_stage == {"wait": 2.0, "train": 8.0}
    again.update(force=True, done_tiles=50, step=5, seconds_by_stage={"wait": 1.0, "train": 9.0, "validate": 1.0})
    status = read_status(tmp_path)
    assert status
    assert (status.done_tiles, status.step) == (60, 5)
    assert status.seconds_by_stage == {"wait": 2.0, "train": 9.0, "validate": 1.0}
    again.update(force=True, done_tiles=70)
    assert again.status.done_tiles == 70


def test_a_folder_that_was_emptied_begins_at_zero(tmp_path: Path) -> None:
    StatusWriter(tmp_path, "classify").update(force=True, done_tiles=9, tiles_by_class={"Crop": 9})
    (tmp_path / "status.json").unlink()
    assert StatusWriter(tmp_path, "classify").status.tiles_by_class == {}


@pytest.mark.parametrize("text", ["", "{", '{"kind": "train"}', json.dumps(OLD)])
def test_a_status_that_is_broken_or_of_other_work_is_not_in_the_way(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    assert StatusWriter(tmp_path, "train").status.done_tiles == 0
    status = read_status(tmp_path)
    assert status
    assert (status.kind, status.state) == ("train", "running")


def test_an_update_is_written_once_it_is_due(tmp_path: Path) -> None:
    writer = StatusWriter(tmp_path, "train")
    assert not writer.is_due
    writer.update(step=1)
    assert (written(tmp_path), writer.status.step) == (None, 1)
    writer.interval = 0.0
    assert writer.is_due
    writer.update(step=2)
    assert written(tmp_path) == 2


def written(run: Path) -> int | None:
    status = read_status(run)
    assert status
    return status.step


def test_progress_is_more_tiles_or_more_steps_and_a_start(tmp_path: Path) -> None:
    writer = StatusWriter(tmp_path, "train", done_tiles=5)
    moments = [writer.status.progressed]
    for fields in ({"workers": 1}, {"done_tiles": 5}, {"done_tiles": 6}, {"step": 1}, {"step": 1, "loss": 0.1}):
        time.sleep(0.002)
        writer.update(**fields)
        moments.append(writer.status.progressed)
    moved = [after != before for before, after in pairwise(moments)]
    assert moved == [False, False, True, True, False]
    assert moments[0] == writer.status.started


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stays_one_through_the_file(tmp_path: Path, loss: float) -> None:
    StatusWriter(tmp_path, "train").update(force=True, loss=loss)
    mark_failed(tmp_path, "loss is not finite")
    status = read_status(tmp_path)
    assert status
    assert status.loss == pytest.approx(loss, nan_ok=True)
    json.loads((tmp_path / "status.json").read_text(), parse_constant=pytest.fail)  # plain JSON for other tools


def test_a_stopped_run_is_told_from_a_failed_one(tmp_path: Path) -> None:
    StatusWriter(tmp_path, "classify").finish("stopped")
    status = read_status(tmp_path)
    assert status
    assert (status.state, status.error) == ("stopped", None)
