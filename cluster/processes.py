"""Processes by id and the moment that they began, so that an id which another process has by now is never mistaken."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path


def beginning(pid: int) -> int | None:
    """When a process began, in clock ticks; None where there is none."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else int(fields[18])


def below(roots: dict[int, int]) -> dict[int, int]:
    """Those of ``roots`` that still run, and all below them, each with the moment that it began."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, todo = {}, [root for root, began in roots.items() if beginning(root) == began]
    while todo:
        pid = todo.pop()
        if (began := beginning(pid)) is not None:
            found[pid] = began
        todo += children.get(pid, [])
    return found


def are_left(processes: dict[int, int]) -> bool:
    """Whether any of ``processes`` still runs."""
    return any(beginning(pid) == began for pid, began in processes.items())


def send(processes: dict[int, int], number: signal.Signals) -> None:
    """Send a signal to those of ``processes`` that still run."""
    for pid, began in processes.items():
        if beginning(pid) == began:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
