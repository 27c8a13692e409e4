"""A cluster of this machine, as ``tilefleet cluster up`` starts it for a user of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from cluster.nodes import Node
from tests.conftest import need

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
