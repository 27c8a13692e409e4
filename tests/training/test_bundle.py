"""Bundles: whole, or refused with a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from configs.errors import TilefleetError, UsageError
from training.bundle import load_bundle


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def test_a_bundle_gives_back_the_model(bundle: Path) -> None:
    model, info = load_bundle(bundle)
    again, _ = load_bundle(bundle)
    x = torch.rand(2, 3, info.tile_size, info.tile_size)
    assert not model.training
    assert torch.equal(model(x), again(x))
    assert model(x).shape == (2, len(info.classes))


def test_no_such_bundle_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such bundle"):
        load_bundle(tmp_path / "nothing")


@pytest.mark.parametrize("at", [0, 100, -1])
def test_changed_weights_are_refused(copy: Path, at: int) -> None:
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[at] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(TilefleetError, match=r"model\.safetensors: changed"):
        load_bundle(copy)


def test_missing_weights_are_named(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(TilefleetError, match="weights are missing"):
        load_bundle(copy)


def test_a_missing_info_is_named(copy: Path) -> None:
    (copy / "bundle.json").unlink()
    with pytest.raises(TilefleetError, match=r"bundle\.json is missing"):
        load_bundle(copy)


def test_changed_info_is_refused(copy: Path) -> None:
    info = json.loads((copy / "bundle.json").read_text())
    info["classes"] = info["classes"][::-1]
    (copy / "bundle.json").write_text(json.dumps(info))
    with pytest.raises(TilefleetError, match=r"bundle\.json: changed"):
        load_bundle(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}'])
def test_broken_info_is_refused(copy: Path, text: str) -> None:
    (copy / "bundle.json").write_text(text)
    with pytest.raises(TilefleetError, match="damaged or not a bundle"):
        load_bundle(copy)
