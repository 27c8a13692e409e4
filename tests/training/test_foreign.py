"""AUROC against plain counting of pairs, and what an evaluation says of foreign images of every kind."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from configs.errors import TilefleetError, UsageError
from inference.predictor import Predictor
from training.bundle import BundleInfo, is_unknown, load_bundle
from training.calibrate import judge_split
from training.evaluate import evaluate
from training.foreign import auroc, foreign_distances
from training.images import list_images
from training.shards import TileReader

distances = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=30)


@given(distances, distances)
def test_auroc_is_the_share_of_pairs_in_order_and_ties_count_half(known: list[float], foreign: list[float]) -> None:
    counted = [1.0 if a < b else 0.5 if a == b else 0.0 for a in known for b in foreign]

    assert auroc(np.array(known, np.float32), np.array(foreign, np.float32)) == pytest.approx(np.mean(counted))


def test_what_is_too_far_or_no_number_is_unknown() -> None:
    info = BundleInfo(architecture="cnn", classes=["a", "b"], tile_size=8, mean=[], std=[], unknown_threshold=0.6)
    distances = torch.tensor([0.7, 0.5, 0.0, float("nan"), float("inf")])

    assert is_unknown(info, distances).tolist() == [True, False, False, True, True]
    assert not is_unknown(info.model_copy(update={"unknown_threshold": None}), distances).any()


def test_evaluation_judges_the_threshold_as_classification_applies_it(
    calibrated: str, shards: Path, strangers: Path, tmp_path: Path
) -> None:
    result = evaluate(
        calibrated, str(shards), split="val", out=str(tmp_path / "out"), foreign=str(strangers), device="cpu"
    )

    found = result["foreign"]
    assert (found["source"], found["images"], found["undecodable"]) == (str(strangers), 5, 1)
    assert found["threshold"] == load_bundle(calibrated)[1].unknown_threshold
    assert found["false_alarms"] <= 0.01  # the threshold was set on these very tiles
    predictor = Predictor(calibrated, device="cpu")
    encoded = [path.read_bytes() for path in sorted(strangers.rglob("*.*"))]
    predicted = predictor.predict(encoded)
    assert found["flagged"] == pytest.approx(predicted.is_unknown.sum() / 5)
    reader = TileReader(str(shards), "val")
    judge, info = load_bundle(calibrated)
    known = judge_split(judge, info, reader, torch.device("cpu"))[1].numpy()
    assert found["auroc"] == pytest.approx(auroc(known, foreign_distances(judge, info, list_images(str(strangers)))))
    assert Image.open(tmp_path / "out" / "unknown.png").width > 800


def test_the_plot_of_an_earlier_evaluation_does_not_stay(
    calibrated: str, shards: Path, strangers: Path, tmp_path: Path
) -> None:
    for foreign in (str(strangers), None):
        result = evaluate(calibrated, str(shards), out=str(tmp_path / "out"), foreign=foreign, device="cpu")

    assert "foreign" not in result
    assert not (tmp_path / "out" / "unknown.png").exists()


def test_shards_tars_and_folders_give_the_same_distances_in_batches_of_any_size(
    calibrated: str, shards: Path, tmp_path: Path
) -> None:
    model, info = load_bundle(calibrated)
    reader = TileReader(str(shards), "test")
    tiles = reader.read(range(len(reader)))
    (tmp_path / "folder").mkdir()
    with tarfile.open(tmp_path / "tiles.tar", "w") as tar:
        for number, data in enumerate(tiles):
            (tmp_path / "folder" / f"{number:03d}.jpg").write_bytes(data)
            tar.add(tmp_path / "folder" / f"{number:03d}.jpg", f"{number:03d}.jpg")
    calls: list[tuple[int, int]] = []

    whole = foreign_distances(model, info, list_images(str(shards), "test"))
    for place in ("folder", "tiles.tar"):
        images = list_images(str(tmp_path / place))
        parts = foreign_distances(model, info, images, 5, lambda done, total: calls.append((done, total)))
        assert parts == pytest.approx(whole, rel=1e-4)
    assert calls[0] == (5, len(tiles))
    assert calls[-1] == (len(tiles), len(tiles))


def test_foreign_images_of_no_use_are_said_so_before_or_after(
    bundle: Path, calibrated: str, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "a.jpg").write_bytes(image()[:100])

    def judge(name: str) -> None:
        out = str(tmp_path / "out")
        evaluate(calibrated, str(shards), out=out, foreign=str(tmp_path / name), device="cpu")

    with pytest.raises(UsageError, match="was not calibrated"):
        evaluate(str(bundle), str(shards), out=str(tmp_path / "out"), foreign=str(tmp_path), device="cpu")

    with pytest.raises(UsageError, match="missing: no such file or folder"):
        judge("missing")
    with pytest.raises(TilefleetError, match="empty: holds no images"):
        judge("empty")
    assert not (tmp_path / "out").exists()
    with pytest.raises(TilefleetError, match=r"a\.jpg: not one of 1 foreign images can be decoded"):
        judge("torn")


@pytest.fixture
def strangers(tmp_path: Path) -> Path:
    """Five images of no class and of several sizes and kinds, and one that is damaged."""
    (tmp_path / "strangers" / "cats").mkdir(parents=True)
    for number, (kind, size) in enumerate((("JPEG", (32, 32)), ("PNG", (50, 20)), ("JPEG", (200, 300))) * 2):
        path = tmp_path / "strangers" / "cats" / f"{number}.{kind.lower()}"
        path.write_bytes(image(kind, size, number)[: 60 if number == 5 else None])
    return tmp_path / "strangers"


def image(kind: str = "JPEG", size: tuple[int, int] = (32, 32), seed: int = 0) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()
