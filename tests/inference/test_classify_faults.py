"""Faults in classification: after each the rows are, to the bit, those of a run that nothing disturbed; a finished part
is not written again, and of an archive that is finished nothing is read again.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pytest
from conftest import need

from cluster import storage
from cluster.records import read_status
from configs.errors import TilefleetError
from inference import classify as driver
from inference.classify import ClassifyConfig, classify
from inference.ledger import finished
from inference.plan import open_plan
from inference.report import report
from inference.sink import read_predictions
from tests.archives import jpeg, parts, save_model, write_tar
from tests.benchmarks import kills
from tests.hosts import Host, are_possible, two_hosts
from tests.object_store import ObjectStore
from tests.processes import descendants
from tests.runs import ROOT

ARCHIVES, TILES, CHUNK_TILES = 8, 600, 20
CHUNKS = ARCHIVES * TILES // CHUNK_TILES
SMALL = ClassifyConfig(tiles_per_chunk=CHUNK_TILES, batch_size=4, engine="torch", workers=2)
SETTINGS = [f"tiles_per_chunk={CHUNK_TILES}", "batch_size=4", "engine=torch"]
"""Batches so small that a run is long enough to be hit in its middle."""

DEADLY = """
import importlib.util, os, signal, sys

class Patch:
    @staticmethod
    def find_spec(name, path, target=None):
        if name != "training.decode":
            return None
        sys.meta_path.remove(Patch)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            module.decode_tiles = deadly(module.decode_tiles)
        spec.loader.exec_module = exec_module
        return spec

def deadly(decode_tiles):
    def decode(encoded, size, bands):
        if any(bytes(data).startswith(b"deadly") for data in encoded):
            os.kill(os.getpid(), signal.SIGSEGV)
        return decode_tiles(encoded, size, bands)
    return decode

sys.meta_path.insert(0, Patch)
"""

pytestmark = pytest.mark.timeout(900)


class Job(NamedTuple):
    """A bundle, a folder of archives, and the rows of a run over them that nothing disturbed."""

    model: str
    archives: Path
    rows: pa.Table


@pytest.fixture(scope="module")
def job(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    model = save_model(folder / "bundle")
    (folder / "archives").mkdir()
    for archive in range(ARCHIVES):
        numbers = range(archive * TILES, (archive + 1) * TILES)
        files = [(f"t/{n}.jpg", jpeg(n % 100) if n % 97 else b"no image") for n in numbers]
        write_tar(folder / "archives" / f"{archive}.tar", files)
    classify(model, [str(folder / "archives")], str(folder / "out"), SMALL)
    return Job(model, folder / "archives", read_predictions(str(folder / "out")))


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    need(are_possible(), "hosts of their own need root, iproute2 and the right to make network namespaces")
    with two_hosts() as hosts:
        yield hosts


@pytest.mark.process
@pytest.mark.parametrize("victim", ["driver", "gcs_server", "raylet"])
def test_whatever_is_killed_the_same_command_finishes(job: Job, tmp_path: Path, victim: str) -> None:
    out = tmp_path / "out"
    quickly = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
    with command(job.model, job.archives, out, environment=quickly) as process:
        wait_for_parts(out, CHUNKS // 6, process)
        os.kill(process.pid if victim == "driver" else the_one(process, f"/{victim} "), signal.SIGKILL)
        assert process.wait(300) != 0
    assert state(out) in ("running", "failed")
    assert_finished_by_the_same_command(job, out, settled(out))


@pytest.mark.ray
def test_a_worker_that_is_killed_is_replaced_and_its_chunk_done_again(job: Job, tmp_path: Path) -> None:
    out, killed = tmp_path / "out", list[int]()

    def kill_workers() -> None:
        for count in (CHUNKS // 4, CHUNKS // 2):
            wait_for_parts(out, count)
            killed.extend(pid for pid, name in descendants(os.getpid()).items() if "ChunkClassifier" in name)
            os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill_workers, daemon=True)
    killer.start()
    classify(job.model, [str(job.archives)], str(out), SMALL)
    killer.join(0)
    assert len(killed) > 1
    assert_same(job, out)


@pytest.mark.process
def test_a_deadly_tile_is_a_row_with_an_error_and_its_neighbours_are_classified(
    ray_session: None, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "bundle")
    files = [(f"t/{n}.jpg", jpeg(n)) for n in range(60)]
    files[17] = ("t/17.jpg", b"deadly for who decodes it")  # elsewhere merely undecodable
    write_tar(tmp_path / "a.tar", files)
    settings = ["tiles_per_chunk=20", "batch_size=8", "engine=openvino", "decode=pool"]  # ends decoders, then workers
    (tmp_path / "sitecustomize.py").write_text(DEADLY)
    with command(
        model, tmp_path / "a.tar", tmp_path / "out", settings, {"PYTHONPATH": str(tmp_path)}
    ) as process:  # the engine is chosen by a sample in which the tile is too
        assert process.wait(400) == 0, log_of(tmp_path / "out")
    config = ClassifyConfig(tiles_per_chunk=20, batch_size=8, engine="openvino")
    classify(model, [str(tmp_path / "a.tar")], str(tmp_path / "expected"), config)
    rows, expected = read_predictions(str(tmp_path / "out")), read_predictions(str(tmp_path / "expected"))
    errors = {row["tile_id"]: row["error"] for row in rows.to_pylist() if row["error"]}
    assert errors == {"t/17": "ends the process that decodes it: SIGSEGV, tried 2 times"}
    assert rows.drop("error").equals(expected.drop("error"))
    assert expected["error"][17].as_py() == "not an image"


@pytest.mark.ray
def test_a_second_driver_is_refused_and_the_first_is_not_disturbed(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    answers: list[tuple[int, str]] = []

    def start_another(stage: str, done: int, total: int) -> None:
        if done >= total / 2 and not answers and stage == "classify":
            with command(job.model, job.archives, out) as process:
                answers.append((process.wait(300), log_of(out)))

    classify(job.model, [str(job.archives)], str(out), SMALL, start_another)
    assert answers[0][0] == 2
    assert f"process {os.getpid()} on" in answers[0][1]
    assert "is at work on it; wait for it or stop it" in answers[0][1]
    assert_same(job, out)


@pytest.mark.ray
def test_a_full_disk_is_waited_for(job: Job, small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(400)
    waited: list[int] = []

    def make_room() -> None:
        wait_for_parts(disk / "out", 1)
        waited.append(len(settled(disk / "out")))
        resize(disk, "32m")

    helper = threading.Thread(target=make_room, daemon=True)
    helper.start()
    classify(job.model, [str(job.archives)], str(disk / "out"), SMALL)
    assert 0 < waited[0] < CHUNKS
    assert_same(job, disk / "out")


@pytest.mark.ray
def test_a_disk_that_stays_full_is_named_and_the_same_command_finishes_later(
    job: Job, small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk(400)
    out = disk / "out"
    monkeypatch.setattr(driver, "DISK_PATIENCE", 0.0)
    with pytest.raises(TilefleetError, match="the disk is full") as caught:
        classify(job.model, [str(job.archives)], str(out), SMALL)
    assert "\n" not in str(caught.value)
    assert state(out) == "failed"
    kept = settled(out)
    assert 0 < len(kept) < CHUNKS
    resize(disk, "32m")
    assert_finished_by_the_same_command(job, out, kept)


@pytest.mark.process
def test_a_host_that_is_lost_costs_time_and_nothing_else(job: Job, hosts: tuple[Host, Host], tmp_path: Path) -> None:
    out = tmp_path / "out"
    head, other = hosts
    with command(job.model, job.archives, out, host=head) as process:
        wait_for_parts(out, CHUNKS // 3, process)
        other.lose()
        kept = parts(out)
        assert len(kept) < CHUNKS
        assert process.wait(300) == 0, log_of(out)
    other.boot()
    assert parts(out).items() >= kept.items()
    assert_same(job, out)


@pytest.mark.process
def test_a_link_that_is_cut_for_a_while_costs_time_and_nothing_else(
    job: Job, hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    head, other = hosts
    with command(job.model, job.archives, out, host=head) as process:
        wait_for_parts(out, CHUNKS // 3, process)
        other.link("down")
        kept = parts(out)
        assert len(kept) < CHUNKS
        time.sleep(20)
        other.link("up")
        assert process.wait(300) == 0, log_of(out)
    assert parts(out).items() >= kept.items()
    assert_same(job, out)


@pytest.mark.process
def test_a_host_that_joins_takes_a_share_of_the_work(job: Job, hosts: tuple[Host, Host], tmp_path: Path) -> None:
    out = tmp_path / "out"
    head, other = hosts
    other.lose()
    with command(job.model, job.archives, out, host=head) as process:
        wait_for_parts(out, CHUNKS // 6, process)
        first = workers_on(head)
        for pid in first:
            os.kill(pid, signal.SIGSTOP)
        try:
            assert workers(out) == 1
            written = len(settled(out))
            other.boot()
            wait_for_parts(out, written + CHUNKS // 6, process)  # so by whom the new host started
            wait_for(lambda: workers(out) == 2, 30, process)
            assert workers_on(other)
        finally:
            for pid in first:
                os.kill(pid, signal.SIGCONT)
        assert process.wait(300) == 0, log_of(out)
    assert_same(job, out)


@pytest.mark.process
def test_random_kills_cost_no_tile_and_no_bit(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    hosts[1].lose()
    hosts[1].boot()  # a host that could not be reached for long ends its Ray
    found = kills.run(hosts, tmp_path, kills=4, seed=0, tiles=2000, kinds=("driver", "worker", "host", "link"))
    assert sum(found["kills"].values()) == 4
    assert (found["lost"], found["double"], found["different"]) == (0, 0, 0)


@pytest.mark.process
def test_object_storage_that_fails_and_is_slow_and_a_killed_driver_change_nothing(
    job: Job, bucket: str, s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for archive in job.archives.iterdir():
        storage.write_bytes(f"{bucket}/archives/{archive.name}", archive.read_bytes())
    s3.mend()
    count, seen = iter(range(1_000_000)), s3.seen

    def faulty(method: str, path: str) -> str | None:
        number = next(count)
        if method == "GET" and ".tar" in path and number % 7 == 0:
            time.sleep(0.2)
        return seen(method, path) or ("500" if number % 11 == 0 else "cut" if number % 23 == 0 else None)

    monkeypatch.setattr(s3, "seen", faulty)
    out, work = f"{bucket}/out", [*SETTINGS, "tiles_per_chunk=200"]
    with command(job.model, f"{bucket}/archives", out, work, s3.env, log=tmp_path / "log") as process:
        wait_for(lambda: len(finished(out)) > 8, 300, process)
        process.kill()
        process.wait()
    kept = {name: storage.read_bytes(f"{out}/predictions/{name}") for name in listed(out)}
    saved = open_plan(out)
    assert saved
    left = {chunk.archive for chunk in saved if chunk.id not in finished(out)}
    s3.mend()
    with command(job.model, f"{bucket}/archives", out, work, s3.env, log=tmp_path / "log") as process:
        assert process.wait(400) == 0, (tmp_path / "log").read_text()
    opened = {request for request in s3.requests if ".tar" in request and "GET" in request}
    assert opened
    assert {f"s3:/{request.split()[1].partition('?')[0]}" for request in opened} <= left
    assert all(storage.read_bytes(f"{out}/predictions/{name}") == data for name, data in kept.items())
    rows = read_predictions(out)
    assert rows.drop("archive").equals(job.rows.drop("archive"))
    assert b"<img" in storage.read_bytes(report(out))


def state(out: Path) -> str:
    status = read_status(out)
    assert status is not None
    return status.state


def workers(out: Path) -> int | None:
    status = read_status(out)
    assert status is not None
    return status.workers


def workers_on(host: Host) -> list[int]:
    """Processes of the workers that are up on ``host``."""
    found = descendants(host.machine.pid) if host.machine else {}
    return [pid for pid, name in found.items() if "ChunkClassifier" in name]


@contextmanager
def command(
    model: str,
    archives: object,
    out: object,
    settings: list[str] = SETTINGS,
    environment: dict[str, str] | None = None,
    host: Host | None = None,
    log: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A ``tilefleet classify`` with a Ray of its own, or on ``host``; what is left of it is killed."""
    line = [sys.executable, str(ROOT / "tilefleet.py"), "classify", model, str(archives), "--out", str(out), *settings]
    variables = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | (environment or {})
    with (log or Path(f"{out}.log")).open("ab") as file:
        process = host.start(line, file) if host else subprocess.Popen(line, env=variables, stdout=file, stderr=file)
    try:
        yield process
    finally:
        for pid in [*descendants(process.pid)] if host else []:  # what it runs there is not the process itself
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()


def log_of(out: Path) -> str:
    return Path(f"{out}.log").read_text()


def the_one(process: subprocess.Popen[bytes], name: str) -> int:
    """The process id of Ray's own process ``name`` below ``process``."""
    found = [pid for pid, line in descendants(process.pid).items() if name in line.split("--")[0] + " "]
    assert len(found) == 1, descendants(process.pid)
    return found[0]


def wait_for(happened: Callable[[], object], seconds: float, process: subprocess.Popen[bytes] | None = None) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"not within {seconds} s"
        assert process is None or process.poll() is None, f"ended with {process.returncode}"
        time.sleep(0.01)


def wait_for_parts(out: Path, count: int, process: subprocess.Popen[bytes] | None = None) -> None:
    wait_for(lambda: len(parts(out)) >= count, 300, process)


def settled(out: Path) -> dict[str, tuple[int, int]]:
    """The parts once no worker writes any more: those of a killed driver live on for a moment."""
    while (seen := parts(out)) != (time.sleep(3), parts(out))[1]:
        pass
    return seen


def listed(out: str) -> list[str]:
    return [location.rpartition("/")[2] for location in storage.list_files(f"{out}/predictions")]


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def assert_same(job: Job, out: Path) -> None:
    assert read_predictions(str(out)).equals(job.rows)
    assert state(out) == "done"


def assert_finished_by_the_same_command(job: Job, out: Path, kept: dict[str, tuple[int, int]]) -> None:
    """What is left is done, without the archives that are finished and with the parts there are left as they were."""
    assert 0 < len(kept) < CHUNKS
    saved = open_plan(str(out))
    assert saved
    left = {chunk.archive for chunk in saved if chunk.id not in finished(str(out))}
    away = [archive for archive in job.archives.iterdir() if str(archive) not in left]
    assert away
    hidden = out.parent / "hidden"
    hidden.mkdir()
    for archive in away:
        shutil.move(archive, hidden)
    try:
        classify(job.model, [str(job.archives)], str(out), SMALL)
    finally:
        for archive in away:
            shutil.move(hidden / archive.name, archive)
    assert parts(out).items() >= kept.items()
    assert_same(job, out)
