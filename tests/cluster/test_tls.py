"""A job server behind a proxy that speaks TLS, with a certificate that nobody has signed."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import threading
from asyncio import StreamReader, StreamWriter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import User
from tests.conftest import need

pytestmark = pytest.mark.ray


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """With its key beside it."""
    need(shutil.which("openssl"), "openssl is not installed")
    made = tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-noenc", "-subj", "/CN=tilefleet", "-days", "2"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(tmp_path / "key.pem"), "-out", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    return made


@pytest.fixture
def proxied(owner: User, certificate: Path) -> Iterator[str]:
    """The https address of the cluster's job server."""
    port = str(owner.node.jobs).rpartition(":")[2]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))

    async def pass_on(reader: StreamReader, writer: StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def serve(reader: StreamReader, writer: StreamWriter) -> None:
        theirs = await asyncio.open_connection("127.0.0.1", int(port))
        await asyncio.gather(pass_on(reader, theirs[1]), pass_on(theirs[0], writer), return_exceptions=True)

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def test_a_certificate_that_nobody_signed_is_refused(owner: User, proxied: str) -> None:
    code, out, err = owner.run("jobs", "list", "--address", proxied)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert f"{proxied}: its certificate is not trusted" in err
    assert "SSL_CERT_FILE" in err


def test_one_setting_lets_every_command_trust_it(
    owner: User, proxied: str, certificate: Path, bundle: Path, shards: Path, tmp_path: Path
) -> None:
    at, trust = ["--address", proxied], str(certificate)
    assert "1 of 1 nodes up" in owner.must("cluster", "status", *at, SSL_CERT_FILE=trust)
    command = [
        "submit",
        "classify",
        bundle,
        shards / "test",
        "engine=torch",
        "--out",
        tmp_path / "out",
        "--follow",
        *at,
    ]
    said = owner.must(*command, SSL_CERT_FILE=trust)
    assert f"{tmp_path / 'out'}: " in said
    job = said.partition(":")[0]
    assert job in owner.must("jobs", "list", *at, SSL_CERT_FILE=trust)
    assert f"{tmp_path / 'out'}: " in owner.must("jobs", "logs", job, "--follow", *at, SSL_CERT_FILE=trust)
