"""What a person sees while long work runs: one line a stage with done, total, rate and time left, on stderr.

A job of a cluster has no terminal: where ``TILEFLEET_PROGRESS`` says so, every so many seconds a line is printed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import TaskID


class Show(Protocol):
    """How work says how far it is."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """``done`` of ``total`` in ``stage``, of which what follows a comma may change from call to call."""


@contextmanager
def progress_line() -> Iterator[Show]:
    """Shows each stage on a line of its own; quiet where stderr is not a terminal and no lines are asked for."""
    if seconds := float(os.environ.get("TILEFLEET_PROGRESS", "0")):
        yield _Lines(seconds)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.0f}/s" if speed else "")

    stage, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    console = Console(stderr=True)
    with Progress(
        stage,
        BarColumn(16),
        MofNCompleteColumn(),
        Rate(),
        TimeLeft(),
        note,
        console=console,
        disable=not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),  # what goes into a file or a pipe is not the terminal's
    ) as progress:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int, note: str = "") -> None:
            kind = stage.partition(",")[0]
            if kind not in tasks:
                tasks[kind] = progress.add_task(stage, total=total, note=note)
            progress.update(tasks[kind], description=stage, completed=done, total=total, note=note)

        yield show


class _Lines:
    """Prints how far it is at most every ``seconds``, and each time that a stage begins or is done."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.kind = ""
        self.began = self.told = (0.0, 0)  # when, and what was done then

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        now, kind = time.monotonic(), stage.partition(",")[0]
        if kind != self.kind:
            self.kind, self.began, self.told = kind, (now, done), (now - self.seconds, -1)
        if done == self.told[1] or (now - self.told[0] < self.seconds and done < total):
            return
        self.told = (now, done)
        rate = (done - self.began[1]) / max(now - self.began[0], 1e-9)
        speed = f" {rate:,.0f}/s, {max(0, total - done) / rate:,.0f} s left" if rate >= 0.5 else ""
        print(f"{stage}: {done:,} of {total:,}{speed} {note}".rstrip(), file=sys.stderr, flush=True)


def warn(line: str) -> None:
    """Tell of a problem, or of why the work ended, on stderr."""
    print(f"tilefleet: {line}", file=sys.stderr)
