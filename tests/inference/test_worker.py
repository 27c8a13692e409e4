"""A worker answers for a chunk with its summary or with an error that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import TilefleetError
from inference.plan import PLAN, open_plan
from inference.sink import Summary
from inference.worker import ChunkClassifier
from tests.archives import TERMS, planned, save_model, tile_files


@pytest.mark.parametrize("missing", ["bundle", "tiles", f"out/{PLAN}"])
def test_a_host_that_does_not_see_what_all_share_says_so_and_writes_no_row(tmp_path: Path, missing: str) -> None:
    model, out = save_model(tmp_path / "bundle"), tmp_path / "out"
    for name, data in tile_files(3):
        (tmp_path / "tiles" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tiles" / name).write_bytes(data)
    planned([str(tmp_path / "tiles") + "/"], out, terms=TERMS.model_copy(update={"engine": "torch"}))
    plan = open_plan(str(out))
    assert plan
    (tmp_path / missing).rename(tmp_path / "away")
    answer = ChunkClassifier(model, plan, 0.0).classify(0, False)
    assert isinstance(answer, TilefleetError)
    assert f"{missing}: the host " in str(answer).replace("/:", ":")
    assert "on a disk that all of them share" in str(answer)
    (tmp_path / "away").rename(tmp_path / missing)
    assert isinstance(ChunkClassifier(model, plan, 0.0).classify(0, False), Summary)
