"""A folder has one driver at a time; a dead one leaves nothing in the way of the next."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cluster import claim
from cluster.records import StatusWriter
from configs.errors import UsageError
from tests.runs import ROOT

HOLD = """
import sys, time
from cluster.claim import claimed
with claimed(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_driver_is_refused_by_name_until_the_first_is_dead(tmp_path: Path) -> None:
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert first.stdout
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match=f"process {first.pid} on .* is at work"), claim.claimed(str(tmp_path)):
            pass
    finally:
        first.kill()
        first.wait()
    for _ in range(2):
        with claim.claimed(str(tmp_path)):
            assert f'"process": {os.getpid()}' in (tmp_path / claim.LOCK).read_text()


@pytest.mark.process
def test_on_object_storage_a_driver_is_alive_while_its_status_moves(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "STORE_INTERVAL", 1.0)
    with claim.claimed(bucket):
        status = StatusWriter(bucket, "classify")
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.5):
            status.update(force=True)

    other = threading.Thread(target=work)
    other.start()
    try:
        with pytest.raises(UsageError, match="another process is at work"), claim.claimed(bucket):
            pass
    finally:
        stop.set()
        other.join()
    began = time.monotonic()
    with claim.claimed(bucket):  # it was killed
        assert time.monotonic() - began > 2
    status.finish("done")
    began = time.monotonic()
    with claim.claimed(bucket):
        assert time.monotonic() - began < 1
