"""Tiles that a pool of processes decodes are, to the bit, those that the worker decodes, whatever becomes of them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.records import read_status
from configs.errors import UsageError
from inference import classify as driver
from inference.classify import ClassifyConfig, classify
from inference.plan import open_plan
from inference.pool import DecoderPool, Size
from inference.predictor import Decoded
from inference.sink import read_predictions
from tests.archives import TERMS, jpeg, save_model, tile_files, write_tar
from tests.processes import descendants
from training.bundle import BundleInfo
from training.decode import decode_tiles

INFO = BundleInfo(architecture="cnn", classes=["a", "b"], tile_size=32, mean=[0.5] * 3, std=[0.5] * 3)
TILES = [jpeg(number) if number % 7 else b"no image" for number in range(100)]

pytestmark = pytest.mark.timeout(600)


def decoders() -> dict[int, str]:
    """Processes that decode for one of this test's processes."""
    return {pid: name for pid, name in descendants(os.getpid()).items() if name.startswith("ray::Decoder")}


def wait_for(happened: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


def all_up(pool: DecoderPool) -> bool:
    pool._look()
    return not pool._starting


def assert_decoded(found: Decoded) -> None:
    pixels, errors = decode_tiles(TILES, 32)
    assert torch.equal(found[0], pixels)
    assert found[1] == errors


@pytest.mark.ray
def test_decoders_give_the_bits_of_one_thread_and_are_replaced_when_they_die(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = decoders().keys()
    pool = DecoderPool(INFO, 2)
    here = pool._here
    by_itself: list[int] = []

    def counted(encoded: list[bytes]) -> Decoded:
        by_itself.append(len(encoded))
        return here(encoded)

    monkeypatch.setattr(pool, "_here", counted)
    assert_decoded(pool(TILES))  # none is up yet
    assert sum(by_itself) == len(TILES)
    wait_for(lambda: all_up(pool))
    by_itself.clear()
    assert_decoded(pool(TILES))
    assert not by_itself
    first = decoders().keys() - before
    assert len(first) == 2
    for pid in first:
        os.kill(pid, signal.SIGKILL)
    assert_decoded(pool(TILES))
    assert by_itself
    wait_for(lambda: (pool(TILES), all_up(pool) and len(pool._at_work) == 2)[1])
    by_itself.clear()
    assert_decoded(pool(TILES))
    assert not by_itself
    second = decoders().keys() - before
    assert len(second) == 2
    assert not first & second


@pytest.mark.ray
def test_a_run_decoded_by_a_pool_gives_the_rows_of_one_that_is_not(ray_session: None, tmp_path: Path) -> None:
    model = save_model(tmp_path / "bundle")
    files = [(f"t/{n}.jpg", jpeg(n % 100) if n % 97 else b"no image") for n in range(6000)]
    archive = write_tar(tmp_path / "a.tar", files)
    config = ClassifyConfig(tiles_per_chunk=50, batch_size=4, engine="torch", workers=1)
    classify(model, [str(archive)], str(tmp_path / "cpu"), config)
    out, at_work, before = tmp_path / "pool", set[int](), decoders().keys()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            found = decoders().items()
            at_work.update(pid for pid, name in found if name == "ray::Decoder.decode" and pid not in before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        classify(model, [str(archive)], str(out), config.model_copy(update={"decode": "pool"}))
    finally:
        done.set()
        watcher.join()
    assert len(at_work) == 3  # the CPUs that its one worker leaves
    wait_for(lambda: not decoders().keys() & at_work)
    saved = open_plan(str(out))
    assert saved
    assert saved.terms.decode == "pool"
    assert read_predictions(str(out)).equals(read_predictions(str(tmp_path / "cpu")))


@pytest.mark.ray
def test_a_pool_without_a_cpu_for_its_decoders_is_refused_before_there_is_a_plan(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, archive = save_model(tmp_path / "bundle"), write_tar(tmp_path / "a.tar", tile_files(60))
    out = str(tmp_path / "out")
    config = ClassifyConfig(tiles_per_chunk=10, engine="torch", decode="pool")
    with monkeypatch.context() as small:
        small.setattr(driver, "available_cpus", lambda: 1)
        with pytest.raises(UsageError, match=r"decode=pool: 2 CPUs are needed.*has 1; choose decode=cpu"):
            classify(model, [str(archive)], out, config)
    assert open_plan(out) is None
    with pytest.raises(UsageError, match=r"decode=pool: 6 CPUs are needed.*has 4; ask for workers=2"):
        classify(model, [str(archive)], out, config.model_copy(update={"workers": 3}))
    classify(model, [str(archive)], out, config)
    status = read_status(out)
    assert status
    assert status.workers == 2
    with pytest.raises(UsageError, match=r"another run \(other decode\)"):
        classify(model, [str(archive)], out, config.model_copy(update={"decode": "cpu"}))
    classify(model, [str(archive)], out, config.model_copy(update={"decode": "auto"}))


@pytest.mark.parametrize(
    ("cpus", "gpus", "decode", "workers", "chunks", "size"),
    [
        (4, 0, "cpu", None, 100, Size(4, 100)),
        (4, 0, "cpu", 2, 100, Size(2, 2)),
        (4, 0, "cpu", None, 3, Size(3, 3)),
        (16, 2, "gpu", None, 100, Size(2, 100)),
        (4, 0, "pool", None, 100, Size(2, 2, 1)),
        (4, 0, "pool", 1, 100, Size(1, 1, 3)),
        (16, 2, "pool", None, 100, Size(2, 100, 7)),
        (6, 8, "pool", None, 100, Size(3, 100, 1)),
        (16, 2, "pool", 1, 100, Size(1, 1, 15)),
    ],
)
def test_the_pool_is_as_large_as_the_cluster_and_grows_up_to_what_is_asked_for(
    cpus: int, gpus: int, decode: str, workers: int | None, chunks: int, size: Size, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "available_cpus", lambda: cpus)
    monkeypatch.setattr(driver, "available_gpus", lambda: gpus)
    terms = TERMS.model_copy(update={"decode": decode, "device": "cuda" if gpus else "cpu"})
    assert driver._size(terms, workers, chunks) == size


@pytest.mark.ray
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_gpu_cannot_decode_where_workers_have_none(ray_session: None, tmp_path: Path) -> None:
    model, archive = save_model(tmp_path / "bundle"), write_tar(tmp_path / "a.tar", tile_files(10))
    config = ClassifyConfig(engine="torch", decode="gpu")
    with pytest.raises(UsageError, match=r"decode=gpu: the workers have no GPU; choose auto, cpu or pool"):
        classify(model, [str(archive)], str(tmp_path / "out"), config)
    assert open_plan(str(tmp_path / "out")) is None
