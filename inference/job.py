"""A whole classification in processes of its own, watched from outside: its start, its steady rate, its memory.

The command ``python -m inference.job BUNDLE ARCHIVES OUT CONFIG`` is the driver that :func:`watch_job` starts; it
classifies as ``tilefleet classify`` does, and says when the plan was ready. Processes are watched in ``/proc`` (Linux).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from cluster.records import read_status
from configs.errors import TilefleetError
from inference import sink
from inference.classify import ClassifyConfig, classify
from inference.plan import PLAN, Terms, open_plan
from inference.worker import ChunkClassifier, choose_engine

ROOT = Path(__file__).parent.parent

INTERVAL = 0.2
"""Seconds between two looks at the processes: a look takes about a millisecond."""

_PROCESSES = Path("/proc")


@dataclass(frozen=True)
class Job:
    """What was seen of one classification; seconds are those of the clock on the wall."""

    tiles_per_second: float
    """While all workers are at work: see :func:`steady_rate`."""
    seconds: float
    """From the command to its end."""
    startup: dict[str, float]
    """Where the seconds before the first part file went: ``imports``, ``plan``, ``ray``, ``engine``, ``first_part``.

    Without ``/proc``, or where no engine is chosen, those of ``ray`` are in ``engine``.
    """
    memory: dict[str, float]
    """Most MB (10^6 bytes) resident in the ``driver`` and in the largest ``worker``; empty without ``/proc``."""
    terms: Terms
    """Of the plan: engine and device, and what was measured to choose them."""


def watch_job(bundle: str, archives: str, out: str, config: ClassifyConfig, tiles: int) -> Job:
    """Classify ``archives``, which hold ``tiles`` tiles, into ``out``, a new folder.

    Raises :class:`TilefleetError` where that fails, or gives other than that number of classified tiles.
    """
    began = time.time()
    command = [sys.executable, "-m", "inference.job", bundle, archives, out, config.model_dump_json()]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen = _Processes(process.pid)
    while True:
        try:
            said, errors = process.communicate(timeout=INTERVAL)
            break
        except subprocess.TimeoutExpired:
            seen.look()
    ended = time.time()
    if process.returncode:
        reasons = errors.splitlines() or [f"exit {process.returncode}"]
        raise TilefleetError(f"bench: classify failed: {reasons[-1]}")
    driver = json.loads(said.splitlines()[-1])
    if driver["classified"] != tiles:
        raise TilefleetError(f"bench: classify gave {driver['classified']} classes for {tiles} tiles")
    parts = _parts(out)
    status, plan = read_status(out), open_plan(out)
    assert status
    assert plan
    moments = {
        "imports": status.started,
        "plan": driver["planned"],
        "ray": seen.first_seen.get(choose_engine.__name__),
        "engine": (Path(out) / PLAN).stat().st_mtime,
        "first_part": parts[0][1],
    }
    worker = seen.memory.get(ChunkClassifier.__name__)
    return Job(
        tiles_per_second=steady_rate(parts, status.workers),
        seconds=ended - began,
        startup=phases(began, moments),
        memory={"driver": seen.memory["driver"], "worker": worker} if worker else {},
        terms=plan.terms,
    )


def steady_rate(parts: Sequence[tuple[float, float, int]], workers: int) -> float:
    """Tiles/s while all ``workers`` are at work; ``parts`` are moments in seconds, of begin and end, and tiles.

    The time before the last one has begun and after the first has no more to do is left out, and so is that share of
    the tiles of a part which falls into it. Where fewer ever work at once, it is while that many do.
    """
    changes = sorted([(began, 1) for began, _, _ in parts] + [(ended, -1) for _, ended, _ in parts])
    moments, busy = [moment for moment, _ in changes], list(accumulate(change for _, change in changes))
    wanted = min(workers, max(busy))
    full = [number for number, count in enumerate(busy) if count >= wanted]
    first, last = moments[full[0]], moments[full[-1] + 1]
    tiles = sum(
        count * max(0.0, min(ended, last) - max(began, first)) / (ended - began) for began, ended, count in parts
    )
    return tiles / (last - first)


def phases(began: float, moments: Mapping[str, float | None]) -> dict[str, float]:
    """Seconds of each of some phases in a row that end at ``moments``; one without a moment belongs to the next.

    A phase that ends before the one ahead of it took no time.
    """
    found, last = {}, began
    for name, moment in moments.items():
        if moment is not None:
            found[name], last = max(0.0, moment - last), max(last, moment)
    return found


class _Processes:
    """What is seen of a process and of those that it started, by what Ray calls them while they work."""

    def __init__(self, driver: int) -> None:
        self.first_seen: dict[str, float] = {}
        self.memory: dict[str, float] = {}  # MB, the most of any process of that name
        self._driver = driver
        self._parents: dict[int, int] = {}

    def look(self) -> None:
        """Look once; nothing is seen where there is no ``/proc``."""
        now = time.time()
        entries = _PROCESSES.iterdir() if _PROCESSES.exists() else iter(())
        running = {int(entry.name) for entry in entries if entry.name.isdigit()}
        self._parents = {pid: parent for pid, parent in self._parents.items() if pid in running}
        for pid in sorted(running):
            with suppress(OSError):  # it has ended
                if pid not in self._parents:
                    stat = (_PROCESSES / str(pid) / "stat").read_text()
                    self._parents[pid] = int(stat.rpartition(")")[2].split()[1])
                if self._is_below(pid):
                    self._note(pid, now)

    def _is_below(self, pid: int) -> bool:
        while pid != self._driver and pid in self._parents:
            pid = self._parents[pid]
        return pid == self._driver

    def _note(self, pid: int, now: float) -> None:
        title = (_PROCESSES / str(pid) / "cmdline").read_text(errors="replace")
        named = (name for name in (choose_engine.__name__, ChunkClassifier.__name__) if name in title)
        name = "driver" if pid == self._driver else next(named, None)
        if name:
            pages = int((_PROCESSES / str(pid) / "statm").read_text().split()[1])
            self.first_seen.setdefault(name, now)
            self.memory[name] = max(self.memory.get(name, 0.0), pages * os.sysconf("SC_PAGE_SIZE") / 1e6)


def _parts(out: str) -> list[tuple[float, float, int]]:
    """When the work on each part file of ``out`` began and ended, and its tiles; in the order of their ends."""
    found = []
    for file in (Path(out) / sink.PREDICTIONS).glob("part-*.parquet"):
        summary, ended = sink.read_summary(str(file)), file.stat().st_mtime
        found.append((ended - sum(summary.seconds.values()), ended, summary.tiles))
    return sorted(found, key=lambda part: part[1])


def main(bundle: str, archives: str, out: str, config: str) -> None:
    """Classify, and print when the plan was ready and how many tiles have a class."""
    planned = time.time()

    def note(stage: str, done: int, total: int) -> None:
        nonlocal planned
        if stage == "plan":
            planned = time.time()

    totals = classify(bundle, [archives], out, ClassifyConfig.model_validate_json(config), note)
    print(json.dumps({"planned": planned, "classified": totals.classified}))


if __name__ == "__main__":
    main(*sys.argv[1:])
