"""What listens, where, and what it answers to those without the token.

``python tests/ports.py HOST PORT...`` looks from wherever it runs, and prints the kind of each port as JSON.
"""

from __future__ import annotations

import http.client
import json
import socket
import sys
from contextlib import suppress
from pathlib import Path

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
    """Address and port of every TCP socket that one of the processes of one host listens on -> process."""
    owners, nets = {}, {}
    for pid in pids:
        with suppress(OSError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    owners[str(entry.readlink())] = pid
            nets = {
                (size, name): Path(f"/proc/{pid}/net/{name}").read_text() for name, size in (("tcp", 8), ("tcp6", 32))
            }
    found = {}
    for (size, _), text in nets.items():
        for line in text.splitlines()[1:]:
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
    """The code with which a gRPC server answers each of ``CALLS``; nothing from what is none."""
    import grpc

    codes = {}
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=5)
        except grpc.FutureTimeoutError:
            return codes
        for call in CALLS:
            try:
                channel.unary_unary(call)(b"", timeout=5, metadata=metadata)
                codes[call] = "OK"
            except grpc.RpcError as error:
                codes[call] = error.code().name
    return codes


def look(host: str, port: int, token: str | None = None) -> str:
    """What listens there: ``http`` or ``grpc``, which must be shut without a token, ``metrics``, or ``other``.

    With ``token`` gRPC must open too; its empty calls then end some of Ray's processes that are at work.
    """
    if request(host, port, "GET", "/api/healthz") is not None:
        answers = {(method, path): request(host, port, method, path) for method, path in CLOSED_PATHS}
        if request(host, port, "GET", "/metrics") == 200 and answers["GET", "/api/jobs/"] == 200:
            return "metrics"
        wrong = {(method, path): request(host, port, method, path, "wrong") for method, path in CLOSED_PATHS}
        assert set(answers.values()) <= {401, 403, 404, 405}, answers
        assert set(wrong.values()) <= {403, 404, 405}, wrong
        assert 401 in answers.values(), answers
        return "http"
    if not grpc_answers(host, port):
        return "other"
    for bad in (None, "wrong"):
        codes = grpc_answers(host, port, bad)
        assert set(codes.values()) <= {"UNAUTHENTICATED", "UNIMPLEMENTED"}, codes
        assert "UNAUTHENTICATED" in codes.values(), codes
    known = grpc_answers(host, port, token) if token else {}
    assert "UNAUTHENTICATED" not in known.values(), known
    return "grpc"


if __name__ == "__main__":
    print(json.dumps({port: look(sys.argv[1], int(port)) for port in sys.argv[2:]}))
