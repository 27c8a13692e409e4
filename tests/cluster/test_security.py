"""What listens, where, and what it answers to those without the token: a scan of a cluster that is at work."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.conftest import User
from tests.processes import descendants

OPEN_PATHS = {
    "/": "the page of Ray's dashboard, which then asks for the token",
    "/api/authentication_mode": "that a token is asked for",
    "/api/gcs_healthz": "that the head is well",
}
"""What Ray's http servers answer to anybody."""

CLOSED_PATHS = [
    *[
        ("GET", path)
        for path in ("/api/jobs/", "/api/version", "/nodes?view=summary", "/api/v0/nodes", "/api/v0/tasks")
    ],
    *[("GET", path) for path in ("/api/v0/logs", "/api/v0/actors", "/api/cluster_status", "/api/prometheus/sd")],
    *[
        ("GET", path)
        for path in ("/api/jobs/x/logs", "/api/packages/gcs/x.zip", "/worker/traceback", "/memory_profile")
    ],
    *[("GET", path) for path in ("/logs", "/api/v0/logs/file", "/log_proxy", "/api/serve/applications/")],
    *[("POST", path) for path in ("/api/jobs/", "/api/jobs/x/stop", "/api/job_agent/jobs/")],
    *[("PUT", path) for path in ("/api/packages/gcs/x.zip", "/api/serve/applications/")],
    ("DELETE", "/api/jobs/x"),
    *[("POST", path) for path in ("/get_or_create_runtime_env", "/delete_runtime_env_if_possible")],
    ("POST", "/get_runtime_envs_info"),
]

CALLS = [
    "/ray.rpc.InternalKVGcsService/InternalKVGet",
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.JobInfoGcsService/GetAllJobInfo",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.NodeManagerService/RequestWorkerLease",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.CoreWorkerService/PushTask",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.ReporterService/GetTraceback",
    "/ray.rpc.ReporterService/ReportMetrics",
    "/ray.rpc.LogService/ListLogs",
    "/ray.rpc.events.EventAggregatorService/AddEvents",
    "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
]
"""Of each of Ray's gRPC services, what reads most or runs code."""


def listening(pids: set[int]) -> dict[tuple[str, int], int]:
    """Address and port of every TCP socket that one of the processes listens on -> process."""
    owners = {}
    for pid in pids:
        with suppress(OSError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    owners[str(entry.readlink())] = pid
    found = {}
    for name, size in (("tcp", 8), ("tcp6", 32)):
        for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in owners:
                place, _, port = local.partition(":")
                words = [bytes.fromhex(place[i : i + 8])[::-1] for i in range(0, size, 8)]
                family = socket.AF_INET if size == 8 else socket.AF_INET6
                host = socket.inet_ntop(family, b"".join(words)).removeprefix("::ffff:")
                found[host, int(port, 16)] = owners[f"socket:[{inode}]"]
    return found


def request(host: str, port: int, method: str, path: str, token: str | None = None) -> int | None:
    """The status with which an http server answers; None from what is none."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request(method, path, headers={"Authorization": f"Bearer {token}"} if token else {})
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def grpc_answers(host: str, port: int, token: str | None = None) -> dict[str, str]:
    """The code with which a gRPC server answers each of ``CALLS``."""
    import grpc

    codes = {}
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        for call in CALLS:
            try:
                channel.unary_unary(call)(b"", timeout=5, metadata=metadata)
                codes[call] = "OK"
            except grpc.RpcError as error:
                codes[call] = error.code().name
    return codes


@pytest.mark.ray
def test_every_port_is_on_loopback_and_gives_nothing_without_the_token(owner: User, tmp_path: Path) -> None:
    names = descendants(owner.node.process)
    table = []
    ports = listening(set(names))
    assert len(ports) > 8
    for (host, port), pid in sorted(ports.items()):
        assert host in ("127.0.0.1", "::1"), (host, port, names[pid])
        if request(host, port, "GET", "/api/healthz") is not None:
            answers = {(method, path): request(host, port, method, path) for method, path in CLOSED_PATHS}
            wrong = {(method, path): request(host, port, method, path, "wrong") for method, path in CLOSED_PATHS}
            metrics = request(host, port, "GET", "/metrics") == 200 and answers["GET", "/api/jobs/"] == 200
            kind = "metrics" if metrics else "http"
            if not metrics:
                assert set(answers.values()) <= {401, 403, 404, 405}, (names[pid], answers)
                assert set(wrong.values()) <= {403, 404, 405}, (names[pid], wrong)
                assert 401 in answers.values(), (names[pid], answers)
        else:
            kind = "grpc"
            for token in (None, "wrong"):
                codes = grpc_answers(host, port, token)
                assert set(codes.values()) <= {"UNAUTHENTICATED", "UNIMPLEMENTED"}, (names[pid], codes)
                assert "UNAUTHENTICATED" in codes.values(), (names[pid], codes)
            known = grpc_answers(host, port, owner.token)
            assert "UNAUTHENTICATED" not in known.values(), (names[pid], known)
        table.append((host, port, names[pid][:60], kind))
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
