"""Encoded tiles become classes, the same every time, and a bad tile is no one's trouble but its own."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.errors import UsageError
from inference.predictor import Predictor
from training.augment import normalise
from training.bundle import BundleInfo, judge_pixels, load_bundle, save_bundle, save_calibration
from training.decode import decode_tiles
from training.judge import fit_reference
from training.models import build

ROOT = Path(__file__).parents[2]
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def save(folder: Path, **fields: float) -> str:
    torch.manual_seed(0)
    info = BundleInfo(architecture="cnn", classes=["a", "b", "c"], tile_size=32, mean=MEAN, std=STD, **fields)
    save_bundle(str(folder), build("cnn", 3, 32), info)
    return str(folder)


def jpegs(count: int, size: int = 32) -> list[bytes]:
    images = np.random.default_rng(count).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG")
        encoded.append(buffer.getvalue())
    return encoded


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("bundle"), temperature=0.05)


def test_predictions_are_those_of_the_model_on_the_shared_preprocessing(bundle: str) -> None:
    tiles = jpegs(9)
    judge, _ = load_bundle(bundle)
    with torch.inference_mode():
        plain = judge.head(judge.body(normalise(decode_tiles(tiles, 32)[0], MEAN, STD)))
    expected = torch.softmax(plain / 0.05, 1).numpy()
    result = Predictor(bundle, "cpu").predict(tiles)
    np.testing.assert_allclose(result.probabilities, expected, atol=1e-6)
    assert (result.class_id == expected.argmax(1)).all()
    assert (result.confidence == result.probabilities.max(1)).all()
    assert result.errors == [None] * 9


def test_types_and_shapes_are_as_promised_for_any_number_of_tiles(bundle: str) -> None:
    predictor = Predictor(bundle, "cpu", batch_size=4)
    for count in (0, 1, 4, 9):
        result = predictor.predict(jpegs(count))
        assert (result.class_id.dtype, result.class_id.shape) == (np.int32, (count,))
        assert (result.confidence.dtype, result.confidence.shape) == (np.float32, (count,))
        assert (result.probabilities.dtype, result.probabilities.shape) == (np.float32, (count, 3))
        assert (result.is_unknown.dtype, result.is_unknown.shape) == (np.bool_, (count,))
        assert len(result.errors) == count
        assert result.seconds.keys() == {"decode", "forward"}


def test_bad_tiles_get_an_error_and_leave_their_neighbours_as_they_are_alone(bundle: str) -> None:
    good = jpegs(5)
    tiles = [good[0], b"", good[1], b"not an image", good[2], good[3][: len(good[3]) // 2], good[4]]
    predictor = Predictor(bundle, "cpu", batch_size=3)
    result = predictor.predict(tiles)
    assert [error is not None for error in result.errors] == [False, True, False, True, False, True, False]
    assert result.class_id[[1, 3, 5]].tolist() == [-1, -1, -1]
    assert not result.confidence[[1, 3, 5]].any()
    assert not result.is_unknown[[1, 3, 5]].any()
    for place in (0, 2, 4, 6):
        alone = predictor.predict([tiles[place]])
        assert result.class_id[place] == alone.class_id[0]
        np.testing.assert_allclose(result.probabilities[place], alone.probabilities[0], atol=1e-6)


def test_the_same_tiles_give_the_same_bits(bundle: str) -> None:
    tiles = jpegs(20)
    first = Predictor(bundle, "cpu", batch_size=8, threads=1).predict(tiles)
    second = Predictor(bundle, "cpu", batch_size=8, threads=1).predict(tiles)
    assert first.probabilities.tobytes() == second.probabilities.tobytes()


def test_tiles_of_another_size_and_kind_are_classified(bundle: str) -> None:
    buffer = io.BytesIO()
    Image.new("L", (50, 40), 77).save(buffer, "PNG")
    assert Predictor(bundle, "cpu").predict([buffer.getvalue(), *jpegs(1, size=64)]).errors == [None, None]


def test_a_tile_farther_than_the_threshold_is_unknown(bundle: str, tmp_path: Path) -> None:
    judge, info = load_bundle(bundle)
    tiles = jpegs(40)
    pixels = decode_tiles(tiles, 32)[0]
    with torch.inference_mode():
        reference = fit_reference(judge.body(normalise(pixels[:30], MEAN, STD)), torch.arange(30) % 3)
        judge.refer_to(reference)
        distances = judge_pixels(judge, info, pixels, "cpu")[1]
    threshold = float(distances.sort().values[19:21].mean())
    copy = str(shutil.copytree(bundle, tmp_path / "bundle"))
    save_calibration(copy, info, 1.0, reference, threshold)
    assert (Predictor(copy, "cpu").predict(tiles).is_unknown == (distances > threshold).numpy()).all()
    assert not Predictor(bundle, "cpu").predict(tiles).is_unknown.any()


def test_what_cannot_be_used_is_named(tmp_path: Path, bundle: str) -> None:
    with pytest.raises(UsageError, match="abacus"):
        Predictor(bundle, "abacus")
    with pytest.raises(UsageError, match="nowhere: no such bundle"):
        Predictor(str(tmp_path / "nowhere"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_agrees_with_the_cpu_within_bfloat16(bundle: str) -> None:
    tiles = jpegs(64)
    slow, fast = Predictor(bundle, "cpu").predict(tiles), Predictor(bundle, "cuda").predict(tiles)
    assert np.abs(slow.probabilities - fast.probabilities).max() < 0.1


@pytest.mark.process
def test_it_runs_without_ray(bundle: str, tmp_path: Path) -> None:
    (tmp_path / "tile.jpg").write_bytes(jpegs(1)[0])
    program = (
        "import sys; sys.modules['ray'] = None\n"
        "from pathlib import Path\n"
        "from inference.predictor import Predictor\n"
        f"result = Predictor({bundle!r}, 'cpu').predict([Path({str(tmp_path / 'tile.jpg')!r}).read_bytes()])\n"
        "assert result.errors == [None]\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)
