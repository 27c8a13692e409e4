"""Fixtures that every test may use."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.object_store import ObjectStore, object_store

ROOT = Path(__file__).parent.parent
REAL_DATA = ROOT.parent / "shared" / "data"

# A shell has what it starts in the background ignore Ctrl-C, and so would all that tests start and interrupt.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


def need(available: object, reason: str) -> None:
    """Skip a test whose machine lacks something; in CI that is a failure, as CI must lack nothing."""
    if not available:
        if os.environ.get("CI"):
            pytest.fail(f"CI must have this: {reason}")
        pytest.skip(reason)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray for all tests that need it; starting it takes many seconds."""
    from cluster.session import session

    with session(cpus=4):
        yield


@pytest.fixture(scope="session")
def s3() -> Iterator[ObjectStore]:
    """An S3 service on loopback that can be told to fail."""
    with object_store() as store:
        need(store, "moto's server is not installed")
        assert store
        yield store


@pytest.fixture
def bucket(s3: ObjectStore, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket of the test's own, that ``s3://`` reaches in this process."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    bucket = s3.make_bucket("test-" + format(abs(hash(request.node.nodeid)), "x"))
    s3.mend()
    return bucket


@pytest.fixture(scope="session")
def eurosat_zip() -> Path:
    """The real EuroSAT tiles, where they stand beside the project."""
    path = REAL_DATA / "EuroSAT_RGB.zip"
    if not path.exists():
        pytest.skip(f"real data set not found: {path}")
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``small_disk(kib)`` mounts a file system of that size and gives its folder; that needs root on Linux."""
    disks: list[Path] = []

    def mount(kib: int) -> Path:
        disk = tmp_path / f"disk-{len(disks)}"
        disk.mkdir()
        able = shutil.which("mount") and os.geteuid() == 0
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(disk)]
        need(able and subprocess.run(command, check=False).returncode == 0, "a small disk cannot be mounted here")
        disks.append(disk)
        return disk

    yield mount
    for disk in disks:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small shard set of synthetic tiles, 32 pixels wide; tests only read it."""
    from training.pack import pack
    from training.synthetic import write_tiles

    root = tmp_path_factory.mktemp("tiles")
    write_tiles(str(root / "raw"), 24, size=32)
    pack(str(root / "raw"), str(root / "shards"), split=(70, 15, 15), tiles_per_shard=40)
    return root / "shards"


@pytest.fixture(scope="session")
def bundle(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model as a bundle that fits ``shards``."""
    import torch

    from training import models
    from training.bundle import BundleInfo, save_bundle
    from training.shards import load_index

    index = load_index(shards)
    torch.manual_seed(0)
    model = models.build("cnn", len(index.classes), index.tile_size)
    info = BundleInfo(
        architecture="cnn", classes=index.classes, tile_size=index.tile_size, mean=index.mean, std=index.std
    )
    location = tmp_path_factory.mktemp("model") / "bundle"
    save_bundle(location, model, info)
    return location


@pytest.fixture
def calibrated(bundle: Path, shards: Path, tmp_path: Path) -> str:
    """A copy of ``bundle`` that is calibrated on ``shards``."""
    import torch

    from training.calibrate import calibrate

    copy = str(shutil.copytree(bundle, tmp_path / "calibrated"))
    calibrate(copy, str(shards), torch.device("cpu"))
    return copy


@pytest.fixture
def small_recipe(shards: Path, tmp_path: Path) -> dict[str, object]:
    """The keys of a recipe that trains in seconds."""
    return {
        "name": "small",
        "shards": str(shards),
        "runs": str(tmp_path / "runs"),
        "model": {"name": "cnn"},
        "augment": {"symmetries": True},
        "epochs": 2,
        "batch_size": 16,
        "checkpoint": {"every_steps": 3},
    }
