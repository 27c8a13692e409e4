"""Metrics for Prometheus, from what runs say of themselves and from Ray's list of jobs.

No worker and no driver is asked, so one that died still shows how far it came::

    tilefleet exporter --runs runs [--port 9109] [--address http://127.0.0.1:8265]
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from platform import python_version

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family

from cluster import storage
from cluster.jobapi import JobApi
from cluster.metrics import CONFIDENCE, METRICS, confidence_buckets, label, samples
from cluster.records import STORE_INTERVAL
from cluster.runs import Run, RunFolder
from cluster.terminal import warn
from configs.errors import UsageError

PORT = 9109


class Exporter:
    """A collector of prometheus_client: a scrape looks at ``folders`` and asks ``jobs``, where there is such.

    Runs that ended more than ``keep_hours`` ago have few metrics, so thousands of them cost little. Folders on object
    storage are not looked at here, where one waits for the answer.
    """

    def __init__(self, folders: Sequence[RunFolder], jobs: JobApi | None = None, keep_hours: float = 24) -> None:
        self._folders, self._jobs, self._keep = folders, jobs, keep_hours * 3600
        self._shown: defaultdict[str, list[str]] = defaultdict(list)
        """Of the run at a location, the classes that have labels of their own."""
        self._one_at_a_time = threading.Lock()

    def collect(self) -> Iterator[Family]:
        """All metrics as they are now."""
        with self._one_at_a_time:
            return iter(self._collect())

    def _collect(self) -> list[Family]:
        began = time.perf_counter()
        if self._jobs:
            self._jobs.ask()
        for folder in self._folders:
            if not folder.is_remote:
                folder.look()
        found = {run.location: run for folder in self._folders for run in folder.runs}
        for gone in self._shown.keys() - found.keys():
            del self._shown[gone]
        families, failed = self._of_runs(named(found.values()))
        failed += sum(not folder.is_readable for folder in self._folders)
        families += [
            _gauge("runs_unreadable", "Runs whose status cannot be read, or stores of runs.", failed),
            _build_info(),
        ]
        if self._jobs:
            families += _of_jobs(self._jobs.counts())
        took = time.perf_counter() - began
        return [*families, _gauge("scrape_duration_seconds", "Time that it took to gather these metrics.", took)]

    def _of_runs(self, runs: dict[str, Run]) -> tuple[list[Family], int]:
        """The metrics of ``runs``, and how many of them cannot be read."""
        now, failed = time.time(), 0
        families = {
            name: (CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily)(
                f"tilefleet_{name}", metric.help, labels=metric.labels
            )
            for name, metric in METRICS.items()
        }
        confidence = HistogramMetricFamily("tilefleet_prediction_confidence", CONFIDENCE.help, labels=CONFIDENCE.labels)
        for name, run in runs.items():
            if run.status is None:
                failed += 1
                continue
            status, shown = run.status, self._shown[run.location]
            wanted = status.state == "running" or now - status.updated < self._keep
            for metric, labels, value in samples(status, shown, everything=wanted):
                families[metric].add_metric([name, *labels], value)
            if wanted and status.tiles_by_confidence:
                confidence.add_metric([name], confidence_buckets(status), status.confidence_sum)
        return [*families.values(), confidence], failed


def named(runs: Iterable[Run]) -> dict[str, Run]:
    """``runs`` by the names of their folders, with the folder above where two have one name.

    Where even those are equal, a few digits that stand for the location follow.
    """
    found = list(runs)
    parts = [[label(part) for part in run.location.split("/")[-2:]] for run in found]
    names = [part[-1] for part in parts]
    count = Counter(names)
    names = [name if count[name] == 1 else "/".join(part) for name, part in zip(names, parts, strict=True)]
    count = Counter(names)
    return {
        name if count[name] == 1 else f"{name}#{sha256(run.location.encode(errors='replace')).hexdigest()[:8]}": run
        for name, run in zip(names, found, strict=True)
    }


@contextmanager
def serving(
    runs: list[str],
    port: int = PORT,
    host: str = "127.0.0.1",
    address: str | None = None,
    keep_hours: float = 24,
    *,
    insecure_http: bool = False,
) -> Iterator[str]:
    """Serve metrics for the time of the block, in threads; gives the URL. Arguments and errors are those of `serve`."""
    folders = [RunFolder(location) for location in runs]
    registry = CollectorRegistry()
    registry.register(Exporter(folders, JobApi(address, insecure_http=insecure_http) if address else None, keep_hours))
    for folder in folders:
        if not folder.is_remote and not storage.is_dir(folder.location):
            warn(f"{folder.location}: is not there; what will be in it is shown once it is")
    ended = threading.Event()
    for folder in folders:
        if folder.is_remote:
            threading.Thread(target=_keep_looking, args=(folder, ended), name="look", daemon=True).start()
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError as error:
        raise UsageError(
            f"{host}:{port}: cannot be listened on ({error.strerror}); name another port or host"
        ) from error
    try:
        shown = f"[{host}]" if ":" in host else host
        yield f"http://{shown}:{server.server_port}/metrics"
    finally:
        ended.set()
        server.shutdown()
        server.server_close()


def serve(
    runs: list[str],
    port: int = PORT,
    host: str = "127.0.0.1",
    address: str | None = None,
    keep_hours: float = 24,
    *,
    insecure_http: bool = False,
) -> None:
    """Serve the metrics of all runs in the folders or URIs ``runs`` until interrupted; prints where.

    ``port`` 0 is any that is free. ``address`` is that of Ray's job API; without it there are no metrics of jobs. Runs
    that ended more than ``keep_hours`` ago keep few metrics. Raises :class:`UsageError` where ``host`` and ``port``
    cannot be had, for a URI that cannot be opened, and as :class:`JobApi` does.
    """
    with serving(runs, port, host, address, keep_hours, insecure_http=insecure_http) as url:
        print(url, flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


def _keep_looking(folder: RunFolder, ended: threading.Event) -> None:
    while not ended.is_set():
        folder.look()
        ended.wait(STORE_INTERVAL)


def _of_jobs(counts: dict[str, int] | None) -> list[Family]:
    states = GaugeMetricFamily("tilefleet_jobs", "Submitted jobs that Ray remembers, by state.", labels=["state"])
    for state, jobs in (counts or {}).items():
        states.add_metric([state], jobs)
    return [states, _gauge("jobs_up", "1 where Ray's job API answers, 0 where it does not.", counts is not None)]


def _build_info() -> Family:
    info = GaugeMetricFamily(
        "tilefleet_build_info", "Versions of what the exporter runs with.", labels=["version", "python", "ray", "torch"]
    )
    info.add_metric([_version("tilefleet"), python_version(), _version("ray"), _version("torch")], 1)
    return info


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _gauge(name: str, explained: str, value: float) -> Family:
    return GaugeMetricFamily(f"tilefleet_{name}", explained, value=float(value))
