"""Encoded tiles become classes, the same every time, and a bad tile is no one's trouble but its own."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import decode_jpeg

from configs.errors import UsageError
from inference.forward import ENGINES, missing
from inference.predictor import Decoded, Predictions, Predictor, _decode_on_gpu, on_gpu, on_threads
from training.augment import normalise
from training.bundle import BundleInfo, judge_pixels, load_bundle, read_info, save_bundle, save_calibration
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


def skip_without(engine: str) -> None:
    if reason := missing(engine, "cpu"):
        pytest.skip(reason)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("bundle"), temperature=0.05)


def test_predictions_are_those_of_the_model_on_the_shared_preprocessing(bundle: str) -> None:
    tiles = jpegs(9)
    judge, _ = load_bundle(bundle)
    with torch.inference_mode():
        plain = judge.head(judge.body(normalise(decode_tiles(tiles, 32)[0], MEAN, STD)))
    expected = torch.softmax(plain / 0.05, 1).numpy()
    result = Predictor(bundle, device="cpu").predict(tiles)
    np.testing.assert_allclose(result.probabilities, expected, atol=1e-6)
    assert (result.class_id == expected.argmax(1)).all()
    assert (result.confidence == result.probabilities.max(1)).all()
    assert result.errors == [None] * 9


def test_types_and_shapes_are_as_promised_for_any_number_of_tiles(bundle: str) -> None:
    predictor = Predictor(bundle, device="cpu", batch_size=4)
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
    predictor = Predictor(bundle, device="cpu", batch_size=3)
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
    first = Predictor(bundle, device="cpu", batch_size=8, threads=1).predict(tiles)
    second = Predictor(bundle, device="cpu", batch_size=8, threads=1).predict(tiles)
    assert first.probabilities.tobytes() == second.probabilities.tobytes()


def test_tiles_of_another_size_and_kind_are_classified(bundle: str) -> None:
    buffer = io.BytesIO()
    Image.new("L", (50, 40), 77).save(buffer, "PNG")
    assert Predictor(bundle, device="cpu").predict([buffer.getvalue(), *jpegs(1, size=64)]).errors == [None, None]


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
    assert (Predictor(copy, device="cpu").predict(tiles).is_unknown == (distances > threshold).numpy()).all()
    assert not Predictor(bundle, device="cpu").predict(tiles).is_unknown.any()


def joined(parts: Iterable[Predictions]) -> tuple[bytes, list[str | None]]:
    parts = list(parts)
    return np.concatenate([part.probabilities for part in parts]).tobytes(), [e for part in parts for e in part.errors]


@pytest.mark.parametrize("engine", ["torch", "openvino-bf16"])
def test_a_stream_gives_the_bits_of_one_call_with_and_without_a_thread_that_reads_ahead(
    bundle: str, engine: str
) -> None:
    skip_without(engine)
    tiles = [*jpegs(19), b"not an image", *jpegs(2)]
    predictor = Predictor(bundle, engine, batch_size=8, threads=1, device="cpu")
    whole = joined([predictor.predict(tiles)])
    for overlap in (False, True):
        parts = list(predictor.predict_stream(iter(tiles), overlap))
        assert [len(part.errors) for part in parts] == [8, 8, 6]
        assert all(part.seconds.keys() == {"read", "decode", "forward"} for part in parts)
        assert joined(parts) == whole
    threads = on_threads(predictor.info, 3)
    several = Predictor(bundle, engine, batch_size=8, threads=1, device="cpu", decode=threads, in_flight=4)
    assert joined(several.predict_stream(tiles)) == whole


@pytest.mark.parametrize("engine", ["torch", "openvino", "openvino-bf16"])
def test_a_tile_gives_the_same_bits_alone_and_in_any_batch(bundle: str, engine: str) -> None:
    skip_without(engine)
    tiles = jpegs(21)
    predictor = Predictor(bundle, engine, batch_size=8, threads=1, device="cpu")
    together = predictor.predict(tiles)
    for place in (0, 7, 8, 20):
        alone = predictor.predict([tiles[place]])
        assert alone.probabilities.tobytes() == together.probabilities[place].tobytes()


@pytest.mark.parametrize(("overlap", "in_flight"), [(False, 1), (True, 1), (True, 3)])
def test_a_stream_holds_few_batches_and_raises_the_readers_error_after_what_came_before(
    bundle: str, overlap: bool, in_flight: int
) -> None:
    encoded, drawn = jpegs(4), 0

    def source() -> Iterator[bytes]:
        nonlocal drawn
        for number in range(40):
            if number == 30:
                raise OSError("the archive went away")
            drawn += 1
            yield encoded[number % 4]

    parts = Predictor(bundle, batch_size=4, device="cpu", in_flight=in_flight).predict_stream(source(), overlap)
    for batch in range(7):
        assert len(next(parts).errors) == 4
        assert drawn <= 4 * (batch + 1 + (in_flight if overlap else 0))
    with pytest.raises(OSError, match="went away"):
        next(parts)


def test_batches_are_decoded_at_once_and_come_in_their_order_whichever_is_ready_first(bundle: str) -> None:
    tiles, together = jpegs(24), threading.Barrier(3, timeout=30)

    def decode(encoded: Sequence[bytes]) -> Decoded:
        number = tiles.index(encoded[0]) // 4
        if number < 3:
            together.wait()  # passes only where three batches are in flight
            time.sleep(0.1 * (3 - number))
        return decode_tiles(encoded, 32)

    predictor = Predictor(bundle, batch_size=4, threads=1, device="cpu", decode=decode, in_flight=3)
    alone = Predictor(bundle, batch_size=4, threads=1, device="cpu").predict(tiles)
    assert joined(predictor.predict_stream(tiles)) == joined([alone])


def test_a_stream_that_is_left_reads_no_further_than_the_next_batch(bundle: str) -> None:
    source = iter(jpegs(40))
    parts = Predictor(bundle, batch_size=4, device="cpu").predict_stream(source, overlap=True)
    next(parts)
    parts.close()  # type: ignore[attr-defined]
    assert len(list(source)) >= 32


@pytest.mark.parametrize("damaged", [False, True])
def test_what_the_gpu_cannot_decode_is_left_to_the_cpu(damaged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    good = jpegs(5)
    tiles = [good[0], b"", good[1], jpegs(1, size=64)[0], good[2][: len(good[2]) // 2], good[3]]
    given: list[int] = []

    def decode(buffers: list[torch.Tensor], mode: object, device: str) -> list[torch.Tensor]:
        given.append(len(buffers))
        if damaged:
            raise RuntimeError("one of them is damaged")
        return decode_jpeg(buffers, mode)

    monkeypatch.setattr("inference.predictor.decode_jpeg", decode)
    expected, causes = decode_tiles(tiles, 32)
    pixels, errors = _decode_on_gpu(tiles, 32, "cpu", lambda encoded: decode_tiles(encoded, 32))
    assert torch.equal(pixels, expected)
    assert errors == causes
    assert given == [3]


def test_what_cannot_be_used_is_named(tmp_path: Path, bundle: str) -> None:
    with pytest.raises(UsageError, match=r"engine abacus: there is none on cpu; there are .*torch"):
        Predictor(bundle, "abacus", device="cpu")
    with pytest.raises(UsageError, match="abacus"):
        Predictor(bundle, device="abacus")
    with pytest.raises(UsageError, match="nowhere: no such bundle"):
        Predictor(str(tmp_path / "nowhere"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("engine", "gpu_decode"), [(e, d) for e in ENGINES["cuda"] for d in (False, True)])
def test_a_gpu_agrees_with_the_cpu_and_repeats_its_bits(bundle: str, engine: str, gpu_decode: bool) -> None:
    tiles = jpegs(70)
    slow = Predictor(bundle, device="cpu").predict(tiles)
    decode = on_gpu(read_info(bundle)) if gpu_decode else None
    predictor = Predictor(bundle, engine, batch_size=32, device="cuda", decode=decode)
    fast = predictor.predict(tiles)
    assert np.abs(slow.probabilities - fast.probabilities).max() < (0.1 if engine != "torch" or gpu_decode else 1e-3)
    assert joined(predictor.predict_stream(tiles, overlap=True)) == joined([fast])


@pytest.mark.process
def test_it_runs_without_ray(bundle: str, tmp_path: Path) -> None:
    (tmp_path / "tile.jpg").write_bytes(jpegs(1)[0])
    program = (
        "import sys; sys.modules['ray'] = None\n"
        "from pathlib import Path\n"
        "from inference.predictor import Predictor\n"
        f"result = Predictor({bundle!r}, device='cpu').predict([Path({str(tmp_path / 'tile.jpg')!r}).read_bytes()])\n"
        "assert result.errors == [None]\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)
