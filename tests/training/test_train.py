"""Training under Ray: refusals before anything starts, worker counts, a killed worker, resume."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cluster import records
from configs.errors import TilefleetError, UsageError
from configs.schema import Recipe
from tests.processes import descendants
from tests.runs import losses, trace, traced
from training.train import train


def recipe(keys: dict[str, Any], **changes: Any) -> Recipe:
    return Recipe.model_validate(keys | changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch_size": 10_000}, "batch_size: 10000 is more than the"),
        ({"workers": 20}, "workers: 20 is more than the batch_size"),
        ({"model": {"name": "resnet"}}, "model.name: no model 'resnet'"),
        ({"shards": "/no/such/set"}, "/no/such/set: no such shard set"),
    ],
)
def test_what_cannot_train_is_refused_before_ray_starts(
    small_recipe: dict[str, Any], changes: dict[str, Any], says: str
) -> None:
    run = recipe(small_recipe, **changes)
    with pytest.raises(UsageError, match=says):
        train(run)
    assert not Path(run.run).exists()


def test_a_folder_that_holds_something_else_is_refused(small_recipe: dict[str, Any]) -> None:
    run = recipe(small_recipe)
    Path(run.run).mkdir(parents=True)
    (Path(run.run) / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something else"):
        train(run)
    assert (Path(run.run) / "thesis.txt").read_text() == "mine"


@pytest.mark.ray
def test_more_workers_than_the_cluster_has_cpus(ray_session: None, small_recipe: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="workers: 8 asked for, the cluster has 4 CPUs"):
        train(recipe(small_recipe, workers=8))


@pytest.fixture(scope="module")
def calm(ray_session: None, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """An undisturbed run of two workers."""
    keys = {"shards": str(shards), "runs": str(tmp_path_factory.mktemp("calm")), "model": {"name": "cnn"}}
    run = recipe(keys, name="two", epochs=4, batch_size=8, workers=2, trace=True, checkpoint={"every_steps": 5})
    shown: list[records.Status] = []
    assert train(run, follow=shown.append).state == "done"
    assert shown[-1].done_tiles == shown[-1].planned_tiles
    return run


@pytest.mark.ray
def test_one_worker_and_two_see_the_same_tiles_and_losses(calm: Recipe) -> None:
    one = calm.model_copy(update={"name": "one", "workers": 1})
    train(one)
    assert traced(one) == traced(calm)
    assert len(list(Path(calm.run).glob("trace-rank-*.jsonl"))) == 2
    for a, b in zip(losses(one)[:20], losses(calm)[:20], strict=True):
        assert abs(a - b) <= 1e-4 * abs(a)


@pytest.mark.ray
def test_a_run_is_continued_only_as_itself(calm: Recipe) -> None:
    with pytest.raises(UsageError, match="holds another run"):
        train(calm)
    with pytest.raises(UsageError, match="cannot be resumed with another epochs"):
        train(calm.model_copy(update={"epochs": 9}), resume=True)
    started = time.time()
    assert train(calm, resume=True).state == "done"
    assert time.time() - started < 5


@pytest.mark.ray
def test_a_killed_worker_costs_time_and_nothing_else(calm: Recipe) -> None:
    hit = calm.model_copy(update={"name": "hit"})
    killed: list[int] = []

    def kill_a_worker_in_the_middle() -> None:
        while not killed:
            status = records.read_status(hit.run)
            if status and status.done_tiles > status.planned_tiles / 3:
                killed.extend(_train_workers()[:1])
                os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.02)

    killer = threading.Thread(target=kill_a_worker_in_the_middle)
    killer.start()
    train(hit)
    killer.join()
    assert losses(hit) == losses(calm)
    assert traced(hit) == traced(calm)
    assert all(line["workers"] == 2 for line in trace(hit))
    bundles = [Path(run.run, "bundle", "model.safetensors").read_bytes() for run in (calm, hit)]
    assert bundles[0] == bundles[1]


@pytest.mark.ray
def test_an_error_that_no_restart_can_mend_is_one_line(
    ray_session: None, small_recipe: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    (copy / "train" / "shard-000001.tar").unlink()
    run = recipe(small_recipe, shards=str(copy))
    with pytest.raises(TilefleetError, match=r"shard-000001\.tar: shard is missing"):
        train(run)
    status = records.read_status(run.run)
    assert status
    assert status.state == "failed"
    assert "shard is missing" in str(status.error)


def _train_workers() -> list[int]:
    """Process ids of Ray Train's workers below this process; they carry their name as their command line."""
    return sorted(pid for pid, name in descendants(os.getpid()).items() if "::RayTrainWorker" in name)
