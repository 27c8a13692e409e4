"""Bundles: whole, or refused with a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from configs.errors import TilefleetError, UsageError
from training.bundle import BundleInfo, check_bundle, load_bundle, save_calibration
from training.judge import Reference


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def test_a_bundle_gives_back_the_model(bundle: Path) -> None:
    model, info = load_bundle(bundle)
    again, _ = load_bundle(bundle)
    x = torch.rand(2, 3, info.tile_size, info.tile_size)
    assert not model.training
    assert torch.equal(model(x)[0], again(x)[0])
    assert model(x)[0].shape == (2, len(info.classes))


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
    with pytest.raises(TilefleetError, match=r"model\.safetensors should stand beside"):
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


def test_a_bundle_of_another_version_is_refused(copy: Path) -> None:
    info = BundleInfo.model_validate_json((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(info.model_copy(update={"version": 1}).sealed().model_dump_json())
    with pytest.raises(TilefleetError, match="a bundle of version 1, this is for version 3; train again"):
        load_bundle(copy)


def test_a_changed_or_missing_reference_is_refused(copy: Path) -> None:
    _, info = load_bundle(copy)
    save_calibration(copy, info, 1.0, Reference(torch.zeros(500), torch.eye(500), torch.zeros(3, 500)), 7.0)
    assert load_bundle(copy)[0].means is not None
    data = (copy / "unknown.safetensors").read_bytes()
    (copy / "unknown.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(TilefleetError, match=r"unknown\.safetensors: changed"):
        check_bundle(copy)
    (copy / "unknown.safetensors").unlink()
    with pytest.raises(TilefleetError, match=r"unknown\.safetensors should stand beside"):
        load_bundle(copy)
