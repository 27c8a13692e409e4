"""Faults in training: after each, the tiles seen over the whole run, the losses and the weights are those of a run
that nothing disturbed.

Undisturbed runs are made under ``torchrun``, so that Ray's part is held against the same loop without Ray.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import need

from cluster import records, storage
from configs.errors import TilefleetError, UsageError
from configs.schema import CheckpointConfig, Recipe
from tests.hosts import ENVIRONMENT, Host, are_possible, two_hosts
from tests.object_store import ObjectStore
from tests.processes import descendants
from tests.runs import ROOT, losses, torchrun, trace, traced, write_recipe
from training import checkpoint, loop
from training.loop import Trainer
from training.train import RESIZE_SECONDS, cpu_share, train

THREADS = max(1, (os.cpu_count() or 1) // 2)
"""Of torch, in each of two workers that share this machine: their number shows in the last bits of a sum."""

PREEMPTION_POLL = 5.0
"""Seconds between two looks of Ray Train for hosts that are about to go."""

RESERVATION = 20.0
"""Seconds between two counts that Ray makes of what it can give to a training."""

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run of two workers, long enough to be hit in its middle."""
    recipe = Recipe.model_validate(
        {
            "name": "undisturbed",
            "shards": str(shards),
            "runs": str(tmp_path_factory.mktemp("faults")),
            "model": {"name": "cnn"},
            "augment": {"symmetries": True},
            "epochs": 20,
            "batch_size": 8,
            "workers": 2,
            "trace": True,
            "checkpoint": {"every_steps": 5},
        }
    )
    torchrun(
        recipe.workers, "-m", "training.loop", write_recipe(recipe, Path(recipe.runs)), threads=THREADS, timeout=600
    )
    return recipe


@pytest.fixture(scope="module")
def on_hosts(undisturbed: Recipe) -> Recipe:
    """The undisturbed run of two workers with one thread each, as on two hosts of one CPU; saved once an epoch."""
    recipe = undisturbed.model_copy(update={"checkpoint": CheckpointConfig(every_steps=1000, keep=1000)})
    if THREADS == 1:
        return recipe
    recipe = recipe.model_copy(update={"name": "one-thread"})
    torchrun(recipe.workers, "-m", "training.loop", write_recipe(recipe, Path(recipe.runs)), timeout=600)
    return recipe


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    need(are_possible(), "hosts of their own need root, iproute2 and the right to make network namespaces")
    with two_hosts() as hosts:
        yield hosts


@pytest.fixture
def bucket(bucket: str, s3: ObjectStore, shards: Path) -> str:
    """A bucket with ``shards`` in it."""
    for file in shards.rglob("*"):
        if file.is_file():
            storage.write_bytes(f"{bucket}/shards/{file.relative_to(shards)}", file.read_bytes())
    s3.mend()
    return bucket


@pytest.mark.process
def test_a_killed_driver_leaves_nobody_behind_and_is_resumed(undisturbed: Recipe) -> None:
    hit = undisturbed.model_copy(update={"name": "driver"})
    with command("train", hit, folder=Path(hit.runs)) as driver:
        wait_for(lambda: len(checkpoint.complete(hit.run)) > 1, 240, driver)
        writers = [pid for pid, name in descendants(driver.pid).items() if "::RayTrain" in name or "Controller" in name]
        assert len(writers) == 3
        driver.kill()
    wait_for(lambda: not any(map(is_alive, writers)), 30)
    assert 0 < share_done(hit) < 1
    with command("train", hit, "--resume", folder=Path(hit.runs)) as driver:
        assert driver.wait(400) == 0
    assert_equal(hit, undisturbed)


def test_workers_given_up_write_no_more(small_recipe: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(small_recipe)
    first = checkpoint.claim(recipe.run) if Path(recipe.run).mkdir(parents=True) is None else ""
    stuck = Trainer(recipe, torch.device("cpu"), command=first)
    followed = Trainer(recipe, torch.device("cpu"), command=first)  # the same command has started other workers
    with pytest.raises(checkpoint.Superseded, match="other workers have taken over"):
        stuck.fit()
    assert not checkpoint.complete(recipe.run)
    second = checkpoint.claim(recipe.run)  # a second command has gone on with the run
    assert not checkpoint.is_current(recipe.run, first)
    with pytest.raises(checkpoint.Superseded):
        followed.fit()
    with pytest.raises(checkpoint.Superseded, match="another command"):
        Trainer(recipe, torch.device("cpu"), command=first)
    assert not checkpoint.complete(recipe.run)
    assert not records.read_metrics(recipe.run)
    Trainer(recipe, torch.device("cpu"), command=second).fit()
    assert len(records.read_metrics(recipe.run)) == recipe.epochs


@pytest.mark.process
def test_three_failed_uploads_in_a_row_change_nothing(
    undisturbed: Recipe, bucket: str, s3: ObjectStore, tmp_path: Path
) -> None:
    places = {"shards": f"{bucket}/shards", "runs": f"{bucket}/runs", "trace": False}
    run = Recipe.model_validate(undisturbed.model_dump() | places | {"checkpoint": {"every_steps": 100}})
    for file in (checkpoint.STATE, checkpoint.MANIFEST, "metrics.jsonl", "model.safetensors"):
        s3.fail("PUT", file, 3)
    torchrun(run.workers, "-m", "training.loop", write_recipe(run, tmp_path), threads=THREADS, timeout=400)
    assert sum(checkpoint.STATE in request for request in s3.requests if "PUT" in request) == run.epochs + 3
    assert_equal(run, undisturbed)


@pytest.mark.process
def test_an_upload_that_keeps_failing_is_one_line_and_keeps_what_was_saved(
    small_recipe: dict[str, Any], bucket: str, s3: ObjectStore
) -> None:
    calm = Recipe.model_validate(small_recipe)
    Trainer(calm, torch.device("cpu")).fit()
    run = Recipe.model_validate(small_recipe | {"shards": f"{bucket}/shards", "runs": f"{bucket}/failing"})
    s3.fail("PUT", "step-00000009", 1000)
    with pytest.raises(TilefleetError, match=rf"^{run.run}/checkpoints/step-00000009/state\.pt: "):
        Trainer(run, torch.device("cpu")).fit()
    assert [location[-8:] for location in checkpoint.complete(run.run)] == ["00000003", "00000006"]
    s3.mend()
    Trainer(run, torch.device("cpu")).fit()
    assert losses(run) == losses(calm)
    assert weights(run) == weights(calm)


@pytest.mark.process
def test_a_host_lost_and_a_host_that_gives_notice_cost_time_and_nothing_else(
    on_hosts: Recipe, hosts: tuple[Host, Host]
) -> None:
    hit = on_hosts.model_copy(update={"name": "hosts"})
    head, other = hosts
    with command("train", hit, folder=Path(hit.runs), host=head) as driver:
        wait_for(lambda: len(checkpoint.complete(hit.run)) > 1, 240, driver)
        other.lose()
        other.boot()
        reached = len(checkpoint.complete(hit.run))
        wait_for(lambda: len(checkpoint.complete(hit.run)) > reached, 240, driver)
        with stopped(workers(head) + workers(other)):  # so that the run cannot end before its workers are told
            notice(head, other, seconds=40)
            time.sleep(PREEMPTION_POLL + 3)
        wait_for(lambda: saved_within_an_epoch(hit), 60, driver)
        assert share_done(hit) < 1
        other.lose()
        other.boot()
        assert driver.wait(300) == 0
    assert_equal(hit, on_hosts)


@pytest.mark.process
def test_a_run_goes_on_with_one_worker_while_a_link_is_cut_and_with_two_afterwards(
    on_hosts: Recipe, hosts: tuple[Host, Host]
) -> None:
    hit = on_hosts.model_copy(update={"name": "elastic", "min_workers": 1})
    head, other = hosts
    with command("train", hit, folder=Path(hit.runs), host=head) as driver:
        wait_for(lambda: len(checkpoint.complete(hit.run)) > 1, 240, driver)
        other.link("down")
        wait_for(lambda: any(line["workers"] == 1 for line in trace(hit)), 240, driver)
        with stopped(workers(head)):  # so that the run cannot end before the host is back
            other.lose()
            other.link("up")
            other.boot()
            time.sleep(RESERVATION + RESIZE_SECONDS)
        assert share_done(hit) < 1
        assert driver.wait(300) == 0
    counts = [line["workers"] for line in trace(hit) if line["rank"] == 0]
    assert [count for count, before in zip(counts, [0, *counts], strict=False) if count != before] == [2, 1, 2]
    assert traced(hit) == traced(on_hosts)
    assert len(losses(hit)) == len(losses(on_hosts))


def test_a_notice_is_answered_with_one_checkpoint(
    small_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "NOTICE_SECONDS", -1.0)
    changes = {"batch_size": 8, "checkpoint": {"every_steps": 1000, "keep": 9}}
    run = Recipe.model_validate(small_recipe | changes)
    Trainer(run, torch.device("cpu"), notice=lambda: True).fit()
    saved = [int(location[-8:]) for location in checkpoint.complete(run.run)]
    steps = len(records.read_metrics(run.run)[0]["losses"])
    assert saved == [loop.LOG_STEPS, steps, 2 * steps]


@pytest.mark.parametrize(
    ("hosts", "workers", "share"), [([4], 2, 2), ([1, 1], 2, 1), ([3, 5], 2, 3), ([8, 1], 3, 2), ([7], 7, 1)]
)
def test_no_worker_gets_more_cpus_than_one_host_can_give(hosts: list[int], workers: int, share: int) -> None:
    assert cpu_share(hosts, workers) == share


def test_fewer_workers_than_workers(small_recipe: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="min_workers: 3 is more than workers, 2"):
        train(Recipe.model_validate(small_recipe | {"workers": 2, "min_workers": 3}))


@contextmanager
def command(
    verb: str, recipe: Recipe, *options: str, folder: Path, host: Host | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A ``tilefleet`` process, here or on ``host``; what is left of it is killed. Its output lies in ``folder``."""
    with (folder / f"{recipe.name}.log").open("ab") as log:
        line = [sys.executable, str(ROOT / "tilefleet.py"), verb, str(write_recipe(recipe, folder)), *options]
        alone = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        process = host.start(line, log) if host else subprocess.Popen(line, env=alone, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(happened: Callable[[], object], seconds: float, process: subprocess.Popen[bytes] | None = None) -> None:
    """Return once ``happened()``; fail after ``seconds``, or when ``process`` ended before."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"not within {seconds} s"
        assert process is None or process.poll() is None, f"ended with {process.returncode}"
        time.sleep(0.05)


def share_done(recipe: Recipe) -> float:
    status = records.read_status(recipe.run)
    return status.done_tiles / status.planned_tiles if status else 0.0


def workers(host: Host) -> list[int]:
    assert host.machine
    return [pid for pid, name in descendants(host.machine.pid).items() if "::RayTrainWorker" in name]


@contextmanager
def stopped(processes: list[int]) -> Iterator[None]:
    """Processes that stand still for the time of the block."""
    assert processes
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    yield
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def notice(head: Host, host: Host, seconds: int) -> None:
    """Tell the cluster, as a cloud does, that ``host`` will be gone in so many seconds."""
    listing = "import ray; ray.init(log_to_driver=False); print(*[n['NodeID'] for n in ray.nodes() if n['Alive'] and "
    node = head.run([sys.executable, "-c", f"{listing}n['NodeManagerAddress'] == '{host.address}'])"]).split()[-1]
    options = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test", f"--node-id={node}"]
    drain = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--deadline-remaining-seconds={seconds}"]
    head.run([*drain, *options, f"--address={ENVIRONMENT['RAY_ADDRESS']}"])


def saved_within_an_epoch(run: Recipe) -> bool:
    """Whether there is a checkpoint other than those of the ends of epochs."""
    steps = [int(location[-8:]) for location in checkpoint.complete(run.run)]
    rows = records.read_metrics(run.run)
    return any(step % len(rows[0]["losses"]) for step in steps) if rows else False


def is_alive(pid: int) -> bool:
    """Whether a process still runs; one that ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_equal(run: Recipe, undisturbed: Recipe) -> None:
    """The same losses, tiles and, to the byte, weights."""
    assert losses(run) == losses(undisturbed)
    if run.trace:
        assert traced(run) == traced(undisturbed)
    assert weights(run) == weights(undisturbed)


def weights(run: Recipe) -> bytes:
    return storage.read_bytes(storage.join(run.run, "bundle", "model.safetensors"))
