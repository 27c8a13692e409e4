"""Damaged and hostile archives: a few of what ``tests/benchmarks/fuzz_archives.py`` tries by the thousand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.fuzz_archives import run, through_classify


@pytest.mark.process
def test_no_archive_crashes_hangs_or_hides_a_tile(tmp_path: Path) -> None:
    found = run(300, seed=1, folder=tmp_path)
    assert not found["wrong"]
    assert found["cases"] == 300
    assert min(found[what] for what in ("rows", "errors", "named")) > 50


@pytest.mark.ray
def test_classify_gives_each_tile_of_hostile_archives_one_row(ray_session: None, tmp_path: Path) -> None:
    found = through_classify(60, seed=2, folder=tmp_path)
    assert (found["different"], found["missing"], found["outside"]) == (0, 0, 0)
    assert found["rows"] > 100
    assert found["bad_archives"] > 5
