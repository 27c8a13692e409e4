"""The GPU decodes where it is the faster and nothing becomes another class. Here a CPU stands in for the GPU."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torchvision.io import decode_jpeg

from configs.errors import TilefleetError, UsageError
from inference import decoders, predictor
from inference.decoders import choose_decoder
from inference.plan import Chunk
from inference.scan import scan, sources
from inference.worker import choose_engine
from tests.archives import TERMS, save_model, tile_files, write_tar
from training.shards import TileReader


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "SECONDS", 0.05)


@pytest.fixture
def tiles(shards: Path) -> list[bytes]:
    reader = TileReader(str(shards), "train")
    return [*reader.read(range(len(reader))), b"not an image"]


def slow(monkeypatch: pytest.MonkeyPatch, victim: str) -> None:
    """Let one of the two ways take much longer than the other: ``on_threads`` or ``on_gpu``."""
    build = getattr(decoders, victim)

    def slower(*arguments: object) -> predictor.Decode:
        decode: predictor.Decode = build(*arguments)
        return lambda encoded: (time.sleep(0.05), decode(encoded))[1]

    monkeypatch.setattr(decoders, victim, slower)


@pytest.mark.parametrize(("victim", "taken"), [("on_threads", "gpu"), ("on_gpu", "cpu")])
def test_the_faster_is_taken(
    calibrated: str, tiles: list[bytes], victim: str, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, victim)
    choice, trials = choose_decoder(calibrated, tiles, "cpu", batch_size=64)
    assert choice == taken
    assert trials.keys() == {"cpu", "gpu"}
    assert {trial.reason for trial in trials.values()} == {"", f"slower than {taken}"}
    assert trials[taken].reason == ""
    agreed = trials["gpu"].agreement
    assert agreed
    assert (agreed.tiles, agreed.other_class) == (len(tiles) - 1, 0)


def test_another_class_than_for_the_cpus_pixels_is_refused(
    calibrated: str, tiles: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, "on_threads")

    def inverted(buffers: list[torch.Tensor], mode: object, device: str) -> list[torch.Tensor]:
        return [255 - image for image in decode_jpeg(buffers, mode)]

    monkeypatch.setattr(predictor, "decode_jpeg", inverted)
    choice, trials = choose_decoder(calibrated, tiles, "cpu", batch_size=64)
    assert choice == "cpu"
    assert trials["gpu"].reason.endswith(f"of {len(tiles) - 1} tiles another class")
    with pytest.raises(TilefleetError, match=r"decode=gpu: gives \d+ of \d+ tiles another class.*choose auto or cpu"):
        choose_decoder(calibrated, tiles, "cpu", "gpu")


def test_the_gpu_that_is_asked_for_is_checked_and_taken_though_it_is_slower(
    calibrated: str, tiles: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, "on_gpu")
    choice, trials = choose_decoder(calibrated, tiles, "cpu", "gpu")
    assert (choice, trials["gpu"].reason, trials["cpu"].reason) == ("gpu", "", "not asked for")
    assert trials["gpu"].agreement


def test_without_a_tile_to_check_with_the_cpu_decodes(calibrated: str) -> None:
    for sample in ([], [b"not an image"]):
        choice, trials = choose_decoder(calibrated, sample, "cpu")
        assert (choice, trials["gpu"].reason) == ("cpu", "there was no tile to check it with")
        with pytest.raises(TilefleetError, match="decode=gpu: no tile of the sample"):
            choose_decoder(calibrated, sample, "cpu", "gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_worker_without_a_gpu_decodes_by_itself_and_refuses_to_do_so_on_a_gpu(tmp_path: Path) -> None:
    model = save_model(tmp_path / "bundle")
    archive = write_tar(tmp_path / "a.tar", tile_files(20))
    found = scan(next(iter(sources([str(archive)]))), 20)
    chunks = [Chunk("00000000", str(archive), found.kind, *one[:3], found.bytes) for one in found.ranges]
    wanted = TERMS.model_copy(update={"engine": "torch"})
    for decode, settled in (("auto", "cpu"), ("cpu", "cpu"), ("pool", "pool")):
        terms = choose_engine(model, chunks, wanted.model_copy(update={"decode": decode}), False)
        assert not isinstance(terms, TilefleetError)
        assert (terms.decode, terms.decode_trials) == (settled, {})
    refused = choose_engine(model, chunks, wanted.model_copy(update={"decode": "gpu"}), False)
    assert isinstance(refused, UsageError)
    assert str(refused) == "decode=gpu: the workers have no GPU; choose auto, cpu or pool"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("decode", ["auto", "gpu"])
def test_a_gpu_is_measured_and_agrees(calibrated: str, tiles: list[bytes], decode: str) -> None:
    choice, trials = choose_decoder(calibrated, tiles, "cuda", decode)
    assert choice in ("cpu", "gpu")
    assert all(trial.tiles_per_second for trial in trials.values())
    agreed = trials["gpu"].agreement
    assert agreed
    assert agreed.accepted or choice == "cpu"
