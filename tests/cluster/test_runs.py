"""Runs are found wherever they lie, cheaply, and what cannot be read of one disturbs no other."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from cluster import runs
from cluster.exporter import serving
from cluster.records import StatusWriter
from cluster.runs import RunFolder
from tests.object_store import ObjectStore
from tests.scrapes import CLASSIFIED, TRAINED, of, scrape, status, text


def test_what_cannot_be_read_is_counted_and_disturbs_no_other_run(tmp_path: Path) -> None:
    status(tmp_path / "good", "train", **TRAINED)
    valid = (tmp_path / "good" / "status.json").read_bytes()
    huge = json.dumps(json.loads(valid) | {"done_tiles": 10**400}).encode()
    bad = [b"", b"{", b"\xff\xfe", b"[" * 10_000, huge, valid + b" " * runs.LARGEST]
    for number, data in enumerate(bad):
        (tmp_path / f"bad-{number}").mkdir()
        (tmp_path / f"bad-{number}" / "status.json").write_bytes(data)
    (tmp_path / "folder" / "status.json").mkdir(parents=True)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "status.json")
    with serving([str(tmp_path)], port=0) as url:
        found = scrape(url)
        assert found["runs_unreadable", ()] == len(bad) + 2
        assert of(found, "good")["tiles_done_total"] == 100
        assert len([name for name, _ in found if name == "run_state"]) == 1
        (tmp_path / "bad-0" / "status.json").write_bytes(valid)
        assert scrape(url)["runs_unreadable", ()] == len(bad) + 1


def test_runs_are_found_three_folders_down_and_forgotten_when_they_are_gone(tmp_path: Path) -> None:
    for place in ("a", "b/c", "b/d/e", "b/d/f/too-deep", ".hidden/g", "a/checkpoints/inner"):
        status(tmp_path / place, "train")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with serving([str(tmp_path), str(tmp_path / "b"), f"{tmp_path}/b/c/"], port=0) as url:
        states = [labels[1] for name, labels in scrape(url) if name == "run_state"]
        assert sorted(states) == ["a", "c", "e", "too-deep"]  # that one is not too deep for the second folder
        shutil.rmtree(tmp_path / "b" / "d")
        assert sorted(labels[1] for name, labels in scrape(url) if name == "run_state") == ["a", "c"]


def test_a_folder_that_is_not_there_yet_is_told_and_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving([str(tmp_path / "later")], port=0) as url:
        assert "later: is not there" in capsys.readouterr().err
        assert scrape(url)["runs_unreadable", ()] == 0
        status(tmp_path / "later" / "run", "train")
        assert ("tiles_planned", ("train", "run")) in scrape(url)


def test_names_of_runs_are_told_apart_and_fit_into_a_label(tmp_path: Path) -> None:
    for place in ("a/same", "b/same", "x/a/same", 'odd"\n{name}', "né", "l" * 200):
        status(tmp_path / place, "train")
    status(Path(os.fsdecode(os.fsencode(tmp_path) + b"/broken-\xff")), "train")
    with serving([str(tmp_path)], port=0) as url:
        names = {labels[1] for name, labels in scrape(url) if name == "run_state"}
    assert len(names) == 7
    assert {"b/same", "odd___name_", "né", "l" * 80, "broken-_"} <= names
    assert {name.partition("#")[0] for name in names if name.startswith("a/same")} == {"a/same"}


def test_a_status_is_read_again_only_when_its_file_changed(tmp_path: Path) -> None:
    for name in ("one", "two"):
        status(tmp_path / name, "train", "done")
    folder = RunFolder(str(tmp_path))
    folder.look()
    before = {run.location: run for run in folder.runs}
    status(tmp_path / "two", "train", loss=0.5)
    folder.look()
    after = {run.location: run for run in folder.runs}
    assert [after[location] is run for location, run in sorted(before.items())] == [True, False]


def test_two_thousand_runs_are_scraped_in_less_than_a_second(tmp_path: Path) -> None:
    status(tmp_path / "done", "classify", "done", **CLASSIFIED)
    data = (tmp_path / "done" / "status.json").read_text()
    old = json.dumps(json.loads(data) | {"updated": time.time() - 90_000})
    for number in range(2000):
        folder = tmp_path / f"group-{number % 10}" / f"run-{number}"
        folder.mkdir(parents=True)
        (folder / "status.json").write_text(data if number < 50 else old)
    with serving([str(tmp_path)], port=0) as url:
        text(url)
        began = time.monotonic()
        scraped = text(url)
        assert time.monotonic() - began < 1
        assert scraped.count("\ntilefleet_run_state{") == 2001
        assert scraped.count("\ntilefleet_tiles_done_total{") == 51


@pytest.mark.process
def test_runs_on_object_storage_are_found_and_ended_ones_cost_few_requests(
    bucket: str, s3: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "ALL_EVERY", 4)
    going = StatusWriter(f"{bucket}/runs/going", "classify")
    for name in ("one", "deep/two"):
        StatusWriter(f"{bucket}/runs/{name}", "train").finish("done")
    folder = RunFolder(f"{bucket}/runs/")
    folder.look()
    assert sorted(run.location.rpartition("/")[2] for run in folder.runs) == ["going", "one", "two"]
    s3.mend()
    going.update(force=True, done_tiles=5)
    folder.look()
    assert {run.status.done_tiles for run in folder.runs if run.status} == {0, 5}
    assert len(folder.runs) == 3
    assert not any("runs/one" in request or "two" in request for request in s3.requests)
    StatusWriter(f"{bucket}/runs/one", "train")  # it is resumed
    for _ in range(3):
        folder.look()
    assert [run.status.state for run in folder.runs if run.status and run.location.endswith("one")] == ["running"]
    s3.fail("HEAD", "status.json", 1000)
    s3.fail("GET", "", 1000)
    folder.look()
    assert (folder.is_readable, len(folder.runs)) == (False, 3)
    s3.mend()
    folder.look()
    assert folder.is_readable
