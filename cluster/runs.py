"""The runs below a folder, and what each says of itself: only what changed since the last look is read.

A run is a folder with a ``status.json``, the folder itself or one at most :data:`DEPTH` below it. On object storage a
look costs requests: ended runs there, which may be resumed, are looked at now and then only.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow.fs as pafs

from cluster import storage
from cluster.records import Status, parse_status

DEPTH = 3

LARGEST = 1 << 20
"""Most bytes of a status; a larger file is not read."""

ALL_EVERY = 30
"""Of so many looks at object storage, one takes in ended runs."""

READERS = 16
"""Statuses read at once from object storage: hides its delay."""

Stamp = tuple[int, ...]
"""Of a file: it changes with it, and ends with its size in bytes. Empty where there is something else in its place."""


@dataclass(frozen=True)
class Run:
    """What was found at ``location``; ``status`` is None where it cannot be read."""

    location: str
    stamp: Stamp
    status: Status | None


class RunFolder:
    """The runs at and below ``location``; raises :class:`UsageError` for a URI that cannot be opened."""

    def __init__(self, location: str) -> None:
        self.location = storage.absolute(location.rstrip("/") or location)
        self.is_remote = storage.is_uri(location)
        self.runs: Sequence[Run] = ()
        self.is_readable = True
        """Whether object storage answered the last look; where it did not, ``runs`` are what was known before."""
        self._looks = 0
        self._files = storage.filesystem(self.location)[0]

    def look(self) -> None:
        """Bring ``runs`` up to date; a run that is gone is forgotten."""
        # Times of object storage are whole seconds, which are too long to tell two statuses of a running run apart.
        known = {run.location: run for run in self.runs if _has_ended(run) or not self.is_remote}
        self.is_readable = True
        if not self.is_remote:
            found = [_read(folder, stamp, known.get(folder)) for folder, stamp in _on_disk([self.location])]
            self.runs = [run for run in found if run]
            return
        resting = set(known) if self._looks % ALL_EVERY else set()
        self._looks += 1
        try:
            changing = list(self._in_store(resting))
            with ThreadPoolExecutor(READERS) as pool:
                found = list(pool.map(lambda one: _read(one[0], one[1], known.get(one[0])), changing))
        except OSError:
            self.is_readable = False
            return
        self.runs = [known[folder] for folder in sorted(resting)] + [run for run in found if run]

    def _in_store(self, resting: set[str]) -> Iterator[tuple[str, Stamp]]:
        """Runs and the stamps of their statuses, without those that are ``resting``."""
        scheme = self.location.partition("://")[0]
        level = [self.location.partition("://")[2]]
        for depth in range(DEPTH + 1):
            infos = self._files.get_file_info([storage.join(folder, "status.json") for folder in level])
            others = []
            for folder, info in zip(level, infos, strict=True):
                if info.type == pafs.FileType.File:
                    yield f"{scheme}://{folder}", (info.mtime_ns or 0, info.size)
                else:
                    others.append(folder)
            if depth == DEPTH or not others:
                return
            below = [self._files.get_file_info(pafs.FileSelector(one, allow_not_found=True)) for one in others]
            folders = [info.path for infos in below for info in infos if info.type == pafs.FileType.Directory]
            level = [folder for folder in folders if f"{scheme}://{folder}" not in resting]


def _on_disk(level: Iterable[str], depth: int = 0) -> Iterator[tuple[str, Stamp]]:
    """Runs among the folders ``level`` and below, and the stamps of their statuses; links are not followed."""
    for folder in level:
        try:
            stamp = _stamp(storage.join(folder, "status.json"))
            below = _folders(folder) if stamp is None and depth < DEPTH else []
        except OSError:  # not a folder that may be entered
            yield folder, ()
            continue
        if stamp is not None:
            yield folder, stamp
        yield from _on_disk(below, depth + 1)


def _stamp(file: str) -> Stamp | None:
    try:
        found = os.stat(file)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (found.st_mtime_ns, found.st_ctime_ns, found.st_size) if stat.S_ISREG(found.st_mode) else ()


def _folders(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False) and entry.name[0] != "."]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read(folder: str, stamp: Stamp, before: Run | None) -> Run | None:
    """The run in ``folder``, None where it is gone; it is read where its stamp is not that of ``before``."""
    if before and stamp and before.stamp == stamp:
        return before
    if not stamp or stamp[-1] > LARGEST:
        return Run(folder, stamp, None)
    try:
        return Run(folder, stamp, parse_status(storage.read_bytes(storage.join(folder, "status.json"))))
    except FileNotFoundError:
        return None
    except storage.StoreError:
        raise
    except ValueError:
        return Run(folder, stamp, None)
    except OSError:  # not kept by its stamp, since it may pass
        return Run(folder, (), None)


def _has_ended(run: Run) -> bool:
    return run.status is not None and run.status.state != "running"
