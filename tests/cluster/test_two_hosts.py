"""A cluster of two hosts, as a new user starts it on machines of their own, and what becomes of jobs cut short.

The tests are the story of one cluster, in order.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import records
from cluster.nodes import Node
from configs.schema import Recipe
from tests.cluster.conftest import FOREIGN, ROOT
from tests.conftest import need
from tests.hosts import Host, are_possible, two_hosts
from tests.processes import descendants
from tests.runs import traced, write_recipe

pytestmark = [pytest.mark.process, pytest.mark.timeout(1500)]

HEALTH = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


class Machine:
    """A host and its user, whose home no other host has."""

    def __init__(self, host: Host, home: Path) -> None:
        self.host, self.home = host, home
        home.mkdir()

    def start(self, *arguments: object) -> tuple[subprocess.Popen[bytes], Path]:
        """``tilefleet ARGUMENTS`` and the file of all that it prints."""
        command = [sys.executable, str(ROOT / "tilefleet.py"), *map(str, arguments)]
        environment = dict.fromkeys(FOREIGN, "") | HEALTH | {"HOME": str(self.home), "COLUMNS": "80"}
        with tempfile.NamedTemporaryFile(dir=self.home, suffix=".out", delete=False) as log:
            kept = ["env", *[f"--unset={name}" for name in FOREIGN], *command]
            return self.host.start(kept, log, environment), Path(log.name)  # type: ignore[arg-type]

    def run(self, *arguments: object) -> tuple[int, str]:
        """Exit code and output of ``tilefleet ARGUMENTS``."""
        process, log = self.start(*arguments)
        return process.wait(timeout=600), log.read_text()

    def must(self, *arguments: object) -> str:
        """The output of ``tilefleet ARGUMENTS``, which must succeed."""
        code, text = self.run(*arguments)
        assert code == 0, text
        return text

    def processes(self, words: str) -> list[int]:
        """Processes of the host with ``words`` in their command lines."""
        return [pid for pid, line in descendants(self.host.init).items() if words in line]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, Machine]]:
    need(are_possible(), "hosts of their own need root, iproute2 and the right to make network namespaces")
    homes = tmp_path_factory.mktemp("homes")
    with two_hosts(ray=False) as hosts:
        head, other = (Machine(host, homes / str(number)) for number, host in enumerate(hosts))
        told = head.must("cluster", "up", "--host", head.host.address, "--cpus", 1)
        assert "a token keeps others out but hides nothing" in told
        [command] = re.findall(r"tilefleet (cluster up --join \S+)", told)
        assert "needs the token" in other.run(*command.split())[1]
        folder = other.home / ".config" / "tilefleet"
        (folder / "token").write_text("wrong")
        (folder / "token").chmod(0o600)
        code, said = other.run(*command.split())
        assert code == 1, said
        shutil.copy(head.home / ".config" / "tilefleet" / "token", folder)
        other.must(*command.split(), "--cpus", 1)
        yield head, other
        other.run("cluster", "down")
        head.run("cluster", "down")
        assert not [line for host in hosts for line in descendants(host.init).values() if "raylet" in line]


@pytest.fixture(scope="module")
def long(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A training with a worker on each host, long enough to be cut short, that writes which tiles it saw."""
    return Recipe.model_validate(
        {
            "name": "long",
            "shards": str(shards),
            "runs": str(tmp_path_factory.mktemp("runs")),
            "model": {"name": "cnn"},
            "epochs": EPOCHS,
            "batch_size": 16,
            "workers": 2,
            "trace": True,
        }
    )


EPOCHS = 24


def wait_for(happened: Callable[[], Any], seconds: float = 300) -> Any:
    end = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


def is_training(recipe: Recipe, after: int = 0) -> bool:
    status = records.read_status(recipe.run)
    return status is not None and status.state == "running" and (status.step or 0) > after


def test_both_hosts_are_shown(machines: tuple[Machine, Machine]) -> None:
    text = wait_for(lambda: found if "2 of 2 nodes up" in (found := machines[0].must("cluster", "status")) else None)
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"^10\.77\.0\.1 \(head\) +[\d.]+ of 1 ", text, re.MULTILINE)
    assert re.search(r"^10\.77\.0\.2 +[\d.]+ of 1 ", text, re.MULTILINE)


def test_from_another_host_the_job_server_is_not_there(machines: tuple[Machine, Machine]) -> None:
    head, other = machines
    [state] = (head.home / ".config" / "tilefleet").glob("cluster-*.json")
    port = str(Node.model_validate_json(state.read_bytes()).jobs).rpartition(":")[2]
    url = f"http://{head.host.address}:{port}"
    code, said = other.run("jobs", "list", "--address", url)
    assert code == 2
    assert f"ssh -N -L 8265:127.0.0.1:{port} {head.host.address}" in said
    code, said = other.run("jobs", "list", "--address", url, "--insecure-http")
    assert code == 1
    assert "no job server answers" in said


def test_a_path_that_only_one_host_has_is_refused(machines: tuple[Machine, Machine], long: Recipe) -> None:
    recipe = write_recipe(long.model_copy(update={"name": "unseen", "epochs": 1}), machines[0].home)
    code, said = machines[0].run("submit", "train", recipe, "runs=/tmp/ray/runs", "--follow")
    assert code == 2, said
    assert "/tmp/ray/runs/unseen: the node 10.77.0.2 does not see it" in said


def test_one_run_however_it_is_submitted_stopped_and_killed(machines: tuple[Machine, Machine], long: Recipe) -> None:
    from training.sampler import Sampler
    from training.shards import load_index

    head, other = machines
    recipe = write_recipe(long, head.home)
    command = ["submit", "train", recipe]
    (first, one), (second, two) = head.start(*command), head.start(*command)
    assert (first.wait(120), second.wait(120)) == (0, 0), one.read_text() + two.read_text()
    told = sorted(re.findall(r"^(\S+): (submitted|already running)$", one.read_text() + two.read_text(), re.MULTILINE))
    job = told[0][0]
    assert told == [(job, "already running"), (job, "submitted")]
    code, said = head.run(*command, "seed=1")
    assert code == 2
    assert f"{job} works on it with other settings" in said

    shell, log = head.start(*command, "--follow")
    wait_for(lambda: is_training(long))
    assert other.processes("RayTrainWorker")
    wait_for(lambda: "train, epoch" in log.read_text())
    for pid in descendants(shell.pid):
        os.kill(pid, signal.SIGKILL)
    shell.wait()
    reached = records.read_status(long.run)
    assert reached
    wait_for(lambda: is_training(long, after=reached.step or 0))

    said = head.must("jobs", "stop", "long")
    assert said.endswith(f"{job}: stopped\n")
    stopped = records.read_status(long.run)
    assert stopped
    assert stopped.state == "stopped"
    assert list(Path(long.run, "checkpoints").glob(f"step-{stopped.step:08d}"))
    resumed = job.removesuffix("1") + "2"
    assert head.must(*command).startswith(f"{resumed}: resumed\n")
    wait_for(lambda: is_training(long, after=stopped.step or 0))

    drivers = head.processes("-m tilefleet train recipe.yaml --resume")
    assert drivers
    for pid in drivers:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: "failed" in head.must("jobs", "status", resumed))
    code, said = head.run(*command, "--follow")
    assert code == 0, said
    assert f"{long.run}/bundle: validation accuracy" in said
    assert re.findall(r"^(\S+): resumed", said) == [job.removesuffix("1") + "3"]

    index = load_index(long.shards)
    sampler = Sampler.of(long, index)
    status = records.read_status(long.run)
    assert status
    assert (status.state, status.epoch) == ("done", EPOCHS)
    rows = [json.loads(line) for line in Path(long.run, "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, EPOCHS + 1))
    seen = traced(long)
    assert len(seen) == EPOCHS * sampler.steps
    for epoch in range(EPOCHS):
        tiles = [tile for batch in seen[epoch * sampler.steps : (epoch + 1) * sampler.steps] for tile in batch]
        assert len(tiles) == len(set(tiles)) == index.tiles("train")
    listed = head.must("jobs", "list")
    assert max(map(len, listed.splitlines())) <= 80
    assert re.findall(rf"^{job[:-1]}(\d) +(\w+)", listed, re.MULTILINE) == [
        ("1", "stopped"),
        ("2", "failed"),
        ("3", "succeeded"),
    ]
    assert head.must(*command) == f"{long.run}: already finished\n"


def test_archives_are_classified_on_both_hosts(
    machines: tuple[Machine, Machine], bundle: Path, shards: Path, tmp_path: Path
) -> None:
    from inference.sink import read_predictions
    from training.shards import load_index

    options = ["engine=torch", "tiles_per_chunk=8", "--out", tmp_path / "out", "--follow"]
    code, said = machines[0].run("submit", "classify", bundle, shards / "train", *options)
    assert code == 0, said
    rows = read_predictions(str(tmp_path / "out")).to_pylist()
    tiles = load_index(shards).tiles("train")
    assert len(rows) == len({row["tile_id"] for row in rows}) == tiles
