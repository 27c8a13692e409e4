"""Seconds from the command to the first steps of a training, and which process took how much of them.

    python -m tests.benchmarks.first_step data/eurosat [key=value ...]

trains ``configs/bench.yaml`` twice: with ``tilefleet train``, which starts Ray, and with the loop alone under
``python -m training.loop``. The second is what is this project's own in the first. Processes are watched in ``/proc``
(Linux), so CPU seconds are those of the kernel and hold on a busy machine too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.records import read_status
from tests.processes import descendants

ROOT = Path(__file__).parents[2]
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Process:
    """One process of a command: its name, and seconds since the command began."""

    name: str
    started: float
    cpu: float


def main(shards: str, *overrides: str) -> None:
    """Measure and print both."""
    for title, command in {
        "tilefleet train (Ray)": [sys.executable, str(ROOT / "tilefleet.py"), "train"],
        "python -m training.loop (the loop alone)": [sys.executable, "-m", "training.loop"],
    }.items():
        workers = [] if "train" in command else ["workers=1"]
        with tempfile.TemporaryDirectory() as folder:
            recipe = [str(ROOT / "configs" / "bench.yaml"), f"shards={shards}", f"runs={folder}", *overrides, *workers]
            seconds, processes = _watch([*command, *recipe], f"{folder}/bench")
        cpu = sum(process.cpu for process in processes)
        print(f"{title}: {seconds:.1f} s to the first steps, {cpu:.1f} CPU seconds in {len(processes)} processes")
        for process in sorted(processes, key=lambda process: process.started):
            if process.cpu >= 0.2:
                print(f"  from {process.started:5.1f} s  {process.cpu:5.1f} CPU s  {process.name}")


def _watch(command: list[str], run: str) -> tuple[float, list[Process]]:
    """Run ``command`` until ``run`` has made steps, then end it."""
    began = time.time()
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found: dict[int, Process] = {}
    try:
        while running.poll() is None:
            found |= alive(began)
            status = read_status(run)
            if status and status.done_tiles:
                return time.time() - began, list(found.values())
            time.sleep(0.1)
        raise SystemExit(f"{' '.join(command)}: ended with {running.returncode} before its first step")
    finally:
        running.terminate()
        running.wait()


def alive(began: float) -> dict[int, Process]:
    """The processes of the command that are alive, which are all that this one has started."""
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    processes = {}
    for pid, name in descendants(os.getpid()).items():
        with suppress(OSError):  # it has ended meanwhile
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            started = time.time() - uptime + int(fields[19]) / TICKS - began
            processes[pid] = Process(_short(name), started, (int(fields[11]) + int(fields[12])) / TICKS)
    return processes


def _short(command: str) -> str:
    """A command line without paths, its first words."""
    return " ".join(word.rsplit("/", 1)[-1] for word in command.split()[:4])[:60]


if __name__ == "__main__":
    main(*sys.argv[1:])
