"""A cluster of two hosts, as a new user starts it on machines of their own, and what becomes of jobs cut short.

The tests are the story of one cluster, in order.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import records
from cluster.nodes import Node
from configs.schema import Recipe
from tests.cluster.conftest import ROOT, Machine, wait_for
from tests.conftest import need
from tests.hosts import are_possible, two_hosts
from tests.ports import listening
from tests.processes import descendants
from tests.runs import traced, write_recipe

pytestmark = [pytest.mark.process, pytest.mark.timeout(1500)]


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
        assert (code, "the token is not that cluster's" in said) == (2, True), said
        (folder / "token").unlink()
        folder.rmdir()
        [line] = re.findall(r"ssh MACHINE '(.*)' < ~/.config/tilefleet/token$", told, re.MULTILINE)
        with (head.home / ".config" / "tilefleet" / "token").open() as given:
            subprocess.run(["sh", "-c", line], stdin=given, cwd=other.home, check=True)
        other.must(*command.split(), "--cpus", 1)
        yield head, other
        head.must("cluster", "down")
        other.must("cluster", "down")
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
    code, said = other.run("jobs", "list")
    assert (code, f"Give the command on {head.host.address}, or" in said) == (2, True)
    code, said = other.run("jobs", "list", "--address", url)
    assert code == 2
    assert f"ssh -N -L 8265:127.0.0.1:{port} {head.host.address}" in said
    code, said = other.run("jobs", "list", "--address", url, "--insecure-http")
    assert code == 1
    assert "no job server answers" in said


def test_what_is_open_to_the_network_is_what_the_readme_says(
    machines: tuple[Machine, Machine], long: Recipe, tmp_path: Path
) -> None:
    """While a training is at work, as seen from the other host."""
    long = long.model_copy(update={"name": "scanned", "runs": str(tmp_path)})
    machines[0].must("submit", "train", write_recipe(long, machines[0].home))
    wait_for(lambda: is_training(long))
    for machine, asker in (machines, machines[::-1]):
        names = descendants(machine.host.init)
        owners = {port: (host, names[pid]) for (host, port), pid in listening(set(names)).items()}
        outward = {port: owner for port, owner in owners.items() if not owner[0].startswith(("127.", "::1"))}
        look = [sys.executable, str(ROOT / "tests" / "ports.py"), machine.host.address, *map(str, outward)]
        kinds = json.loads(asker.host.run(look))
        table = {port: (kinds[str(port)], *owner) for port, owner in outward.items()}
        print(*table.items(), sep="\n")
        assert {kind for kind, *_ in table.values()} == {"http", "grpc", "metrics", "other"}
        assert {host for kind, host, _ in table.values() if kind == "http"} == {machine.host.address}
        torch = [name for kind, _, name in table.values() if kind == "other"]
        assert all("RayTrainWorker" in name for name in torch)
        assert 1 <= len(torch) <= 2
        metrics = [name for kind, _, name in table.values() if kind == "metrics"]
        assert len(metrics) == (3 if machine is machines[0] else 1), metrics
    machines[0].must("jobs", "stop", "scanned")


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


def test_a_driver_on_the_head_that_names_it_by_loopback_uses_both_hosts(
    machines: tuple[Machine, Machine], bundle: Path, shards: Path, tmp_path: Path
) -> None:
    """As in a head's pod of Kubernetes."""
    options = ["engine=torch", "tiles_per_chunk=8", "--out", tmp_path / "out"]
    machines[0].must("classify", bundle, shards / "train", *options, RAY_ADDRESS="127.0.0.1:6379")
    status = records.read_status(str(tmp_path / "out"))
    assert status
    assert (status.state, status.workers) == ("done", 2)
