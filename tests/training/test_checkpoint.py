"""Checkpoints: the newest whole one counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs.errors import TilefleetError
from training import checkpoint


def save(run: Path, *steps: int, keep: int = 3) -> None:
    for step in steps:
        checkpoint.save(run, {"model": {"w": torch.full((3,), float(step))}, "step": step}, step=step, keep=keep)


def newest(run: Path, warnings: list[str]) -> int | None:
    location = checkpoint.newest_whole(run, warnings.append)
    return None if location is None else checkpoint.load(location)["step"]


def test_a_run_without_checkpoints_starts_anew(tmp_path: Path) -> None:
    assert newest(tmp_path, []) is None


def test_the_newest_is_taken_and_old_ones_dropped(tmp_path: Path) -> None:
    save(tmp_path, 9, 10, 100, 1000)
    assert newest(tmp_path, []) == 1000
    assert len(checkpoint.complete(tmp_path)) == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing"])
def test_a_damaged_one_is_named_and_the_one_before_taken(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1, 2)
    state = tmp_path / "checkpoints" / "step-00000002" / "state.pt"
    data = state.read_bytes()
    state.write_bytes({"flip": data[:50] + b"\0" + data[51:], "cut": data[:-1]}.get(damage, b""))
    if damage == "missing":
        state.unlink()
    warnings: list[str] = []
    assert newest(tmp_path, warnings) == 1
    assert "step-00000002" in warnings[0]


def test_one_without_its_manifest_was_never_finished(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "step-00000002" / "checkpoint.json").unlink()
    assert newest(tmp_path, []) == 1


def test_all_damaged_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-00000001" / "state.pt").write_bytes(b"")
    with pytest.raises(TilefleetError, match="every checkpoint is damaged"):
        newest(tmp_path, [])
