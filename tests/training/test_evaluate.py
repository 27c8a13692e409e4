"""Scores against plain counting, the whole evaluation on a tiny shard set, and its pictures."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from configs.errors import TilefleetError, UsageError
from training import models, shards
from training.bundle import BundleInfo, save_bundle
from training.evaluate import calibration, count_confusion, evaluate, scores

CLASSES = ["Field", "Lake", "Town"]

outcomes = st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 2)), max_size=60)
"""True and predicted class of each tile; -1 stands for a tile that could not be decoded."""


@given(outcomes)
def test_scores_are_those_of_plain_counting(tiles: list[tuple[int, int]]) -> None:
    decoded = np.array([tile for tile in tiles if tile[1] >= 0], np.int64).reshape(-1, 2)
    undecodable = np.array([tiles.count((c, -1)) for c in range(3)], np.int64)

    result = scores(count_confusion(decoded[:, 0], decoded[:, 1], 3), CLASSES, undecodable)

    assert result["accuracy"] == pytest.approx(sum(t == p for t, p in tiles) / len(tiles) if tiles else 0)
    for number, name in enumerate(CLASSES):
        right = tiles.count((number, number))
        said = sum(predicted == number for _, predicted in tiles)
        true = sum(truth == number for truth, _ in tiles)
        row = result["per_class"][name]
        assert row["support"] == true
        assert row["precision"] == pytest.approx(right / said if said else 0)
        assert row["recall"] == pytest.approx(right / true if true else 0)
        assert row["f1"] == pytest.approx(2 * right / (said + true) if said + true else 0)
    for name in ("precision", "recall", "f1"):
        assert result[f"macro_{name}"] == pytest.approx(np.mean([r[name] for r in result["per_class"].values()]))


confidences = hnp.arrays(np.float32, st.integers(0, 80), elements=st.floats(0, 1, width=32))


@given(confidences, st.integers(0, 2**32 - 1))
def test_every_tile_is_in_one_reliability_bin(confidence: np.ndarray, seed: int) -> None:
    right = np.random.default_rng(seed).random(len(confidence)) < 0.5

    result = calibration(confidence, right)

    bins = [bin for bin in result["bins"] if bin["tiles"]]
    assert sum(bin["tiles"] for bin in bins) == len(confidence)
    assert sum(bin["tiles"] * bin["accuracy"] for bin in bins) == pytest.approx(right.sum())
    assert all(bin["low"] - 1e-6 <= bin["confidence"] <= bin["high"] + 1e-6 for bin in bins)
    assert 0 <= result["ece"] <= 1


def test_a_model_that_is_as_right_as_it_is_sure_has_no_calibration_error() -> None:
    confidence = np.full(10, 0.8, np.float32)

    assert calibration(confidence, np.arange(10) < 8)["ece"] == pytest.approx(0, abs=1e-6)
    assert calibration(confidence, np.arange(10) < 5)["ece"] == pytest.approx(0.3, abs=1e-6)


def test_evaluation_counts_an_undecodable_tile_as_wrong_and_names_it(tmp_path: Path) -> None:
    tiles = [(f"lake-{i}", 1, jpeg(i)) for i in range(6)] + [("field", 0, jpeg(9)), ("torn", 1, jpeg(7)[:200])]
    bundle, data = always_lake(tmp_path / "run"), shard_set(tmp_path / "shards", tiles)
    (tmp_path / "run" / "config.yaml").touch()
    calls: list[tuple[int, int]] = []

    result = evaluate(
        bundle, data, batch_size=3, device="cpu", progress=lambda done, total: calls.append((done, total))
    )

    assert (result["tiles"], result["undecodable"]) == (8, 1)
    assert [entry["tile_id"] for entry in result["errors"]] == ["torn"]
    assert result["accuracy"] == 6 / 8
    assert result["confusion"] == [[0, 1, 0], [0, 6, 0], [0, 0, 0]]
    assert result["per_class"]["Lake"] == pytest.approx(
        {"precision": 6 / 7, "recall": 6 / 7, "f1": 6 / 7, "support": 7}
    )
    assert calls == [(3, 8), (6, 8), (8, 8)]
    evaluation = tmp_path / "run" / "evaluation"
    assert json.loads((evaluation / "evaluation.json").read_text()) == result
    assert all(Image.open(evaluation / f"{plot}.png").width > 200 for plot in ("confusion", "calibration"))
    rows = pq.read_table(evaluation / "predictions.parquet").to_pylist()
    assert [row["class_id"] for row in rows] == [1] * 7 + [None]
    # logits 0, 2, 0 over a temperature of 2
    sure = float(torch.softmax(torch.tensor([0.0, 1.0, 0.0]), 0)[1])
    assert rows[0] == {"tile_id": "lake-0", "label": 1, "class_id": 1, "confidence": pytest.approx(sure)}
    assert result["loss"] == pytest.approx(-(6 * np.log(sure) + np.log((1 - sure) / 2)) / 7, rel=1e-5)


def test_the_batch_size_changes_no_result(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.build("cnn", 3, 16)
    info = BundleInfo(architecture="cnn", classes=CLASSES, tile_size=16, mean=[0.5] * 3, std=[0.2] * 3)
    save_bundle(tmp_path / "bundle", model, info)
    data = shard_set(tmp_path / "shards", [(f"t{i}", i % 3, jpeg(i)) for i in range(20)])

    one, other = (
        evaluate(str(tmp_path / "bundle"), data, out=str(tmp_path / f"out{size}"), device="cpu", batch_size=size)
        for size in (256, 7)
    )

    assert one["confusion"] == other["confusion"]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_a_bundle_for_other_classes_is_refused_with_the_first_difference(tmp_path: Path) -> None:
    data = shard_set(tmp_path / "shards", [("a", 0, jpeg(0))], classes=["Field", "Sea", "Town"])

    with pytest.raises(TilefleetError, match=r"other classes.*class 1 is Lake in the bundle and Sea in the shards"):
        evaluate(always_lake(tmp_path), data, out=str(tmp_path / "out"))


@pytest.mark.parametrize("split", ["val", "holdout"])
def test_an_empty_or_unknown_split_is_refused_and_the_others_are_named(tmp_path: Path, split: str) -> None:
    data = shard_set(tmp_path / "shards", [("a", 0, jpeg(0))])

    with pytest.raises(UsageError, match=rf"no tiles in split '{split}'; splits with tiles: test"):
        evaluate(always_lake(tmp_path), data, split=split, out=str(tmp_path / "out"))


def test_results_need_a_place_that_holds_nothing_else(tmp_path: Path) -> None:
    bundle, data = always_lake(tmp_path), shard_set(tmp_path / "shards", [("a", 0, jpeg(0))])
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()

    with pytest.raises(UsageError, match=r"not lie in a run folder; .*`-o DIR`"):
        evaluate(bundle, data)
    with pytest.raises(UsageError, match="thesis: holds something else"):
        evaluate(bundle, data, out=str(tmp_path / "thesis"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    data = shard_set(tmp_path / "shards", [("a", 0, jpeg(0))])

    with pytest.raises(UsageError, match="there is no GPU"):
        evaluate(always_lake(tmp_path), data, out=str(tmp_path / "out"), device="cuda")


def jpeg(seed: int, size: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def always_lake(folder: Path) -> str:
    """A bundle whose model gives every tile the logits 0, 2, 0, to be divided by a temperature of 2."""
    model = models.build("cnn", 3, 16)
    head = list(model.children())[-1]
    assert isinstance(head, torch.nn.Linear)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.0, 2.0, 0.0]))
    info = BundleInfo(architecture="cnn", classes=CLASSES, tile_size=16, mean=[0.5] * 3, std=[0.2] * 3, temperature=2.0)
    save_bundle(folder / "bundle", model, info)
    return str(folder / "bundle")


def shard_set(root: Path, tiles: list[tuple[str, int, bytes]], classes: list[str] = CLASSES) -> str:
    """A set of one test shard that may hold damaged images, which ``pack`` would refuse."""
    (root / "test").mkdir(parents=True)
    tar_path, rows = root / "test" / "shard-000000.tar", []
    with tarfile.open(tar_path, "w") as tar:
        for tile_id, label, data in tiles:
            member = tarfile.TarInfo(f"{tile_id}.jpg")
            member.size = len(data)
            place = {"split": "test", "shard": "test/shard-000000.tar", "offset": tar.offset + 512, "size": len(data)}
            digest = hashlib.sha256(data).hexdigest()
            rows.append({"tile_id": tile_id, "label": label, "sha256": digest, "source": tile_id, **place})
            tar.addfile(member, io.BytesIO(data))
    pq.write_table(pa.Table.from_pylist(rows, shards.TILES_SCHEMA), root / "tiles.parquet")
    tar_bytes = tar_path.read_bytes()
    shard = shards.Shard(
        name="test/shard-000000.tar",
        tiles=len(tiles),
        bytes=len(tar_bytes),
        sha256=hashlib.sha256(tar_bytes).hexdigest(),
    )
    index = shards.Index(
        classes=classes,
        tile_size=16,
        mean=[0.5] * 3,
        std=[0.2] * 3,
        splits={"train": [], "val": [], "test": [shard]},
        tiles_sha256=hashlib.sha256((root / "tiles.parquet").read_bytes()).hexdigest(),
        packed={},
    )
    shards.save_index(root, index)
    return str(root)
