"""The wish that a run ends early: a file in its folder, which whoever works on the run looks for."""

from __future__ import annotations

from cluster import storage

_FILE = "stop"


def ask(run: str) -> None:
    """Wish that ``run`` saves what it has and ends."""
    storage.write_bytes(storage.join(run, _FILE), b"")


def is_asked(run: str) -> bool:
    """Whether someone wishes that; on object storage a look costs a request."""
    return storage.exists(storage.join(run, _FILE))


def clear(run: str) -> None:
    """Forget the wish, as a run does that begins or goes on."""
    storage.remove(storage.join(run, _FILE))
