"""Prometheus beside a cluster: scrapes the exporter and every node of Ray, keeps the figures, evaluates the alerts.

What it is told stands in ``monitoring/``; :func:`start` puts the ports and folders of this cluster into a copy of it,
and into one of what provisions a Grafana. Command: ``tilefleet cluster up --monitoring``.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import yaml

from configs.errors import TilefleetError, UsageError

MONITORING = Path(__file__).parent / "monitoring"

DISCOVERY = "prom_metrics_service_discovery.json"
"""The list of its nodes that Ray's head keeps in its folder."""

RAY_DASHBOARDS = "session_latest/metrics/grafana/dashboards"
"""Where, in that folder, Ray writes dashboards of its own."""

PORT = 9090

PATIENCE = 60.0
"""Seconds that Prometheus has to become ready; it reads again what it wrote before."""


@dataclass(frozen=True)
class Watch:
    """A Prometheus that runs."""

    process: subprocess.Popen[bytes]
    address: str
    """Where it answers, as ``http://127.0.0.1:9090``; it asks for no password."""


def start(
    folder: str | Path,
    *,
    exporter: str = "127.0.0.1:9109",
    ray_folder: str | Path = "/tmp/ray",
    port: int = PORT,
    interval: str = "15s",
) -> Watch:
    """Start Prometheus on loopback and come back when it is ready; it goes on when this process ends.

    ``folder`` gets its configuration, its log, what it gathers and ``provisioning`` for a Grafana; ``exporter`` is the
    ``host:port`` of ours, and ``ray_folder`` the ``--temp-dir`` of Ray. It looks every ``interval``. Raises
    :class:`UsageError` where Prometheus is not installed or ``port`` is taken, :class:`TilefleetError` where it does
    not start.
    """
    program = require(port)
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    address = f"http://127.0.0.1:{port}"
    config, log = write_config(folder, exporter, Path(ray_folder), interval), folder / "prometheus.log"
    write_provisioning(folder / "provisioning", address, Path(ray_folder))
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    watch = Watch(process, address)
    last = time.monotonic() + PATIENCE
    while not _is_ready(watch):
        if process.poll() is not None or time.monotonic() > last:
            process.kill()
            process.wait()
            said = log.read_text(errors="replace").splitlines() or ["it said nothing"]
            raise TilefleetError(f"monitoring: prometheus did not start, {log} says: {said[-1]}")
        time.sleep(0.1)
    return watch


def require(*ports: int) -> str:
    """The program; raises :class:`UsageError` where Prometheus is not installed or one of ``ports`` is taken."""
    program = shutil.which("prometheus")
    if not program:
        raise UsageError("monitoring: prometheus is not installed; on Debian: apt-get install prometheus")
    for port in ports:
        _refuse_taken(port)
    return program


def write_config(folder: Path, exporter: str, ray_folder: Path, interval: str) -> Path:
    """``monitoring/prometheus.yml`` with these addresses, in ``folder``; its rules are those beside the original."""
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": interval, "evaluation_interval": interval}
    config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
    ours, ray = config["scrape_configs"]
    ours["static_configs"] = [{"targets": [exporter]}]
    ray["file_sd_configs"] = [{"files": [str(ray_folder / DISCOVERY)], "refresh_interval": interval}]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def write_provisioning(folder: Path, prometheus: str, ray_folder: Path) -> None:
    """``monitoring/provisioning`` for a Grafana on this machine, with these addresses, in ``folder``."""
    sources = yaml.safe_load((MONITORING / "provisioning" / "datasources" / "tilefleet.yml").read_text())
    sources["datasources"][0]["url"] = prometheus
    dashboards = yaml.safe_load((MONITORING / "provisioning" / "dashboards" / "tilefleet.yml").read_text())
    ours, ray = dashboards["providers"]
    ours["options"]["path"] = str(MONITORING)
    ray["options"]["path"] = str(ray_folder / RAY_DASHBOARDS)
    for name, content in (("datasources", sources), ("dashboards", dashboards)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "tilefleet.yml").write_text(yaml.safe_dump(content, sort_keys=False))


def _refuse_taken(port: int) -> None:
    """Another Prometheus that answers there would be taken for ours."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UsageError(f"monitoring: port {port} is taken; stop what listens there, or do without") from error


def _is_ready(watch: Watch) -> bool:
    try:
        with urllib.request.urlopen(f"{watch.address}/-/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
