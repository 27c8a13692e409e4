"""An engine is as good as plain PyTorch or it is not used, and the choice says why."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from configs.errors import TilefleetError, UsageError
from inference import engines, forward
from inference.engines import Choice, agreement, choose, compare
from inference.forward import ENGINES, Engine, missing
from training.bundle import BundleInfo, judge_pixels, load_bundle
from training.decode import decode_tiles
from training.shards import TileReader

HERE = [name for name in ENGINES["cpu"] if not missing(name, "cpu")]
INFO = BundleInfo(architecture="cnn", classes=["a", "b", "c"], tile_size=8, mean=[], std=[], unknown_threshold=1.0)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "SECONDS", 0.05)
    monkeypatch.setattr(engines, "REFERENCE_SECONDS", 5.0)


@pytest.fixture
def tiles(shards: Path) -> list[bytes]:
    reader = TileReader(str(shards), "train")
    return list(reader.read(range(len(reader))))


def broken(change: Callable[[Tensor], Tensor]) -> Callable[..., forward.Features]:
    """In the place of OpenVINO: PyTorch's features, changed."""

    def build(body: nn.Module, piece: Tensor, bf16: bool, threads: int) -> forward.Features:
        return lambda pixels: change(body(pixels))

    return build


@pytest.mark.parametrize("name", HERE)
def test_an_engine_gives_what_the_bundle_gives(calibrated: str, tiles: list[bytes], name: str) -> None:
    judge, info = load_bundle(calibrated)
    pixels = decode_tiles(tiles, info.tile_size)[0]
    logits, distances = judge_pixels(judge, info, pixels, "cpu")
    found = Engine(name, judge, info, batch_size=len(tiles), threads=1)(pixels)
    assert (found[0].dtype, found[1].dtype) == (torch.float32, torch.float32)
    loose = 0.05 if name.endswith("-bf16") else 1e-4
    torch.testing.assert_close(found[0], logits, atol=loose * float(logits.abs().max()), rtol=0)
    torch.testing.assert_close(found[1], distances, atol=loose * float(distances.max()), rtol=0)


@pytest.mark.parametrize("name", HERE)
def test_a_tile_does_not_depend_on_what_comes_with_it(calibrated: str, tiles: list[bytes], name: str) -> None:
    judge, info = load_bundle(calibrated)
    pixels = decode_tiles(tiles, info.tile_size)[0][:20]
    engine = Engine(name, judge, info, batch_size=20, threads=1)
    together = engine(pixels)
    for count in (1, 7):
        assert all(
            torch.equal(part, whole[:count]) for part, whole in zip(engine(pixels[:count]), together, strict=True)
        )


def test_pieces_are_small_on_a_cpu_whatever_the_size_of_a_tile() -> None:
    for size, rows in ((32, 128), (64, 32), (224, 4), (512, 4)):
        info = INFO.model_copy(update={"tile_size": size, "mean": [0.5] * 3, "std": [0.5] * 3})
        judge = nn.ModuleDict({"body": nn.Flatten(), "head": nn.Linear(3 * size**2, 2)})
        assert Engine("torch", judge, info).rows == rows


def test_the_choice_is_the_fastest_that_agrees_and_says_why_the_others_are_not_taken(
    calibrated: str, tiles: list[bytes]
) -> None:
    choice = choose(calibrated, [b"not an image", *tiles], "cpu", 1)
    assert Choice.model_validate_json(choice.model_dump_json()) == choice
    assert (choice.device, choice.trials.keys()) == ("cpu", set(ENGINES["cpu"]))
    assert [name for name, trial in choice.trials.items() if not trial.reason] == [choice.engine]
    best = choice.trials[choice.engine].tiles_per_second
    assert best
    for name, trial in choice.trials.items():
        if "slower" in trial.reason:
            assert trial.tiles_per_second
            assert trial.tiles_per_second <= best
        assert trial.agreement or name == "torch" or name not in HERE


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda features: -features, "differs from torch in"),
        (lambda features: features * float("nan"), "gives numbers that are not finite"),
    ],
)
def test_an_engine_that_does_not_agree_is_refused(
    calibrated: str,
    tiles: list[bytes],
    change: Callable[[Tensor], Tensor],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forward, "_openvino", broken(change))
    monkeypatch.setattr(forward, "missing", lambda name, device: None)
    monkeypatch.setattr(engines, "missing", lambda name, device: None)
    choice = choose(calibrated, tiles, "cpu", 1)
    assert choice.engine.startswith("torch")
    assert choice.trials["openvino"].reason.startswith(reason)
    with pytest.raises(TilefleetError, match=f"engine openvino: {reason}.*choose auto or torch"):
        choose(calibrated, tiles, "cpu", 1, engine="openvino")


def test_a_named_engine_is_checked_alone(calibrated: str, tiles: list[bytes]) -> None:
    choice = choose(calibrated, tiles, "cpu", 1, engine=HERE[-2])
    assert choice.engine == HERE[-2]
    assert choice.trials.keys() == {HERE[-2], "torch"}
    assert choice.trials["torch"].reason == "not asked for"
    assert choose(calibrated, tiles, "cpu", 1, engine="torch").engine == "torch"


def test_without_openvino_the_choice_goes_on_and_says_so(
    calibrated: str, tiles: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "find_spec", lambda name: None)
    choice = choose(calibrated, tiles, "cpu", 1)
    assert choice.engine.startswith("torch")
    assert choice.trials["openvino"].reason == "OpenVINO is not installed (pip install openvino)"
    with pytest.raises(UsageError, match=r"engine openvino: OpenVINO is not installed.*there are torch-bf16, torch$"):
        choose(calibrated, tiles, "cpu", 1, engine="openvino")


def test_without_a_tile_to_check_with_only_the_reference_is_used(calibrated: str) -> None:
    choice = choose(calibrated, [b"not an image"], "cpu", 1)
    assert choice.engine == "torch"
    assert choice.trials["torch-bf16"].reason == "there was no tile to check it with"
    assert choose(calibrated, [], "cpu", 1).engine == "torch"
    with pytest.raises(TilefleetError, match="engine torch-bf16: no tile"):
        choose(calibrated, [b""], "cpu", 1, engine="torch-bf16")
    with pytest.raises(TilefleetError, match="engine torch-bf16: there is no tile"):
        agreement(calibrated, "torch-bf16", [b""], [0], "cpu", 1)


def test_agreement_counts_tiles_that_can_be_decoded_and_both_accuracies(calibrated: str, shards: Path) -> None:
    reader = TileReader(str(shards), "val")
    tiles = [*reader.read(range(len(reader))), b"not an image"]
    labels = [*reader.labels.tolist(), 0]
    judge, info = load_bundle(calibrated)
    logits = judge_pixels(judge, info, decode_tiles(tiles[:-1], info.tile_size)[0], "cpu")[0]
    right = (logits.argmax(1).numpy() == reader.labels).mean()
    found = agreement(calibrated, "torch", iter(tiles), labels, "cpu", 1)
    assert (found.tiles, found.other_class, found.other_unknown) == (len(reader), 0, 0)
    assert found.largest_difference == 0
    assert found.accuracy == found.reference_accuracy == pytest.approx(right)
    assert agreement(calibrated, "torch-bf16", tiles, device="cpu", threads=1).accuracy is None


@given(tiles=st.integers(1, 3000), other=st.integers(0, 5), decided=st.booleans())
def test_one_tile_in_a_thousand_may_differ_and_one_undecided_tile_of_fewer(
    tiles: int, other: int, decided: bool
) -> None:
    expected = torch.tensor([[2.0, 1.95 if not decided else 0.0, -9.0]]).repeat(tiles, 1)
    found = expected.clone()
    found[:other, 1] = 3.0
    distances = torch.zeros(tiles)
    agreed = compare(INFO, (expected, distances), (found, distances))
    other = min(other, tiles)
    assert (agreed.tiles, agreed.other_class) == (tiles, other)
    assert agreed.accepted == (other <= tiles // 1000 or (tiles < 1000 and other == 1 and not decided))


def test_comparison_covers_what_both_judged_and_counts_unknown_tiles() -> None:
    expected = (torch.tensor([[1.0, 0.0, 0.0]] * 3), torch.tensor([0.5, 1.5, 0.5]))
    found = (expected[0][:2], torch.tensor([1.5, 1.5]))
    agreed = compare(INFO, expected, found, torch.tensor([0, 1]))
    assert (agreed.tiles, agreed.other_unknown, agreed.accuracy, agreed.reference_accuracy) == (2, 1, 0.5, 0.5)
    endless = compare(INFO, expected, (found[0], torch.tensor([float("inf"), 0.0])))
    assert not endless.finite
    assert not endless.accepted


@pytest.mark.skipif("openvino" not in HERE, reason="OpenVINO is not installed")
def test_openvino_does_not_report_home(calibrated: str) -> None:
    Engine("openvino", *load_bundle(calibrated), threads=1)
    assert sys.modules["openvino_telemetry"] is None
