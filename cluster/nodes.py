"""The node of a Ray cluster on this machine: started, remembered, ended.

``tilefleet cluster up`` starts a cluster of this machine on loopback, the head of one on machines of one's own
(``--host``) or a worker of that (``--join``); always with a token. What ``tilefleet cluster down`` needs is written to
``~/.config/tilefleet/cluster-HOST.json``, and nothing else is ended: not by name, as ``ray stop`` does, but by process
id and the moment that the process began.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import platform
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from cluster import token
from cluster.processes import are_left, beginning, below, send
from cluster.session import LOOPBACK, SETTINGS, refuse_old
from configs.errors import TilefleetError, UsageError

START_SECONDS = 180.0
"""How long a node may take to start; on a busy machine of two cores it takes some 20."""

END_SECONDS = 30.0
"""How long the processes of a node may take to end by themselves."""

NOTICE_SECONDS = 20
"""How long before its end a worker tells the runs on it, which save a checkpoint; Ray waits for it to be idle."""

KILLED_SECONDS = 5.0
"""How long the system may take to end what is killed."""

STOP_SECONDS = 120
"""How long a job that is stopped may take to save what it has."""

GPUS = ("nvidia[0-9]*", "kfd", "dxg")
"""Devices of a machine with a GPU: NVIDIA's, AMD's, those of Linux inside Windows."""

STARTED = "Ray runtime started."
"""What ``ray start`` prints once its node is part of the cluster."""

_SIOCGIFADDR = 0x8915  # of linux/sockios.h: the address of a network interface


class Node(BaseModel):
    """What was started on this machine."""

    role: Literal["head", "worker"]
    host: str
    """Its own address."""
    address: str
    """HOST:PORT of the head, for drivers and for the machines that join."""
    jobs: str | None
    """URL of the head's job server; None on a worker."""
    process: int
    began: int
    """When the process began, in clock ticks since the machine did."""
    folder: str
    """Sockets and logs; open to its owner alone."""
    beside: dict[int, int] = {}
    """Processes that go with the node, as Prometheus, each with the moment that it began."""

    @property
    def log(self) -> Path:
        """What the node printed as it started."""
        return Path(self.folder) / "start.log"

    @property
    def is_up(self) -> bool:
        """Whether that very process still runs."""
        return beginning(self.process) == self.began


def current() -> Node | None:
    """The node that was last started on this machine and not ended; it may have died since."""
    file = _file()
    return Node.model_validate_json(file.read_bytes()) if file.exists() else None


def up(
    host: str | None = None,
    join: str | None = None,
    port: int = 8265,
    cpus: int | None = None,
    gpus: int | None = None,
) -> Node:
    """Start a node, wait until it is part of its cluster, and remember it.

    Without ``host`` and ``join`` nothing listens beyond loopback. ``host`` (ADDRESS or ADDRESS:PORT of this machine)
    starts the head of a cluster for other machines, ``join`` (HOST:PORT of the head) a worker. The job server listens
    on ``port`` of loopback (0: any that is free) in any case. Raises :class:`UsageError` where that cannot be, and
    :class:`TilefleetError` where the node does not start.
    """
    refuse_old(version("ray"))
    if (node := current()) and node.is_up:
        raise UsageError(f"a node of {node.address} runs on this machine already; end it with: tilefleet cluster down")
    if gpus and not any(found for pattern in GPUS for found in Path("/dev").glob(pattern)):
        raise UsageError(f"--gpus {gpus}: this machine has no GPU; without it, Ray offers those that there are")
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        raise UsageError("RAY_AUTH_MODE: whoever reaches a cluster without a token can run code on it; unset it")
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", *LOOPBACK)}
    if join:
        if token.read_token() is None:
            raise UsageError(f"--join {join}: needs the token of that cluster; {token.HOW}")
        address, jobs, own = join, None, _towards(join)
        options = [f"--address={join}"]
    else:
        token.make_token()
        own, number = _listening(host)
        address, jobs = f"{own}:{number}", f"http://127.0.0.1:{_port('127.0.0.1', port)}"
        options = ["--head", f"--port={number}", "--include-dashboard=true"]
        options += ["--dashboard-host=127.0.0.1", f"--dashboard-port={jobs.rpartition(':')[2]}"]
        environment |= {name: str(_port(own, 0)) for name in ("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT")}
    for name, value in (("--num-cpus", cpus), ("--num-gpus", gpus)):
        options += [] if value is None else [f"{name}={value}"]
    environment |= token.environment() | (LOOPBACK if _is_loopback(own) else _interface(own))
    folder = tempfile.mkdtemp(prefix="tilefleet-")  # of mode 0700, as Ray opens its own folders to everybody
    role: Literal["head", "worker"] = "worker" if join else "head"
    node = Node(role=role, host=own, address=address, jobs=jobs, process=0, began=0, folder=folder)
    return _start(options, environment, node)


def down() -> Node:
    """End the node of this machine, all its processes with it, and forget it.

    Its folder goes too, unless the node had died before: then the logs in it say why.
    """
    node = current()
    if node is None:
        raise UsageError("no cluster was started on this machine with: tilefleet cluster up")
    was_up, roots = node.is_up, {node.process: node.began} | node.beside
    processes = below(roots)
    if processes:
        send(roots, signal.SIGTERM)
        end = time.monotonic() + END_SECONDS
        while time.monotonic() < end and are_left(processes):
            time.sleep(0.1)
            processes |= below(roots)  # what it had only just started
        send(processes, signal.SIGKILL)
        while time.monotonic() < end + KILLED_SECONDS and are_left(processes):
            time.sleep(0.1)
    if was_up:
        shutil.rmtree(node.folder, ignore_errors=True)
    _file().unlink()
    return node


def attach(node: Node, process: int) -> Node:
    """Let a process end with ``node``."""
    node = node.model_copy(update={"beside": node.beside | {process: beginning(process) or 0}})
    _remember(node)
    return node


def without_client(parameters: Any, head: bool) -> None:
    """Start no server for Ray Client, which nothing here uses and which listens; called by ``ray start``."""
    parameters.ray_client_server_port = None


def labels() -> dict[str, str]:
    """Versions of what runs on this machine, as labels of its node."""
    ours = {"ray": version("ray"), "python": platform.python_version()}
    with suppress(PackageNotFoundError):  # as where it was only unpacked
        ours["tilefleet"] = version("tilefleet")
    return ours


def _start(options: list[str], environment: dict[str, str], node: Node) -> Node:
    program = str(Path(sys.executable).parent)
    environment |= {
        "PATH": f"{program}:{environment.get('PATH', os.defpath)}",  # a job's `python` is the one that has Ray
        "PYTHONPATH": f"{Path(__file__).parent.parent}:{environment.get('PYTHONPATH', '')}".rstrip(":"),
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS),
        # A head, whose jobs are stopped first, is never idle where an actor outlived its job, as one of Ray Data does.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(NOTICE_SECONDS if node.role == "worker" else 0),
        "RAY_START_HOOK": f"{without_client.__module__}.{without_client.__name__}",
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *options]
    command += [f"--node-ip-address={node.host}", f"--temp-dir={node.folder}/ray"]
    command += ["--labels=" + ",".join(f"tilefleet.{name}={value}" for name, value in labels().items())]
    command += ["--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"]
    with node.log.open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=node.folder,
            env=SETTINGS | environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C in the terminal is not meant for it
        )
    node = node.model_copy(update={"process": process.pid, "began": beginning(process.pid) or 0})
    _remember(node)
    end = time.monotonic() + START_SECONDS
    while STARTED not in node.log.read_text():
        if process.poll() is not None or time.monotonic() > end:
            reason = _reason(node.log)
            down()
            shutil.rmtree(node.folder, ignore_errors=True)
            if "AuthenticationError" in reason:
                raise UsageError(f"{node.address}: the token is not that cluster's; {token.HOW}")
            raise TilefleetError(f"{node.address}: the node did not start: {reason}")
        time.sleep(0.2)
    return node


def _reason(log: Path) -> str:
    lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "Exception" in line]
    return (errors or lines or ["it printed nothing"])[-1]


def _remember(node: Node) -> None:
    with os.fdopen(os.open(_file(), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(node.model_dump_json(indent=1))


def _file() -> Path:
    return token.folder() / f"cluster-{platform.node()}.json"  # homes may be shared


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback


def _listening(place: str | None) -> tuple[str, int]:
    """Address and port of the head from ``--host``: Ray's own port for other machines, any that is free on loopback."""
    host, _, number = (place or "127.0.0.1").partition(":")
    try:
        if ipaddress.ip_address(host).is_unspecified:
            raise UsageError(f"--host {host}: name the address by which the other machines reach this one")
        return host, _port(host, int(number or (0 if _is_loopback(host) else 6379)))
    except ValueError as error:
        raise UsageError(f"--host {place}: give an address of this machine, as 10.0.0.1 or 10.0.0.1:6379") from error


def _port(host: str, number: int) -> int:
    """``number``, or any free port for 0; raises where this machine cannot listen there."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((host, number))
        except OSError as error:
            raise UsageError(f"{host}:{number}: cannot listen there ({error.strerror}); choose another") from error
        return int(server.getsockname()[1])


def _towards(address: str) -> str:
    """This machine's own address on the way to ``address``, HOST:PORT."""
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit():
        raise UsageError(f"--join {address}: give the address that the head showed, as 10.0.0.1:6379")
    try:
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            return str(connection.getsockname()[0])
    except OSError as error:
        raise UsageError(f"--join {address}: no head answers there ({error}); is it up?") from error


def _interface(host: str) -> dict[str, str]:
    """Tells torch's gloo which network joins the machines; it would go by the machine's name, often 127.0.1.1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                found = fcntl.ioctl(asker.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == host:
                    return {"GLOO_SOCKET_IFNAME": name}
    return {}
