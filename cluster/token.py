"""The token that opens a cluster: where it comes from, and the one file in which we keep it.

Ray's own names come first: ``RAY_AUTH_TOKEN``, then the file that ``RAY_AUTH_TOKEN_PATH`` names. Without them it is
``~/.config/tilefleet/token``, which only its owner may read; last comes Ray's ``~/.ray/auth_token``. Other processes
get it by their environment, as the name of the file: it is never on a command line, in a log or printed.
"""

from __future__ import annotations

import os
import secrets
import shlex
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from configs.errors import UsageError

HOW = "set RAY_AUTH_TOKEN_PATH to a file that holds the head's token, or copy that to ~/.config/tilefleet/token"
"""What to do where the token of a cluster is missing or wrong."""


def folder() -> Path:
    """Where this user's token, and what was started on this machine, is kept; made for its owner alone."""
    path = Path.home() / ".config" / "tilefleet"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def read_token() -> str | None:
    """The token, or None where there is none; raises :class:`UsageError` for a file that is no place for one."""
    if text := os.environ.get("RAY_AUTH_TOKEN"):
        return text.strip()
    path = _file()
    if path is None:
        return None
    try:
        token = path.read_text().strip()
    except OSError as error:
        raise UsageError(f"{path}: the token cannot be read ({error.strerror})") from error
    if not token:
        raise UsageError(f"{path}: no token in it")
    return token


def make_token() -> None:
    """Make a token, 256 bits of chance in a file of mode 0600, unless the environment or that file has one."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH") or _own().exists():
        return
    handle, temporary = tempfile.mkstemp(dir=folder())  # of mode 0600
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):  # another process was quicker
            os.link(temporary, _own())
    finally:
        Path(temporary).unlink()


def environment() -> dict[str, str]:
    """What a process of Ray's needs in its environment to speak with a cluster that asks for the token."""
    found: dict[str, str] = {"RAY_AUTH_MODE": "token"}
    if not os.environ.get("RAY_AUTH_TOKEN") and (path := _file()):
        found["RAY_AUTH_TOKEN_PATH"] = str(path)
    return found


def hand_over() -> str:
    """How another machine, ``MACHINE``, gets the token: a line for the terminal, without the token itself."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "set RAY_AUTH_TOKEN on MACHINE as it is here"
    own = "~/.config/tilefleet/token"
    source = own if _file() == _own() else shlex.quote(str(_file()))
    place = own.removeprefix("~/")
    return f"ssh MACHINE 'umask 077; mkdir -p {place.rpartition('/')[0]}; cat > {place}' < {source}"


def _own() -> Path:
    return folder() / "token"


def _file() -> Path | None:
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return Path(path)
    if _own().exists():
        if stat.S_IMODE(_own().stat().st_mode) & 0o077:
            raise UsageError(f"{_own()}: others may read it; chmod 600 it, or remove it for a new one")
        return _own()
    theirs = Path.home() / ".ray" / "auth_token"
    return theirs if theirs.exists() else None
