"""Random kills at random moments of a classification on two hosts of this machine: what they cost in tiles and bits.

    python -m tests.benchmarks.kills [--kills 100] [--seed 0] [--tiles 6000] [--kinds driver,worker,...]

The same ``tilefleet classify`` is started again whenever it ended before its work was done, and a new run when one is
finished, until there were as many kills as asked for. The last line is one JSON object: kills by kind, finished runs,
and over all of them tiles without a row, with two, and with another row than in a run that nothing disturbed. Needs
root and Debian's iproute2, see ``tests/hosts.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from inference.ledger import SUCCESS
from inference.sink import read_predictions
from tests.archives import jpeg, save_model, write_tar
from tests.hosts import Host, two_hosts
from tests.processes import descendants
from tests.runs import ROOT

KINDS = ("driver", "worker", "raylet", "gcs", "host", "link", "disk")
"""What is killed: the command; a worker process; Ray's process of a host, or its head's; a host; the link between the
hosts, for some seconds; the last room on the disk, for some seconds."""

ARCHIVES = 4
PATIENCE = 300.0
"""Seconds after which a command that does nothing is taken for hung."""

Rows = dict[tuple[str, str], list[dict[str, Any]]]


class Field:
    """Two hosts, a disk that both see, archives on it, and the command that classifies them."""

    def __init__(self, hosts: tuple[Host, Host], disk: Path, tiles: int) -> None:
        self.hosts = hosts
        self.disk = disk
        self.model = save_model(disk / "bundle")
        self.archives = disk / "archives"
        self.archives.mkdir()
        share = tiles // ARCHIVES
        for archive in range(ARCHIVES):
            numbers = range(archive * share, (archive + 1) * share)
            files = [(f"t/{n}.jpg", jpeg(n % 100) if n % 97 else b"no image") for n in numbers]
            write_tar(self.archives / f"{archive}.tar", files)

    def start(self, out: Path) -> subprocess.Popen[bytes]:
        """The command on the head, in a session of its own."""
        line = [sys.executable, str(ROOT / "tilefleet.py"), "classify", self.model, str(self.archives)]
        line += ["--out", str(out), "tiles_per_chunk=20", "batch_size=4", "engine=torch"]
        with Path(f"{out}.log").open("ab") as log:
            return self.hosts[0].start(line, log)

    def reboot(self, *, head: bool) -> None:
        """Switch the second host, or both, off and on again."""
        chosen = self.hosts if head else self.hosts[1:]
        for host in reversed(chosen):
            host.lose()
        for host in chosen:
            host.boot()

    def processes(self, host: Host, name: str) -> list[int]:
        """Those on ``host`` whose program or title has ``name`` in it."""
        assert host.machine
        return [pid for pid, line in descendants(host.machine.pid).items() if name in line.split(" --")[0]]

    def room(self, size: str) -> None:
        """Make the disk as large as ``size``; nothing happens where more has just been written."""
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.disk)], check=False, capture_output=True)


def kill(field: Field, kind: str, command: subprocess.Popen[bytes], chance: random.Random) -> bool:
    """Do it, and afterwards what whoever runs the hosts would do; False where there was nothing to kill."""
    head, other = field.hosts
    if kind == "driver":
        end(command)
    elif kind == "worker":
        found = [pid for host in field.hosts for pid in field.processes(host, "ChunkClassifier")]
        if not found:
            return False
        os.kill(chance.choice(found), signal.SIGKILL)
    elif kind in ("raylet", "gcs"):
        host = chance.choice(field.hosts) if kind == "raylet" else head
        for pid in field.processes(host, "/raylet/raylet" if kind == "raylet" else "/gcs/gcs_server"):
            os.kill(pid, signal.SIGKILL)
        time.sleep(chance.uniform(0, 5))
        field.reboot(head=host is head)
    elif kind == "host":
        other.lose()
        time.sleep(chance.uniform(0, 10))
        other.boot()
    elif kind == "link":
        other.link("down")
        time.sleep(chance.uniform(0, 15))
        other.link("up")
        time.sleep(3)
        if not field.processes(other, "/raylet/raylet"):  # it was given up, and so ended itself
            field.reboot(head=False)
    elif kind == "disk":
        disk = os.statvfs(field.disk)
        field.room(str((disk.f_blocks - disk.f_bfree) * disk.f_frsize))
        time.sleep(chance.uniform(0, 6))
        field.room("1g")
    return True


def end(command: subprocess.Popen[bytes]) -> None:
    """Kill a command on a host: what runs it there, and so the last of it."""
    for pid in [*descendants(command.pid), command.pid]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    command.wait()


def run(
    hosts: tuple[Host, Host], disk: Path, kills: int, seed: int, tiles: int, kinds: tuple[str, ...] = KINDS
) -> dict[str, Any]:
    """Kill ``kills`` times; what the module's JSON line says."""
    field, chance = Field(hosts, disk, tiles), random.Random(seed)
    began = time.monotonic()
    finish(field.start(disk / "calm"), disk / "calm")
    span = time.monotonic() - began
    calm = rows(disk / "calm")
    done: Counter[str] = Counter()
    result = Counter({"runs": 0, "commands": 0, "lost": 0, "double": 0, "different": 0})
    deck: list[str] = []
    while done.total() < kills:
        out = disk / f"out-{result['runs']}"
        while not (out / SUCCESS).exists():
            command = field.start(out)
            result["commands"] += 1
            moment = chance.uniform(0, span)
            while done.total() < kills and waited(command, moment):
                deck = deck or chance.sample(kinds, len(kinds))  # each kind as often as the others
                kind = deck.pop()
                if kill(field, kind, command, chance):
                    done[kind] += 1
                    print(f"{time.monotonic() - began:7.1f} s  {kind}", flush=True)
                moment = chance.uniform(0, span)
            finish(command, out)
        result["runs"] += 1
        result += compared(calm, rows(out))
    zero = {"runs": 0, "commands": 0, "lost": 0, "double": 0, "different": 0}
    return {"kills": dict(done), **(zero | result), "tiles": tiles, "seconds": round(time.monotonic() - began)}


def waited(command: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether ``command`` still ran after so many seconds."""
    try:
        command.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def finish(command: subprocess.Popen[bytes], out: Path) -> None:
    """Wait for the end of a command, whatever it is; one that hangs is an error."""
    try:
        command.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        end(command)
        raise SystemExit(f"{out}: hangs; " + Path(f"{out}.log").read_text()[-2000:]) from None


def rows(out: Path) -> Rows:
    """The rows of each tile."""
    found: Rows = {}
    for row in read_predictions(str(out)).to_pylist():
        found.setdefault((row["archive"], row["tile_id"]), []).append(row)
    return found


def compared(calm: Rows, disturbed: Rows) -> Counter[str]:
    """Tiles that are lost, that are there twice, and whose rows are not the same to the bit."""
    return Counter(
        lost=len(calm.keys() - disturbed.keys()),
        double=sum(len(found) > 1 for found in disturbed.values()),
        different=sum(disturbed.get(tile, wanted) != wanted for tile, wanted in calm.items())
        + len(disturbed.keys() - calm.keys()),
    )


@contextmanager
def disk_of_its_own(folder: Path) -> Iterator[Path]:
    """A disk that can be made full without harm to anything else."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def main() -> None:
    """Kill, and print what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiles", type=int, default=6000)
    parser.add_argument("--kinds", default=",".join(KINDS))
    options = parser.parse_args()
    kinds = tuple(options.kinds.split(","))
    with tempfile.TemporaryDirectory() as folder, disk_of_its_own(Path(folder)) as disk, two_hosts() as hosts:
        print(json.dumps(run(hosts, disk, options.kills, options.seed, options.tiles, kinds)))


if __name__ == "__main__":
    main()
