"""``tilefleet cluster up | status | down`` on this machine."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import nodes, session, token
from cluster.processes import beginning
from configs.errors import UsageError
from tests.cluster.conftest import User
from tests.processes import descendants


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def refused(user: User, *arguments: object, **more: str) -> str:
    """The one line with which a command is refused, before anything was started."""
    code, out, err = user.run(*arguments, **more)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    assert not list(Path(user.home, ".config").rglob("cluster-*"))
    return err


@pytest.mark.parametrize("version", ["2.58.0", "2.9.3", "1.13.0"])
def test_an_old_ray_is_refused(version: str) -> None:
    with pytest.raises(UsageError, match=rf"ray {re.escape(version)}: .*install 2\.59 or newer"):
        session.refuse_old(version)


@pytest.mark.parametrize("version", ["2.59.0", "2.60.0", "2.100.1", "3.0.0.dev0"])
def test_a_ray_that_runs_no_code_from_data_is_taken(version: str) -> None:
    session.refuse_old(version)


def test_a_token_is_made_once_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    token.make_token()
    made = token.read_token()
    token.make_token()
    file = tmp_path / ".config" / "tilefleet" / "token"
    assert made == token.read_token() == file.read_text()
    assert len(made) == 64
    assert mode(file) == 0o600
    assert mode(file.parent) == 0o700
    assert [entry.name for entry in file.parent.iterdir()] == ["token"]
    assert token.environment() == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}
    file.chmod(0o644)
    with pytest.raises(UsageError, match="others may read it"):
        token.read_token()


def test_the_token_of_the_environment_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "mine"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with pytest.raises(UsageError, match="mine: the token cannot be read"):
        token.read_token()
    (tmp_path / "mine").write_text("abc\n")
    assert token.read_token() == "abc"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "def")
    assert token.read_token() == "def"
    token.make_token()
    assert not (tmp_path / ".config" / "tilefleet" / "token").exists()


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "name the address by which"),
        (["--host", "gpu-1"], "as 10.0.0.1"),
        (["--host", "192.0.2.1"], "cannot listen there"),
        (["--host", "127.0.0.1", "--join", "10.0.0.1:6379"], "or joins one"),
        (["--join", "10.0.0.1:6379", "--monitoring"], "goes with the head"),
        (["--join", "10.0.0.1"], "needs the token"),
    ],
)
def test_up_says_why_it_cannot(user: User, arguments: list[str], words: str) -> None:
    assert words in refused(user, "cluster", "up", *arguments)


@pytest.mark.process
@pytest.mark.skipif(bool([*Path("/dev").glob("nvidia[0-9]*")]), reason="this machine has a GPU")
def test_up_offers_no_gpu_that_is_not_there(user: User) -> None:
    assert "--gpus 2: this machine has no GPU" in refused(user, "cluster", "up", "--gpus", 2)


@pytest.mark.process
def test_up_without_a_token_is_refused(user: User) -> None:
    line = refused(user, "cluster", "up", RAY_AUTH_MODE="disabled")
    assert "without a token can run code" in line


@pytest.mark.process
def test_up_says_that_no_head_answers_or_the_port_is_taken(user: User) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert f"127.0.0.1:{port}: cannot listen" in refused(user, "cluster", "up", "--port", port)
    line = refused(user, "cluster", "up", "--join", f"127.0.0.1:{port}", RAY_AUTH_TOKEN="x" * 32)
    assert "no head answers there" in line


@pytest.mark.process
def test_nothing_is_ended_where_nothing_was_started(user: User) -> None:
    assert "no cluster was started" in refused(user, "cluster", "down")
    assert "cluster up" in refused(user, "cluster", "status")


@pytest.mark.ray
def test_a_cluster_is_up_and_shows_itself(owner: User) -> None:
    node = owner.node
    assert node.role == "head"
    assert node.is_up
    assert mode(Path(node.folder)) == 0o700
    [state] = (owner.home / ".config" / "tilefleet").glob("cluster-*.json")
    assert mode(state) == 0o600
    text = owner.must("cluster", "status")
    assert max(map(len, text.splitlines())) <= 80
    assert f"{node.jobs}: 1 of 1 nodes up, 0 jobs running" in text
    assert re.search(r"^127\.0\.0\.1 \(head\) .*\b[\d.]+ of 2 .* GiB$", text, re.MULTILINE)
    assert "differs" not in text


@pytest.mark.ray
def test_one_node_a_machine(owner: User) -> None:
    code, _, err = owner.run("cluster", "up")
    assert code == 2
    assert f"a node of {owner.node.address} runs on this machine already" in err


@pytest.mark.ray
def test_the_token_is_nowhere_but_in_its_file(owner: User) -> None:
    owner.must("jobs", "list")
    shown = list(descendants(owner.node.process).values())
    logs = [path for path in Path(owner.node.folder).rglob("*") if path.is_file() and not path.is_socket()]
    assert len(shown) > 4
    assert len(logs) > 10
    assert not any(owner.token in line for line in shown)
    assert not [path for path in logs if owner.token.encode() in path.read_bytes()]


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process that looks like one of Ray's to whoever ends processes by name."""
    process = subprocess.Popen(["bash", "-c", "exec -a raylet sleep 600"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.ray
def test_down_ends_all_that_up_started_and_nothing_else(user: User, bystander: subprocess.Popen[bytes]) -> None:
    user.must("cluster", "up", "--port", 0, "--cpus", 1)
    node = user.node
    below = descendants(node.process)
    assert any("raylet" in line for line in below.values())
    began = {pid: beginning(pid) for pid in below}
    assert "has ended" in user.must("cluster", "down")
    assert not node.is_up
    assert not {pid: below[pid] for pid in below if began[pid] and beginning(pid) == began[pid]}
    assert not Path(node.folder).exists()
    assert bystander.poll() is None
    assert user.run("cluster", "down")[0] == 2


@pytest.mark.ray
def test_down_waits_for_no_actor_that_outlives_its_job(user: User) -> None:
    user.must("cluster", "up", "--port", 0, "--cpus", 1)
    program = (
        "import ray; ray.init(address='" + user.node.address + "', namespace='x'); "
        "actor = ray.remote(type('Kept', (), {})).options(lifetime='detached', name='kept').remote(); "
        "ray.get(actor.__ray_ready__.remote())"
    )
    more = session.LOOPBACK | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": user.token}
    subprocess.run([sys.executable, "-c", program], env=user.environment(**more), check=True, timeout=120)
    assert any("ray::Kept" in line for line in descendants(user.node.process).values())
    began = time.monotonic()
    user.must("cluster", "down")
    assert time.monotonic() - began < nodes.END_SECONDS - 5


@pytest.mark.process
def test_a_process_that_has_the_id_of_one_that_died_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bystander: subprocess.Popen[bytes]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "node"
    folder.mkdir()
    died = nodes.Node(
        role="worker",
        host="10.0.0.2",
        address="10.0.0.1:6379",
        jobs=None,
        process=bystander.pid,
        began=1,
        folder=str(folder),
    )
    nodes._remember(died)
    assert nodes.down() == died
    assert bystander.poll() is None
    assert folder.exists()  # its logs say why
    assert nodes.current() is None
    os.kill(bystander.pid, signal.SIGTERM)
