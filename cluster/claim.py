"""One driver at a time works on a folder: the second is refused, and one that died leaves nothing in the way.

On disk the claim is a lock of the system's, which ends with its process. Object storage has none: there a driver is
alive while its ``status.json`` goes on changing.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster import storage
from cluster.records import STORE_INTERVAL, read_status
from configs.errors import UsageError

LOCK = ".lock"


@contextmanager
def claimed(folder: str) -> Iterator[None]:
    """Hold ``folder``, which exists, for the time of the block; raises :class:`UsageError` where another process does.

    On object storage this takes some seconds where the driver before did not end by itself.
    """
    if storage.is_uri(folder):
        _refuse_moving(folder)
        yield
        return
    with Path(storage.join(folder, LOCK)).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UsageError(f"{folder}: {_holder(file.read())} is at work on it; wait for it or stop it") from error
        file.truncate(0)
        json.dump({"host": platform.node(), "process": os.getpid()}, file)
        file.flush()
        yield


def _holder(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['process']} on {holder['host']}"
    except ValueError:  # it has only just taken the lock
        return "another process"


def _refuse_moving(folder: str) -> None:
    before = read_status(folder)
    if before is None or before.state != "running":
        return
    last = time.monotonic() + 2.5 * STORE_INTERVAL
    while time.monotonic() < last:
        time.sleep(1)
        after = read_status(folder)
        if after and after.updated != before.updated:
            raise UsageError(f"{folder}: another process is at work on it; wait for it or stop it")
