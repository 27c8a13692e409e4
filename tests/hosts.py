"""Two hosts on this machine, each with a network, processes and ``/tmp/ray`` of its own, joined by a cable.

Nothing of them has a name outside: they go with the last of their processes, and those go with the test's process.
They share the file system, as hosts do that mount one. Needs root and Debian's ``iproute2``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "only-for-this-test-0123456789abcdef",
    "RAY_ADDRESS": "10.77.0.1:6379",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # a session of the test's own process may have kept Ray on loopback
    "GLOO_SOCKET_IFNAME": "veth0",  # the machine's name stands for an address that the hosts do not have
    "RAY_health_check_period_ms": "1000",  # a cut link is noticed in some ten seconds instead of a minute
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
"""Of all processes on the hosts."""


def are_possible() -> bool:
    """Whether this machine lets us make hosts."""
    able = os.geteuid() == 0 and all(map(shutil.which, ("ip", "unshare", "nsenter", "setpriv")))
    return able and subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True).returncode == 0


class Host:
    """One host; ``number`` is the last part of its address."""

    def __init__(self, number: int) -> None:
        self.address = f"10.77.0.{number}"
        self.cable = _start("unshare", "--net", "sleep", "infinity")
        self.machine: subprocess.Popen[bytes] | None = None
        self.init = 0

    def boot(self, ray: bool = True) -> None:
        """Switch the host on and start Ray there, with one CPU: on the first host as the head of the cluster.

        Without ``ray`` that is left to whoever uses the host.
        """
        waiting = "{ sleep infinity & wait; }"  # a shell that waits also clears away what orphans leave
        script = f"mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray && {waiting}"
        enter = ["nsenter", "--net", f"--target={self.cable.pid}"]
        alone = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.machine = _start(*enter, *alone, "sh", "-c", script)
        self.init = _child(self.machine.pid)
        _wait_for(lambda: Path(f"/proc/{_child(self.init)}/comm").read_text().strip() == "sleep")
        if ray:
            self._start_ray()

    def _start_ray(self) -> None:
        role = ["--head", "--port=6379", "--include-dashboard=false"]
        if not self.address.endswith(".1"):
            role = [f"--address={ENVIRONMENT['RAY_ADDRESS']}"]
        size = ["--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", *role, *size, f"--node-ip-address={self.address}"]
        done = subprocess.run(self._inside(ray), env=os.environ | ENVIRONMENT, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()

    def start(
        self, command: list[str], log: IO[bytes], environment: dict[str, str] = ENVIRONMENT
    ) -> subprocess.Popen[bytes]:
        """Start ``command`` on the host."""
        return subprocess.Popen(self._inside(command), env=os.environ | environment, stdout=log, stderr=log)

    def run(self, command: list[str]) -> str:
        """Run ``command`` on the host; its output."""
        done = subprocess.run(self._inside(command), env=os.environ | ENVIRONMENT, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
        return done.stdout.decode()

    def lose(self) -> None:
        """Switch the host off without a word: all its processes end at once."""
        if self.machine:
            with suppress(ProcessLookupError):
                os.kill(self.init, signal.SIGKILL)
            self.machine.wait()
            self.machine = None

    def link(self, state: str) -> None:
        """Pull the cable out (``down``) or put it back (``up``)."""
        _ip(self, "link", "set", "veth0", state)

    def remove(self) -> None:
        """Take the host away."""
        self.lose()
        self.cable.kill()
        self.cable.wait()

    def _inside(self, command: list[str]) -> list[str]:
        return ["nsenter", "--net", "--mount", "--pid", f"--target={self.init}", *command]


@contextmanager
def two_hosts(ray: bool = True) -> Iterator[tuple[Host, Host]]:
    """A cluster of two hosts with a CPU each; the first is its head. Without ``ray`` they are only switched on."""
    hosts: list[Host] = []
    try:
        for number in (1, 2):
            hosts.append(Host(number))
        time.sleep(0.5)
        peer = ["peer", "name", "veth0", "netns", str(hosts[1].cable.pid)]
        _ip(hosts[0], "link", "add", "veth0", "type", "veth", *peer)
        for host in hosts:
            _ip(host, "address", "add", f"{host.address}/24", "dev", "veth0")
            _ip(host, "link", "set", "lo", "up")
            host.link("up")
        for host in hosts:
            host.boot(ray)
        yield hosts[0], hosts[1]
    finally:
        for host in reversed(hosts):
            host.remove()


def _ip(host: Host, *arguments: str) -> None:
    subprocess.run(["nsenter", "--net", f"--target={host.cable.pid}", "ip", *arguments], check=True)


def _start(*command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command])


def _child(pid: int) -> int:
    """The only child of a process, once it has one."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    _wait_for(lambda: children.read_text().split())
    return int(children.read_text().split()[0])


def _wait_for(happened: object) -> None:
    end = time.monotonic() + 20
    while True:
        with suppress(OSError):
            if happened():  # type: ignore[operator]
                return
        assert time.monotonic() < end, "the host did not start"
        time.sleep(0.05)
