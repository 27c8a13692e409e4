"""What listens, where, and what it answers to those without the token: a scan of a cluster that is at work."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import User
from tests.ports import listening, look, request
from tests.processes import descendants

OPEN_PATHS = {
    "/": "the page of Ray's dashboard, which then asks for the token",
    "/api/authentication_mode": "that a token is asked for",
    "/api/gcs_healthz": "that the head is well",
}
"""What Ray's http servers answer to anybody."""


@pytest.mark.ray
def test_every_port_is_on_loopback_and_gives_nothing_without_the_token(owner: User, tmp_path: Path) -> None:
    names = descendants(owner.node.process)
    table = []
    ports = listening(set(names))
    assert len(ports) > 8
    for (host, port), pid in sorted(ports.items()):
        assert host in ("127.0.0.1", "::1"), (host, port, names[pid])
        table.append((host, port, names[pid][:60], look(host, port, owner.token)))
    print(*table, sep="\n")
    assert {kind for *_, kind in table} == {"http", "grpc", "metrics"}


@pytest.mark.ray
def test_no_token_and_a_wrong_one_are_refused_by_every_command(
    owner: User, user: User, bundle: Path, shards: Path
) -> None:
    job = ["--address", owner.node.jobs]
    submit = ["submit", "classify", bundle, shards / "test", "--out", user.home / "out"]
    for arguments in (
        *(
            ["cluster", "status"],
            ["jobs", "list"],
            ["jobs", "stop", "x"],
            ["jobs", "logs", "x"],
            ["jobs", "status", "x"],
        ),
        submit,
    ):
        for environment in ({}, {"RAY_AUTH_TOKEN": "wrong"}):
            code, out, err = user.run(*arguments, *job, **environment)
            assert (code, out) == (2, "")
            assert "the token is missing or not the cluster's" in err
            assert "wrong" not in err


@pytest.mark.ray
def test_a_driver_with_a_wrong_token_cannot_join(owner: User, user: User) -> None:
    program = "import ray; ray.init(address='" + owner.node.address + "'); print('joined')"
    from cluster.session import LOOPBACK

    for token in ("wrong", owner.token):
        more = LOOPBACK | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=user.environment(**more),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert ("joined" in done.stdout) == (token == owner.token), done.stderr[-500:]


@pytest.mark.ray
def test_what_is_open_to_all_is_what_we_say(owner: User) -> None:
    assert owner.node.jobs
    host, _, port = owner.node.jobs.rpartition("/")[2].partition(":")
    for path in OPEN_PATHS:
        assert request(host, int(port), "GET", path) == 200, path
    connection = http.client.HTTPConnection(host, int(port), timeout=5)
    connection.request("GET", "/api/authentication_mode")
    assert json.loads(connection.getresponse().read()) == {"authentication_mode": "token"}
