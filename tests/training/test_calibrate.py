"""Temperature and unknown threshold."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.bundle import check_bundle, is_unknown, load_bundle
from training.calibrate import calibrate, fit_temperature, judge_split, unknown_threshold
from training.shards import TileReader


def drawn(temperature: float, tiles: int = 20_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and labels drawn from what they say at ``temperature``."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(tiles, 6, generator=generator)
    labels = torch.multinomial(torch.softmax(logits / temperature, dim=1), 1, generator=generator)[:, 0]
    return logits, labels


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5, 7.0])
def test_the_temperature_of_drawn_labels_is_found_again(temperature: float) -> None:
    assert fit_temperature(*drawn(temperature)) == pytest.approx(temperature, rel=0.05)


def test_the_fitted_temperature_has_the_least_cross_entropy() -> None:
    logits, labels = drawn(2.0)
    best = fit_temperature(logits, labels)

    def loss(temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits.double() / temperature, labels))

    assert loss(best) <= min(loss(best * 1.01), loss(best * 0.99))


def test_logits_that_are_never_wrong_do_not_break_it() -> None:
    logits = torch.eye(4).repeat(5, 1) * 10
    assert 0 < fit_temperature(logits, logits.argmax(1)) < 1


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=300), st.floats(0, 0.5))
def test_the_threshold_flags_no_more_than_asked_for(distances: list[float], share: float) -> None:
    values = torch.tensor(distances)
    threshold = unknown_threshold(values, share)
    assert (values > threshold).sum() <= share * len(values)


def test_calibrating_a_bundle_lowers_its_loss_and_keeps_its_weights(bundle: Path, shards: Path, tmp_path: Path) -> None:
    copy = str(shutil.copytree(bundle, tmp_path / "bundle"))
    info = calibrate(copy, str(shards), torch.device("cpu"))
    judge, saved = load_bundle(copy)
    assert saved == info == check_bundle(copy)
    assert (tmp_path / "bundle" / "model.safetensors").read_bytes() == (bundle / "model.safetensors").read_bytes()
    reader = TileReader(shards, "val")
    labels = torch.from_numpy(reader.labels).long()
    scaled, distances, _ = judge_split(judge, saved, reader, torch.device("cpu"))
    assert is_unknown(saved, distances).sum() <= 0.01 * len(reader)
    assert distances.min() > 0
    assert saved.metrics["val_confidence"] == pytest.approx(float(torch.softmax(scaled, 1).amax(1).mean()), abs=1e-4)
    assert saved.metrics["val_unknown"] == pytest.approx(float(is_unknown(saved, distances).double().mean()))
    plain = scaled * saved.temperature
    loss = torch.nn.functional.cross_entropy
    assert loss(scaled, labels) <= loss(plain, labels)
    again = calibrate(copy, str(shards), torch.device("cpu"))
    assert again == info
