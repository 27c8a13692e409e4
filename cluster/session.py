"""Start or join a Ray cluster, authenticated.

A job that finds no address starts Ray inside this machine, on loopback, with a token; with ``RAY_ADDRESS`` it joins
that cluster. One session serves a whole command: starting Ray takes many seconds.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def session(cpus: int | None = None) -> Iterator[None]:
    """A connected Ray for the time of the block; one that is already connected is used and left as it is.

    ``cpus`` bounds the CPUs of a cluster that is started here; by default all of the machine's.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # Workers that wait for a host which has just gone are given up sooner than after a minute, and asked for anew among
    # the hosts that are left; where all are needed, Ray asks again and again until the host is back.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else its notes to its own authors land on the terminal
    import ray

    if ray.is_initialized():
        yield
        return
    with _native_stderr_closed():
        ray.init(
            address=os.environ.get("RAY_ADDRESS"),
            num_cpus=None if os.environ.get("RAY_ADDRESS") else cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    try:
        yield
    finally:
        ray.shutdown()


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
