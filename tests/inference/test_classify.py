"""Archives become predictions, each tile exactly once, whatever is killed, full or damaged on the way."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from cluster.records import read_status
from configs.errors import TilefleetError, UsageError
from inference.classify import SUCCESS, ClassifyConfig, Totals, classify
from inference.sink import read_predictions
from training.bundle import BundleInfo, save_bundle
from training.models import build

ROOT = Path(__file__).parents[2]
CLASSES = ["Water", "Forest", "Crop"]
CHUNKS = 34
SMALL = ClassifyConfig(tiles_per_chunk=10, workers=1)
Run = tuple[Path, Totals, list[tuple[str, int, int]]]
DRIVER = """
import sys
from inference.classify import ClassifyConfig, classify
bundle, archives, out = sys.argv[1:]
classify(bundle, [archives], out, ClassifyConfig(tiles_per_chunk=10, workers=1))
"""


def save(folder: Path, seed: int = 0) -> str:
    torch.manual_seed(seed)
    info = BundleInfo(architecture="cnn", classes=CLASSES, tile_size=32, mean=[0.5] * 3, std=[0.25] * 3)
    save_bundle(folder, build("cnn", 3, 32), info)
    return str(folder)


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, files: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_tiles(path: Path, count: int, first: int = 0) -> Path:
    return write_tar(path, [(f"t/{number}.jpg", jpeg(number)) for number in range(first, first + count)])


def parts(out: Path) -> dict[str, tuple[int, int]]:
    """Name of each part -> when it was written and its inode, which a rewrite would change."""
    found = {path.name: path.stat() for path in (out / "predictions").glob("part-*.parquet")}
    return {name: (stat.st_mtime_ns, stat.st_ino) for name, stat in found.items()}


def state(out: Path) -> str:
    status = read_status(out)
    assert status is not None
    return status.state


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("model") / "bundle")


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars: a whole one, one with tiles that cannot be used, one that is cut inside its last tile."""
    folder = tmp_path_factory.mktemp("archives")
    write_tiles(folder / "a.tar", 300)
    bad = [("bad/empty.jpg", b""), ("bad/text.jpg", b"no image"), ("../bad/up.jpg", jpeg(1))]
    good = [(f"t/{number}.jpg", jpeg(number)) for number in range(300, 317)]
    write_tar(folder / "b.tar", [*good[:8], *bad, *good[8:]])
    cut = write_tiles(folder / "c.tar", 15, first=320)
    with tarfile.open(cut) as tar:
        last = tar.getmembers()[-1]
    os.truncate(cut, last.offset_data + 100)
    return folder


@pytest.fixture(scope="module")
def run(ray_session: None, model: str, archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One uninterrupted run over the three archives with two workers: its folder, totals and progress."""
    out = tmp_path_factory.mktemp("run") / "out"
    seen: list[tuple[str, int, int]] = []
    totals = classify(
        model,
        [str(archives)],
        str(out),
        ClassifyConfig(tiles_per_chunk=10, workers=2),
        lambda *step: seen.append(step),
    )
    return out, totals, seen


@pytest.mark.ray
def test_every_tile_is_one_row(run: Run, archives: Path) -> None:
    out, totals, seen = run
    rows = read_predictions(str(out)).to_pylist()
    assert [row["tile_id"] for row in rows if row["archive"].endswith("a.tar")] == [f"t/{n}" for n in range(300)]
    assert len({(row["archive"], row["tile_id"]) for row in rows}) == len(rows) == 335
    failed = {row["tile_id"]: row["error"].split(":")[0] for row in rows if row["error"]}
    assert failed.keys() == {"bad/empty", "bad/text", "../bad/up", "t/334"}
    assert failed["t/334"].startswith("cut short")
    assert totals.tiles == 335
    assert (totals.classified, totals.errors, totals.errors_by_stage) == (331, 4, {"read": 2, "decode": 2})
    assert list(totals.tiles_by_class) == CLASSES
    assert sum(totals.tiles_by_class.values()) == 331
    assert [bad.archive for bad in totals.bad_archives] == [str(archives / "c.tar")]
    assert "cut short" in totals.bad_archives[0].reason
    assert (totals.chunks, totals.engine) == (CHUNKS, "torch-f32")
    assert seen[:3] == [("plan", 1, 3), ("plan", 2, 3), ("plan", 3, 3)]
    assert seen[3] == ("classify", 0, 335)
    assert seen[-1] == ("classify", 335, 335)


@pytest.mark.ray
def test_the_records_of_a_run_tell_how_it_went(run: Run) -> None:
    out, totals, _ = run
    written = (out / SUCCESS).read_bytes()
    assert Totals.model_validate_json(written) == totals
    assert json.loads(written)["bad_archives"][0].keys() == {"archive", "reason"}
    status = read_status(out)
    assert status is not None
    assert (status.kind, status.state, status.workers) == ("classify", "done", 2)
    assert status.planned_tiles == status.done_tiles == 335
    assert status.failed_by_stage == {"read": 2, "decode": 2}
    assert status.seconds_by_stage.keys() == {"read", "decode", "forward", "write"}
    assert status.tiles_by_class == totals.tiles_by_class


@pytest.mark.ray
def test_a_finished_run_answers_at_once_and_opens_nothing(run: Run, model: str, archives: Path, tmp_path: Path) -> None:
    out, totals, _ = run
    hidden = archives.rename(tmp_path / "hidden")
    try:
        began = time.monotonic()
        assert classify(model, [str(archives)], str(out), SMALL) == totals
        assert time.monotonic() - began < 1
    finally:
        hidden.rename(archives)


@pytest.mark.ray
def test_a_folder_with_another_run_is_refused(run: Run, model: str, archives: Path, tmp_path: Path) -> None:
    out, _, _ = run
    with pytest.raises(UsageError, match=r"another run \(other bundle_digest\)"):
        classify(save(tmp_path / "other", seed=1), [str(archives)], str(out), SMALL)
    with pytest.raises(UsageError, match=r"another run \(other archives\)"):
        classify(model, [str(archives / "a.tar")], str(out), SMALL)
    with pytest.raises(UsageError, match=r"another run \(other tiles_per_chunk\)"):
        classify(model, [str(archives)], str(out))


@pytest.mark.ray
def test_a_resumed_run_opens_only_archives_that_are_not_done(
    run: Run, model: str, archives: Path, tmp_path: Path
) -> None:
    whole, totals, _ = run
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / SUCCESS).unlink()
    (out / "predictions" / "part-000031.parquet").unlink()  # of b.tar
    kept = parts(out)
    for name in ("a.tar", "c.tar"):
        (archives / name).rename(tmp_path / name)
    try:
        again = classify(model, [str(archives)], str(out), SMALL)
    finally:
        for name in ("a.tar", "c.tar"):
            (tmp_path / name).rename(archives / name)
    changes = {"seconds": again.seconds, "tiles_per_second": again.tiles_per_second}
    assert again == totals.model_copy(update=changes)
    assert parts(out).items() >= kept.items()
    assert read_predictions(str(out)).equals(read_predictions(str(whole)))


@pytest.mark.ray
def test_more_workers_than_cpus_are_refused(ray_session: None, model: str, archives: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="workers=64: the cluster has 4 CPUs"):
        classify(model, [str(archives)], str(tmp_path), ClassifyConfig(workers=64))


@pytest.mark.ray
def test_an_archive_changed_since_the_plan_stops_the_run_in_one_line(
    run: Run, model: str, archives: Path, tmp_path: Path
) -> None:
    whole, _, _ = run
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / SUCCESS).unlink()
    (out / "predictions" / "part-000000.parquet").unlink()
    content = (archives / "a.tar").read_bytes()
    (archives / "a.tar").write_bytes(content + b"more")
    try:
        with pytest.raises(TilefleetError, match=r"a\.tar: changed since it was planned") as caught:
            classify(model, [str(archives)], str(out), SMALL)
    finally:
        (archives / "a.tar").write_bytes(content)
    assert "\n" not in str(caught.value)
    status = read_status(out)
    assert status is not None
    assert (status.state, status.error) == ("failed", str(caught.value))


@pytest.mark.ray
def test_a_worker_that_is_killed_is_replaced_and_its_chunk_done_again(
    run: Run, model: str, archives: Path, tmp_path: Path
) -> None:
    whole, _, _ = run
    killed: list[int] = []

    def kill_first_worker() -> None:
        while not killed:
            for worker in working_actors():
                os.kill(worker, signal.SIGKILL)
                killed.append(worker)
            time.sleep(0.005)

    killer = threading.Thread(target=kill_first_worker, daemon=True)
    killer.start()
    classify(model, [str(archives)], str(tmp_path / "out"), SMALL)
    assert killed
    assert read_predictions(str(tmp_path / "out")).equals(read_predictions(str(whole)))


@pytest.mark.ray
def test_a_killed_driver_loses_nothing(run: Run, model: str, archives: Path, tmp_path: Path) -> None:
    whole, _, _ = run
    out = tmp_path / "out"
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, model, str(archives), str(out)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 150
        while driver.poll() is None and len(parts(out)) < CHUNKS // 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        driver.kill()
        driver.wait()
    kept = settled(out)
    assert CHUNKS // 2 <= len(kept) < CHUNKS
    assert state(out) == "running"
    classify(model, [str(archives)], str(out), SMALL)
    assert parts(out).items() >= kept.items()
    assert read_predictions(str(out)).equals(read_predictions(str(whole)))


@pytest.mark.ray
def test_a_full_disk_is_named_and_the_same_command_finishes_later(
    run: Run, model: str, archives: Path, small_disk: Path
) -> None:
    whole, _, _ = run
    out = small_disk / "out"
    with pytest.raises(TilefleetError, match="the disk is full") as caught:
        classify(model, [str(archives)], str(out), SMALL)
    assert "\n" not in str(caught.value)
    assert state(out) == "failed"
    kept = settled(out)
    assert 0 < len(kept) < CHUNKS
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    classify(model, [str(archives)], str(out), SMALL)
    assert parts(out).items() >= kept.items()
    assert read_predictions(str(out)).equals(read_predictions(str(whole)))
    assert state(out) == "done"


def test_archives_without_any_tile_are_an_error_that_says_why(model: str, tmp_path: Path) -> None:
    (tmp_path / "empty.tar").write_bytes(b"")
    write_tar(tmp_path / "text.tar", [("readme.txt", b"no tile")])
    for _ in range(2):  # what the first try leaves does not stand in the way of the second
        with pytest.raises(TilefleetError, match=r"empty\.tar: archive is empty .* 1 more"):
            classify(model, [str(tmp_path)], str(tmp_path / "out"))
        assert state(tmp_path / "out") == "failed"


def test_a_folder_that_holds_something_else_is_refused(model: str, archives: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="holds something else"):
        classify(model, [str(archives)], str(tmp_path))
    with pytest.raises(UsageError, match="is a file"):
        classify(model, [str(archives)], str(tmp_path / "thesis.txt"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_wrong_input_is_named_before_anything_is_written(model: str, archives: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="nowhere: no such bundle"):
        classify(str(tmp_path / "nowhere"), [str(archives)], str(out))
    with pytest.raises(UsageError, match=r"nowhere\.tar: no such file"):
        classify(model, [str(tmp_path / "nowhere.tar")], str(out))
    with pytest.raises(ValidationError, match="speed"):
        ClassifyConfig.model_validate({"speed": "fast"})
    assert not out.exists()


def working_actors() -> list[int]:
    """Process ids of this process's own Ray actors that are at a chunk just now."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            command = (folder / "cmdline").read_bytes()
            if command.startswith(b"ray::") and b"ChunkClassifier" in command and b".submit" in command:
                raylet = parent(int(folder.name))
                found += [int(folder.name)] if parent(raylet) == os.getpid() else []
        except (OSError, ValueError):  # not a process, or one that has just ended
            continue
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def settled(out: Path) -> dict[str, tuple[int, int]]:
    """The parts once no worker writes any more: those of a killed driver live on for a moment."""
    while (seen := parts(out)) != (time.sleep(2), parts(out))[1]:
        pass
    return seen


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for some parts, not for all."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a small disk cannot be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)
