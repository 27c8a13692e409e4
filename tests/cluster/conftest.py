"""A cluster of this machine, as ``tilefleet cluster up`` starts it for a user of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from cluster.nodes import Node
from tests.conftest import need
from tests.hosts import Host
from tests.processes import descendants

ROOT = Path(__file__).parent.parent.parent

FOREIGN = (
    *("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"),
    *("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "TILEFLEET_PROGRESS"),
)
"""What the environment may say of some other cluster."""


@dataclass(frozen=True)
class User:
    """Somebody with a home, who types commands into a terminal of 80 columns."""

    home: Path

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in FOREIGN}
        return kept | {"HOME": str(self.home), "COLUMNS": "80"} | more

    def start(self, *arguments: object, **more: str) -> subprocess.Popen[str]:
        """``tilefleet ARGUMENTS``, with ``more`` in its environment."""
        return subprocess.Popen(
            [sys.executable, str(ROOT / "tilefleet.py"), *map(str, arguments)],
            env=self.environment(**more),
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: object, **more: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of ``tilefleet ARGUMENTS``."""
        process = self.start(*arguments, **more)
        try:
            out, err = process.communicate(timeout=300)
        finally:
            process.kill()
        return process.returncode, out, err

    def must(self, *arguments: object, **more: str) -> str:
        """What ``tilefleet ARGUMENTS`` prints; it must succeed."""
        code, out, err = self.run(*arguments, **more)
        assert code == 0, out + err
        return out

    @property
    def node(self) -> Node:
        """What the user has started."""
        [state] = (self.home / ".config" / "tilefleet").glob("cluster-*.json")
        return Node.model_validate_json(state.read_bytes())

    @property
    def token(self) -> str:
        return (self.home / ".config" / "tilefleet" / "token").read_text()


HEALTH = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


class Machine:
    """A host and its user, whose home no other host has."""

    def __init__(self, host: Host, home: Path) -> None:
        self.host, self.home = host, home
        home.mkdir()

    def start(self, *arguments: object, **more: str) -> tuple[subprocess.Popen[bytes], Path]:
        """``tilefleet ARGUMENTS``, with ``more`` in its environment, and the file of all that it prints."""
        command = [sys.executable, str(ROOT / "tilefleet.py"), *map(str, arguments)]
        environment = dict.fromkeys(FOREIGN, "") | HEALTH | {"HOME": str(self.home), "COLUMNS": "80"}
        with tempfile.NamedTemporaryFile(dir=self.home, suffix=".out", delete=False) as log:
            given = [f"{name}={value}" for name, value in more.items()]
            kept = ["env", *[f"--unset={name}" for name in FOREIGN], *given, *command]
            return self.host.start(kept, log, environment), Path(log.name)  # type: ignore[arg-type]

    def run(self, *arguments: object, **more: str) -> tuple[int, str]:
        """Exit code and output of ``tilefleet ARGUMENTS``."""
        process, log = self.start(*arguments, **more)
        return process.wait(timeout=600), log.read_text()

    def must(self, *arguments: object, **more: str) -> str:
        """The output of ``tilefleet ARGUMENTS``, which must succeed."""
        code, text = self.run(*arguments, **more)
        assert code == 0, text
        return text

    def processes(self, words: str) -> list[int]:
        """Processes of the host with ``words`` in their command lines."""
        return [pid for pid, line in descendants(self.host.init).items() if words in line]


def wait_for(happened: Callable[[], Any], seconds: float = 300) -> Any:
    end = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


@pytest.fixture
def user(tmp_path: Path) -> User:
    """A user who has started nothing."""
    return User(tmp_path)


@pytest.fixture(scope="session")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    """A user whose cluster of two CPUs is up."""
    need(find_spec("aiohttp"), "ray[default], whose job server takes jobs")
    user = User(tmp_path_factory.mktemp("home"))
    user.must("cluster", "up", "--port", 0, "--cpus", 2)
    yield user
    user.run("cluster", "down")
