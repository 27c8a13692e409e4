"""All state of a training run, saved so that it is whole or not there, and checked before it is used.

``checkpoints/step-00000152/`` holds ``state.pt`` (tensors and plain values, read with ``weights_only=True``) and,
written last,
``checkpoint.json`` with the digest of the state. Learning rate, order, augmentation and dropout are functions of the
step, so the step is all the state that they have. ``owner.json`` beside them says who may write: workers that were
given up, as behind a cut link, may still be alive, and must not write into the run that others have gone on with.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cluster import storage
from configs.errors import TilefleetError

STATE = "state.pt"
MANIFEST = "checkpoint.json"
OWNER = "owner.json"

State = dict[str, Any]
"""``model``, ``optimizer``: their state dicts; ``progress``: where to go on, and other plain values of the loop."""


class Superseded(RuntimeError):
    """A later command, or later workers of the same command, have gone on with the run; nothing is to be written."""


class Claim:
    """The right of one group of workers to write into a run; it ends when a later group takes it.

    ``command`` is what :func:`claim` gave to the command that started the workers; without one, as under
    ``torchrun``, the run is taken from whoever had it. Raises :class:`Superseded`.
    """

    def __init__(self, run: str | Path, command: str | None) -> None:
        if command is not None and not is_current(run, command):
            raise Superseded(f"{run}: another command has taken over this run")
        self.run = run
        self.owner = {"command": command or uuid.uuid4().hex, "workers": uuid.uuid4().hex}
        _write_owner(run, self.owner)

    def check(self) -> None:
        """Raise :class:`Superseded` where others have taken the run."""
        if _owner(self.run) != self.owner:
            raise Superseded(f"{self.run}: other workers have taken over this run")


def claim(run: str | Path) -> str:
    """Take ``run`` for one command; workers of any other command write no more. Returns the command's mark."""
    command = uuid.uuid4().hex
    _write_owner(run, {"command": command, "workers": ""})
    return command


def is_current(run: str | Path, command: str) -> bool:
    """Whether no other command has taken ``run`` since :func:`claim` gave ``command``."""
    return _owner(run)["command"] == command


def save(run: str | Path, state: State, *, step: int, keep: int) -> str:
    """Write the checkpoint of global ``step``, drop those older than the newest ``keep``; returns its location."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    location = storage.join(run, "checkpoints", f"step-{step:08d}")
    manifest = {"step": step, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    storage.write_bytes(storage.join(location, STATE), data)
    storage.write_bytes(storage.join(location, MANIFEST), json.dumps(manifest).encode())
    for old in complete(run)[:-keep]:
        storage.remove_tree(old)
    return location


def complete(run: str | Path) -> list[str]:
    """Locations of the checkpoints that were written to the end, oldest first."""
    files = storage.list_files(storage.join(run, "checkpoints"), recursive=True)
    return sorted(name.rsplit("/", 1)[0] for name in files if name.endswith(f"/{MANIFEST}"))


def newest_whole(run: str | Path, warn: Callable[[str], None]) -> str | None:
    """Location of the newest checkpoint that is whole, or None where the run has none yet.

    A damaged one is named through ``warn`` and the one before is taken; raises :class:`TilefleetError` when all are
    damaged.
    """
    locations = complete(run)
    for location in reversed(locations):
        if _digest(location) == json.loads(storage.read_bytes(storage.join(location, MANIFEST)))["sha256"]:
            return location
        warn(f"{location}: checkpoint is damaged and not used; the one before is taken")
    if locations:
        raise TilefleetError(f"{run}: every checkpoint is damaged; remove the run and train again")
    return None


def load(location: str) -> State:
    """The state saved at ``location``, on the CPU."""
    state: State = torch.load(
        io.BytesIO(storage.read_bytes(storage.join(location, STATE))), map_location="cpu", weights_only=True
    )
    return state


def _owner(run: str | Path) -> dict[str, str]:
    owner: dict[str, str] = json.loads(storage.read_bytes(storage.join(run, OWNER)))
    return owner


def _write_owner(run: str | Path, owner: dict[str, str]) -> None:
    storage.write_bytes(storage.join(run, OWNER), json.dumps(owner).encode())


def _digest(location: str) -> str:
    try:
        return hashlib.sha256(storage.read_bytes(storage.join(location, STATE))).hexdigest()
    except FileNotFoundError:
        return ""
