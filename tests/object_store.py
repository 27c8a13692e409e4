"""An S3 service on loopback (moto's server) behind a proxy that counts requests and lets chosen ones fail."""

from __future__ import annotations

import http.client
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

import pyarrow.fs as pafs

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
"""Environment of everything that talks to the store; the keys open nothing."""


class ObjectStore:
    """What the proxy saw and is told to do; ``env`` is what a process needs to reach the store by ``s3://``."""

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.requests: list[str] = []
        self._faults: list[tuple[str, str, int, str]] = []
        self._lock = Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": self}))
        self.server.daemon_threads = True
        self.env = KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server.server_port}"}

    def make_bucket(self, name: str) -> str:
        """A new bucket as a location."""
        options = {"access_key": "test", "secret_key": "test", "endpoint_override": self.env["AWS_ENDPOINT_URL"]}
        pafs.S3FileSystem(**options, allow_bucket_creation=True).create_dir(name)
        return f"s3://{name}"

    def fail(self, method: str, part: str, times: int, how: str = "500") -> None:
        """Let the next ``times`` requests of ``method`` with ``part`` in their path fail: a status or ``"cut"``."""
        with self._lock:
            self._faults.append((method, part, times, how))

    def mend(self) -> None:
        """No more faults; forget the requests seen."""
        with self._lock:
            self._faults.clear()
            self.requests.clear()

    def seen(self, method: str, path: str) -> str | None:
        """Take note of a request; how it is to fail, if it is."""
        with self._lock:
            self.requests.append(f"{method} {path}")
            for number, (wanted, part, times, how) in enumerate(self._faults):
                if wanted == method and part in path and times:
                    self._faults[number] = (wanted, part, times - 1, how)
                    return how
        return None


@contextmanager
def object_store() -> Iterator[ObjectStore | None]:
    """A running store, empty; None where moto is not installed."""
    command = [sys.executable, "-m", "moto.server"]
    if importlib.util.find_spec("moto") is None:
        outside = shutil.which("moto_server")
        if outside is None:
            yield None
            return
        command = [outside]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    moto = subprocess.Popen(
        [*command, "-H", "127.0.0.1", "-p", str(port)],
        env=os.environ | KEYS,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    store = ObjectStore(port)
    thread = Thread(target=store.server.serve_forever, daemon=True)
    try:
        _wait_for(port, moto)
        thread.start()
        yield store
    finally:
        if thread.is_alive():
            store.server.shutdown()
        store.server.server_close()
        moto.kill()
        moto.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"moto's server did not start (exit code {process.poll()})")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: ObjectStore

    def _forward(self) -> None:
        body = self._body()
        how = self.store.seen(self.command, self.path)
        if how and how != "cut":
            self.send_response(int(how))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.store.upstream, timeout=60)
        hop = ("transfer-encoding", "expect", "connection", "content-length")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in hop}
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        self.send_response(answer.status)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        with suppress(ConnectionError):  # a reader may go before the end
            self.wfile.write(data[: len(data) // 2] if how else data)
        self.close_connection = bool(how)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while length := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward

    def log_message(self, *arguments: Any) -> None:
        """Stay quiet."""
