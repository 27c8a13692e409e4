"""Start or join a Ray cluster, authenticated.

A job that finds no address starts Ray inside this machine, on loopback, with a token; with ``RAY_ADDRESS`` it joins
that cluster. One session serves a whole command: starting Ray takes many seconds.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster import storage, token
from configs.errors import UsageError

OLDEST = (2, 59)
"""The first release of Ray whose readers run no code from a tar."""

SETTINGS = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    # Workers that wait for a host which has just gone are given up sooner than after a minute, and asked for anew among
    # the hosts that are left; where all are needed, Ray asks again and again until the host is back.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # else its notes to its own authors land on the terminal
}
"""What every process of Ray is told, unless the environment says otherwise."""

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Keeps Ray on 127.0.0.1, its open metrics port too; by default it takes the machine's outward address."""

GROWTH_SECONDS = 900.0
"""How long a machine of the cloud may take to come up."""

PROBE_SECONDS = 60.0
"""How long a node may take to say whether it sees a path."""


@contextmanager
def session(cpus: int | None = None) -> Iterator[None]:
    """A connected Ray for the time of the block; one that is already connected is used and left as it is.

    ``cpus`` bounds the CPUs of a cluster that is started here; by default all of the machine's. Where Ray was started
    or joined here, SIGTERM ends the block as Ctrl-C does.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        token.make_token()
    if not address or address.startswith(("127.", "localhost")):
        _set_defaults(LOOPBACK)
    _set_defaults(SETTINGS)
    _set_defaults(token.environment())
    import ray

    refuse_old(ray.__version__)
    if ray.is_initialized():
        yield
        return
    with _native_stderr_closed():
        ray.init(
            address=address,
            num_cpus=None if address else cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        ray.shutdown()


def refuse_old(version: str) -> None:
    """Raise :class:`UsageError` for a release of Ray that runs code from the data it reads."""
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise UsageError(
            f"ray {version}: runs code from tars that it reads (CVE-2026-57516); install {wanted} or newer"
        )


def require_shared(folder: str, inputs: Sequence[str] = ()) -> None:
    """See that ``folder``, where a run will write, is one and the same on all nodes, and that each has the ``inputs``.

    Raises :class:`UsageError` where a node does not see them. Object storage, and one node alone, need no look.
    """
    import ray

    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    paths = [location for location in inputs if not storage.is_uri(location)]
    if len(nodes) < 2 or (storage.is_uri(folder) and not paths):
        return
    probe = None if storage.is_uri(folder) else storage.join(folder, f".{uuid.uuid4().hex}.tmp")
    if probe:
        storage.write_bytes(probe, b"")
        paths = [probe, *paths]
    try:
        unseen = _unseen(paths, list(nodes))
    finally:
        if probe:
            storage.remove(probe)
            with suppress(OSError):
                Path(folder).rmdir()  # where it holds nothing
    if unseen:
        node, path = unseen
        raise UsageError(
            f"{folder if path == probe else path}: the node {nodes[node]} does not see it; on a cluster of "
            f"{len(nodes)} nodes a path must be object storage or on a disk that all of them share"
        )


@contextmanager
def grown(workers: int) -> Iterator[None]:
    """Have so many where the environment names what the cluster grows by: ``TILEFLEET_AUTOSCALES``, ``GPU`` or ``CPU``.

    Waits for them :data:`GROWTH_SECONDS` at most, and lets them go after the block. Elsewhere it does nothing.
    """
    kind = os.environ.get("TILEFLEET_AUTOSCALES")
    if not kind:
        yield
        return
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[{kind: 1}] * workers)
    try:
        last = time.monotonic() + GROWTH_SECONDS
        while sum(by_host(kind)) < workers and time.monotonic() < last:
            time.sleep(2)
        yield
    finally:
        request_resources(bundles=[])


def available_cpus() -> int:
    """CPUs of the connected cluster."""
    import ray

    return int(ray.cluster_resources().get("CPU", 0))


def by_host(kind: str) -> list[int]:
    """``"CPU"`` or ``"GPU"`` of each host of the connected cluster that is up."""
    import ray

    return [int(node["Resources"].get(kind, 0)) for node in ray.nodes() if node["Alive"]]


def available_gpus() -> int:
    """GPUs of the connected cluster."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def _set_defaults(settings: dict[str, str]) -> None:
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _unseen(paths: list[str], nodes: list[str]) -> tuple[str, str] | None:
    """A node and a path that it does not see; one that has just gone, or does not answer, is left out."""
    import ray
    import ray.exceptions
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(_missing)
    looks = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(paths): node
        for node in nodes
    }
    for answer in ray.wait(list(looks), num_returns=len(looks), timeout=PROBE_SECONDS)[0]:
        with suppress(ray.exceptions.RayError):
            if missing := ray.get(answer):
                return looks[answer], missing[0]
    return None


def _missing(paths: list[str]) -> list[str]:
    return [path for path in paths if not storage.exists(path)]


@contextmanager
def _native_stderr_closed() -> Iterator[None]:
    """Keep what Ray's native part says of its own log settings off the terminal; Python's errors are not touched."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
