"""What a scrape of the exporter says, and what it can say something of: statuses of runs, and a list of jobs."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from cluster.records import StatusWriter

Samples = dict[tuple[str, tuple[str, ...]], float]
"""By name, without ``tilefleet_``, and the values of the labels in the order of their names."""

TOKEN = "a-token-of-this-test-0123456789abcdef"

CLASSIFIED: dict[str, Any] = {
    "workers": 2,
    "wanted_workers": 3,
    "planned_tiles": 1000,
    "done_tiles": 300,
    "failed_by_stage": {"read": 2, "decode": 3},
    "seconds_by_stage": {"read": 1.5, "forward": 20.0},
    "tiles_by_class": {"Crop": 200, "Town": 95},
    "unknown_tiles": 7,
    "tiles_by_confidence": {"0.3": 5, "0.9": 90, "1": 200},
    "confidence_sum": 280.5,
    "error_limit": 0.05,
    "expected_confidence": 0.97,
    "expected_unknown": 0.01,
}
TRAINED: dict[str, Any] = {
    "workers": 2,
    "wanted_workers": 2,
    "planned_tiles": 500,
    "done_tiles": 100,
    "seconds_by_stage": {"wait": 1.0, "train": 9.0, "validate": 0.5},
    "epoch": 2,
    "epochs": 10,
    "step": 8,
    "loss": 0.25,
    "accuracy": 0.9,
}


def status(run: Path, kind: Any, state: Any = "running", **fields: Any) -> StatusWriter:
    """The status of a run that did what ``fields`` say."""
    writer = StatusWriter(run, kind)
    writer.update(force=True, **fields)
    if state != "running":
        writer.finish(state)
    return writer


def text(url: str) -> str:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, timeout=10) as response:
        return str(response.read().decode())


def scrape(url: str) -> Samples:
    """All samples of a scrape, each of which must be there once."""
    found: Samples = {}
    for family in text_string_to_metric_families(text(url)):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            key = (sample.name.removeprefix("tilefleet_"), labels)
            assert key not in found
            found[key] = sample.value
    return found


def of(samples: Samples, run: str) -> dict[str, float]:
    """The samples of one run by name and what its labels say besides."""
    found = {}
    for (name, labels), value in samples.items():
        if run in labels:
            named = labels[1:] if labels[0] in ("train", "classify") else labels
            rest = [text for text in named if text != run]
            found[" ".join([name, *rest])] = value
    return found


@contextmanager
def job_api(answer: Any) -> Iterator[tuple[str, list[str | None]]]:
    """An http server in the place of Ray's: its address, and the ``Authorization`` of each request that came.

    It gives ``answer`` to who has the token: JSON, or a callable that answers itself.
    """
    seen: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            if callable(answer):
                answer(self)
                return
            right = self.path == "/api/jobs/" and seen[-1] == f"Bearer {TOKEN}"
            self.send_response(200 if right else 401)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode() if right else b"Unauthorized")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
