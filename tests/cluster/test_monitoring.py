from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from cluster import watch
from cluster.records import Status, StatusWriter
from configs.errors import UsageError
from configs.schema import Recipe
from tests.cluster.conftest import Machine, User, wait_for
from tests.conftest import need
from tests.dashboard import METRIC, MONITORING, Prometheus, panels, queries
from tests.hosts import Host, are_possible, two_hosts
from tests.ports import listening
from tests.processes import descendants
from tests.runs import ROOT, write_recipe

GROUPS = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
ALERTS = [rule for group in GROUPS for rule in group["rules"] if "alert" in rule]
RECORDS = [rule for group in GROUPS for rule in group["rules"] if "record" in rule]

TRAINED, CLASSIFIED = "small", "predictions"

MAY_BE_EMPTY = {
    "Alerts A": "nothing is wrong with these two runs, and no node is short of anything",
    "GPU A": "this machine may have none",
    "GPU memory A": "this machine may have none",
}
"""Queries of the dashboard that need not find anything, and why."""


def promtool(*arguments: str) -> str:
    need(shutil.which("promtool"), "promtool is not installed (Debian: prometheus)")
    done = subprocess.run(["promtool", *arguments], cwd=MONITORING, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_understands_its_configuration() -> None:
    promtool("check", "config", "prometheus.yml")


def test_prometheus_understands_the_rules() -> None:
    assert f"{len(ALERTS) + len(RECORDS)} rules found" in promtool("check", "rules", "alerts.yml")


def test_alerts_fire_when_they_should_and_only_then() -> None:
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml")


def test_each_alert_is_seen_to_fire_in_a_test_of_its_own() -> None:
    tests = yaml.safe_load((MONITORING / "alerts_test.yml").read_text())["tests"]
    fired = {one["alertname"] for test in tests for one in test["alert_rule_test"] if one.get("exp_alerts")}
    assert fired == {alert["alert"] for alert in ALERTS}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_says_how_bad_it_is_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert set(alert["annotations"]) == {"summary", "description", "runbook"}
    file, anchor = alert["annotations"]["runbook"].split("#")
    sections = (ROOT / file).read_text().split("\n## ")[1:]
    found = [text for text in sections if text.partition("\n")[0].lower().replace(" ", "-") == anchor]
    assert len(found) == 1
    assert f"**{alert['alert']}**" in found[0]
    assert "Look here first:" in found[0]
    assert "What to do:" in found[0]


def test_commands_of_the_runbook_are_there() -> None:
    help_of = subprocess.run([sys.executable, str(ROOT / "tilefleet.py"), "--help"], capture_output=True, text=True)
    for verb in set(re.findall(r"`tilefleet (\w+)", (MONITORING / "RUNBOOK.md").read_text())):
        assert re.search(rf"\b{verb}\b", help_of.stdout), verb


def test_a_taken_port_is_refused_before_anything_starts(tmp_path: Path) -> None:
    need(shutil.which("prometheus"), "prometheus is not installed")
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(UsageError, match="taken"):
        watch.start(tmp_path / "watch", port=other.getsockname()[1])
    assert not (tmp_path / "watch").exists()


def test_without_prometheus_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="apt-get install prometheus"):
        watch.start(tmp_path / "watch")


@pytest.mark.process
def test_up_starts_it_beside_the_cluster_and_down_ends_it(tmp_path: Path) -> None:
    """On a host of its own, where the ports that have no option are free."""
    need(shutil.which("prometheus"), "prometheus is not installed")
    need(are_possible(), "hosts of their own need root, iproute2 and the right to make network namespaces")
    up = ["cluster", "up", "--port", 0, "--cpus", 1, "--monitoring", "--runs", tmp_path / "runs"]
    with two_hosts(ray=False) as (host, _):
        machine = Machine(host, tmp_path / "home")
        for port in (9090, 9109):
            with Path(os.devnull).open("wb") as nowhere:
                taker = host.start([sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)], nowhere)
            wait_for(lambda pid=taker.pid: _ports(pid), 30)
            code, said = machine.run(*up)
            assert (code, said.count("\n"), f"port {port} is taken" in said) == (2, 1, True), said
            for pid in descendants(taker.pid):
                os.kill(pid, signal.SIGKILL)
            taker.wait()
        assert not machine.processes("raylet")
        assert "prometheus: http://127.0.0.1:9090" in machine.must(*up)
        wait_for(lambda: _healthy(host) == {"tilefleet": 1, "ray": 3}, 90)
        rules = _asked(host, "rules")["groups"]
        loaded = {rule["name"] for group in rules for rule in group["rules"] if rule["type"] == "alerting"}
        assert loaded == {rule["alert"] for rule in ALERTS}
        machine.must("cluster", "down")
        assert not _ports(host.init)


def _ports(pid: int) -> set[int]:
    return {port for _, port in listening(set(descendants(pid)))}


def _asked(host: Host, name: str) -> Any:
    program = f"import urllib.request as u; print(u.urlopen('http://127.0.0.1:9090/api/v1/{name}').read().decode())"
    return json.loads(host.run([sys.executable, "-c", program]))["data"]


def _healthy(host: Host) -> Counter[str]:
    """How many targets of each job Prometheus has found to be up."""
    targets = _asked(host, "targets")["activeTargets"]
    return Counter(target["labels"]["job"] for target in targets if target["health"] == "up")


class Watched(NamedTuple):
    """What a real Prometheus has seen of a training and a classification on a real cluster."""

    prometheus: Prometheus
    runs: Path
    began: float
    ended: float


@pytest.fixture(scope="module")
def watched(owner: User, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    need(shutil.which("prometheus"), "prometheus is not installed")
    folder = tmp_path_factory.mktemp("watched")
    runs, began = folder / "runs", time.time()
    _write_ill_runs(runs)
    exporter = owner.start("exporter", "--runs", runs, "--port", 0, "--address", owner.node.jobs)
    assert exporter.stdout
    address = exporter.stdout.readline().split("/")[2]
    ray = Path(owner.node.folder) / "ray"
    seen = watch.start(folder / "watch", exporter=address, ray_folder=ray, port=_free_port(), interval="2s")
    try:
        recipe = Recipe.model_validate(
            {
                "name": TRAINED,
                "shards": str(shards),
                "runs": str(runs),
                "model": {"name": "cnn"},
                "epochs": 30,
                "batch_size": 16,
                "checkpoint": {"every_steps": 100},
            }
        )
        _must(owner, "submit", "train", write_recipe(recipe, folder), "--follow")
        archive, out = _many(shards / "train", folder / "archive"), runs / CLASSIFIED
        settings = ["tiles_per_chunk=10", "max_error_share=0.5"]
        _must(owner, "submit", "classify", f"{recipe.run}/bundle", archive, "--out", out, *settings, "--follow")
        time.sleep(max(5.0, began + 80 - time.time()))  # alerts wait a minute before they fire
        yield Watched(Prometheus(seen.address), runs, began, time.time())
    finally:
        for process in (seen.process, exporter):
            process.terminate()
            process.wait()


def _must(owner: User, *arguments: object) -> None:
    process = owner.start(*arguments)
    out, err = process.communicate()
    assert process.returncode == 0, out + err


def _many(shards: Path, archive: Path) -> Path:
    """Enough tars that their classification lasts for several looks of Prometheus."""
    archive.mkdir()
    for number in range(40):
        for shard in shards.glob("*.tar"):
            shutil.copy(shard, archive / f"{number}-{shard.name}")
    return archive


def _write_ill_runs(folder: Path) -> None:
    """Runs that are not well, as they leave word of themselves; what they have is what the alerts must see."""
    now = time.time()
    StatusWriter(folder / "ill-failed", "train").finish("failed", "as if")
    StatusWriter(folder / "ill-loss", "train", loss=float("nan")).finish("failed", "as if")
    StatusWriter(folder / "ill-tiles", "classify", planned_tiles=2000, done_tiles=1000, failed_by_stage={"read": 400})
    stalled = Status(kind="classify", started=now - 3000, updated=now - 2000, progressed=now - 2000, planned_tiles=9)
    (folder / "ill-stalled").mkdir()
    (folder / "ill-stalled" / "status.json").write_text(stalled.model_dump_json())


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.ray
@pytest.mark.process
@pytest.mark.timeout(600)
@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_every_query_of_the_dashboard_finds_what_it_shows(watched: Watched, panel: dict[str, Any]) -> None:
    for query in queries(panel, run=f"{TRAINED}|{CLASSIFIED}"):
        found = watched.prometheus.between(query.expr, watched.began, watched.ended, 2)
        if query.name not in MAY_BE_EMPTY:
            assert found, f"{query.name}: {query.expr}"
            assert any(value == value for one in found for value in one.values), f"{query.name}: only NaN"
        for label in re.findall(r"\{\{(\w+)\}\}", query.legend):
            assert all(label in one.labels for one in found), f"{query.name}: no label {label}"


@pytest.mark.ray
@pytest.mark.process
@pytest.mark.parametrize("rule", RECORDS + ALERTS, ids=lambda rule: rule.get("alert") or rule["record"])
def test_every_rule_is_evaluated_on_metrics_that_are_there(watched: Watched, rule: dict[str, Any]) -> None:
    name = rule.get("alert") or rule["record"]
    [state] = [
        one for group in watched.prometheus.get("rules")["groups"] for one in group["rules"] if one["name"] == name
    ]
    assert state["health"] == "ok", state.get("lastError")
    for metric in METRIC.findall(rule["expr"]):
        assert watched.prometheus.between(metric, watched.began, watched.ended, 2), metric


@pytest.mark.ray
@pytest.mark.process
def test_alerts_of_what_is_ill_fire_and_no_others(watched: Watched) -> None:
    fired = watched.prometheus.between(
        'ALERTS{alertstate="firing", alertname!~".*Node.*"}', watched.began, watched.ended, 2
    )
    assert {(one.labels["alertname"], one.labels.get("run")) for one in fired} == {
        ("TilefleetRunFailed", "ill-failed"),
        ("TilefleetRunFailed", "ill-loss"),
        ("TilefleetLossNotFinite", "ill-loss"),
        ("TilefleetBadTiles", "ill-tiles"),
        ("TilefleetRunStalled", "ill-stalled"),
    }


@pytest.mark.ray
@pytest.mark.process
def test_figures_are_those_of_the_runs(watched: Watched) -> None:
    last = watched.prometheus.at(f'tilefleet_tiles_done_total{{run="{CLASSIFIED}"}}', watched.ended)
    status = json.loads((watched.runs / CLASSIFIED / "status.json").read_text())
    assert [one.values for one in last] == [[status["done_tiles"]]]
    states = watched.prometheus.at("tilefleet_run_state == 1", watched.ended)
    assert {(one.labels["run"], one.labels["state"]) for one in states} >= {(TRAINED, "done"), (CLASSIFIED, "done")}


@pytest.mark.ray
@pytest.mark.process
def test_prometheus_reaches_all_that_it_is_told_of(watched: Watched) -> None:
    targets = watched.prometheus.between("up", watched.began, watched.ended, 2)
    assert {target.labels["job"] for target in targets} == {"tilefleet", "ray"}
    assert all(max(target.values) == 1 for target in targets)
