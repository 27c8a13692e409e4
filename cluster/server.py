"""Ray's http server on the head of a cluster: where it is, who may speak to it how, and what it says of its nodes.

Command: ``tilefleet cluster status``. The token goes to the server that was named and nowhere else: not over plain http
to another machine, through no proxy, and after no redirect.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import SplitResult, urlsplit

from cluster import nodes, token
from cluster.session import refuse_old
from configs.errors import TilefleetError, UsageError

TIMEOUT = 10.0
"""Seconds until an answer is no longer waited for."""

VERSIONS = ("ray", "python", "tilefleet")


def find(address: str | None, insecure_http: bool = False) -> str:
    """The URL of the job server: ``address``, or what the environment names, or that of this machine's own cluster.

    Raises :class:`UsageError` where there is none, or it is plain http to another machine and that was not allowed.
    """
    node = nodes.current()
    named = [address, os.environ.get("RAY_API_SERVER_ADDRESS"), os.environ.get("RAY_ADDRESS")]
    url = next((text for text in named if text and "://" in text), node.jobs if node else None)
    if url is None and node:
        head = node.address.rpartition(":")[0]
        raise UsageError(
            f"this machine is a worker; the job server listens on the head alone. Give the command on {head}, or open "
            f"a tunnel (ssh -N -L 8265:127.0.0.1:8265 {head}) and use --address http://127.0.0.1:8265"
        )
    if url is None:
        raise UsageError("no cluster is known here; start one with: tilefleet cluster up, or name one with --address")
    parts = parsed(url)
    if shows_token(parts) and not insecure_http:
        raise UsageError(
            f"{url}: plain http would show the token to the network. Open a tunnel (ssh -N -L "
            f"8265:127.0.0.1:{parts.port or 80} {parts.hostname}) and use --address http://127.0.0.1:8265, or https; "
            "on a network that is yours alone --insecure-http allows it"
        )
    return url.rstrip("/")


def parsed(url: str) -> SplitResult:
    """The parts of ``url``; raises :class:`UsageError` for what is no address of a job server."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{url}: not the address of a job server, which looks like http://127.0.0.1:8265")
    return parts


def shows_token(address: SplitResult) -> bool:
    """Whether it is plain http to another machine, on whose way anyone could read the token."""
    return address.scheme == "http" and not _is_here(str(address.hostname))


def ask(url: str, path: str, timeout: float = TIMEOUT) -> http.client.HTTPResponse:
    """The answer to ``path``, to be read and closed, asked with the token; raises as ``urllib`` does."""
    bearer = token.read_token()
    request = urllib.request.Request(url + path, headers={"Authorization": f"Bearer {bearer}"} if bearer else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
    answer: http.client.HTTPResponse = opener.open(request, timeout=timeout)
    return answer


def get(url: str, path: str) -> Any:
    """The JSON that the server answers to ``path``, asked with the token.

    Raises :class:`TilefleetError` where it does not answer, :class:`UsageError` where it does not take the token.
    """
    try:
        with ask(url, path) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise refused(url) from error
        raise TilefleetError(f"{url}{path}: {error}") from error
    except (OSError, ValueError) as error:
        if isinstance(reason := getattr(error, "reason", None), ssl.SSLCertVerificationError):
            raise UsageError(
                f"{url}: its certificate is not trusted ({reason.verify_message}); set SSL_CERT_FILE to a "
                "file with the certificate of the authority that signed it"
            ) from error
        raise silent(url) from error


def authorities() -> str | bool:
    """The file or folder of certificates that the system trusts, or ``SSL_CERT_FILE``; True where none is known."""
    paths = ssl.get_default_verify_paths()
    return paths.cafile or paths.capath or True


def check(url: str) -> None:
    """See that the server takes our token and runs a release of Ray that is not refused; raises where not."""
    refuse_old(get(url, "/api/version")["ray_version"])


def refused(url: str) -> UsageError:
    """The error of a server that does not take our token."""
    return UsageError(f"{url}: the token is missing or not the cluster's; {token.HOW}")


def silent(url: str) -> TilefleetError:
    """The error of a server that does not answer."""
    return TilefleetError(f"{url}: no job server answers there; is the cluster up, and the tunnel to it?")


def overview(url: str) -> Iterator[str]:
    """The lines of ``cluster status``, of 80 columns at most: each node, what is in use, versions that differ."""
    found = get(url, "/api/v0/nodes?detail=1&limit=10000")["data"]["result"]["result"]
    figures = {node["raylet"].get("nodeId"): node for node in get(url, "/nodes?view=summary")["data"]["summary"]}
    used = _used(url)
    alive = [node for node in found if node["state"] == "ALIVE"]
    running = sum(job["status"] == "RUNNING" for job in get(url, "/api/jobs/") if job["type"] == "SUBMISSION")
    yield f"{url}: {len(alive)} of {len(found)} nodes up, {running} job{'s' * (running != 1)} running"
    yield f"{'node':28} {'CPUs used':>12} {'GPUs used':>12} {'memory used':>18}"
    for node in sorted(found, key=lambda node: (not node["is_head_node"], node["state"], node["node_ip"])):
        name = node["node_ip"] + (" (head)" if node["is_head_node"] else "")
        if node["state"] != "ALIVE":
            yield f"{name:28} {node['state'].lower()}: {node.get('state_message') or ''}"[:80].rstrip(": ")
            continue
        of = used.get(node["node_id"]) or used.get(node["node_ip"], {})
        cpus, gpus = (_share(of.get(kind), node["resources_total"].get(kind)) for kind in ("CPU", "GPU"))
        total, _, _, taken = figures.get(node["node_id"], {}).get("mem") or (0, 0, 0, 0)
        memory = f"{taken / 2**30:.1f} of {total / 2**30:.1f} GiB" if total else "-"
        yield f"{name:28} {cpus:>12} {gpus:>12} {memory:>18}"
    yield from _versions(url, alive)


def _used(url: str) -> dict[str, dict[str, list[float]]]:
    """Of each node, by its id or address, the amounts of each resource that are in use and that there are."""
    status = get(url, "/api/cluster_status")["data"].get("clusterStatus") or {}
    report = status.get("loadMetricsReport") or {}
    return report.get("usageByNode") or {}


def _share(used: list[float] | None, total: float | None) -> str:
    return f"{used[0] if used else 0:g} of {total:g}" if total else "-"


def _versions(url: str, alive: list[dict[str, Any]]) -> Iterator[str]:
    """What the nodes run, in one line where it is the same everywhere, the command line of this machine included."""
    head = get(url, "/api/version")["ray_version"]
    of = {node["node_ip"]: {name: node["labels"].get(f"tilefleet.{name}") for name in VERSIONS} for node in alive}
    here = {name: nodes.labels().get(name) for name in VERSIONS}
    yield "here: " + ", ".join(f"{name} {value}" for name, value in here.items() if value) + f"; head: ray {head}"
    for address, versions in of.items():
        differing = [f"{name} {versions[name]}" for name in VERSIONS if versions[name] not in (None, here[name])]
        if differing:
            yield f"{address} differs: {', '.join(differing)}"


def _is_here(host: str) -> bool:
    """Whether what is sent to ``host`` stays on this machine: only an address of its own can be bound."""
    try:
        for family, kind, _, _, place in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with socket.socket(family, kind) as probe:
                probe.bind(place)
    except OSError:
        return False
    return True


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Leave a redirect as the error that it is here."""
