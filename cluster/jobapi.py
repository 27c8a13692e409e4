"""How many jobs are in each state: asked of Ray's job API over http, for which Ray itself is not needed."""

from __future__ import annotations

import http.client
import json
import time
from threading import Thread

from cluster import server
from configs.errors import TilefleetError, UsageError

STATES = ("PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED")

TIMEOUT = 2.0
"""Seconds until an answer is no longer waited for."""

LARGEST = 32 << 20
"""Bytes of an answer that are read."""


class JobApi:
    """The job API at ``address``, as ``http://127.0.0.1:8265``.

    Raises :class:`UsageError` for what is no such address, and for plain http to another machine unless that is allowed
    by ``insecure_http``.
    """

    def __init__(self, address: str, *, insecure_http: bool = False) -> None:
        parts = server.parsed(address)
        if server.shows_token(parts) and not insecure_http:
            raise UsageError(
                f"{address}: plain http would show the cluster's token on the way; use https, or a tunnel "
                f"(ssh -L 8265:127.0.0.1:{parts.port or 80} {parts.hostname}) and http://127.0.0.1:8265"
            )
        self._url = address.rstrip("/")
        self._asking: Thread | None = None
        self._until = 0.0
        self._counts: dict[str, int] | None = None

    def ask(self) -> None:
        """Begin to ask, unless an earlier question is still open."""
        if self._asking and self._asking.is_alive():
            return
        self._counts, self._until = None, time.monotonic() + TIMEOUT
        self._asking = Thread(target=self._ask, name="jobs", daemon=True)
        self._asking.start()

    def counts(self) -> dict[str, int] | None:
        """Submitted jobs by state, each of :data:`STATES`; None where there is no answer in time, or none of use."""
        if self._asking:
            self._asking.join(max(0.0, self._until - time.monotonic()))
        return self._counts

    def _ask(self) -> None:
        try:
            with server.ask(self._url, "/api/jobs/", TIMEOUT) as response:
                jobs = json.loads(response.read(LARGEST))
        except (TilefleetError, OSError, ValueError, http.client.HTTPException):
            return
        if isinstance(jobs, list):
            states = [job.get("status") for job in jobs if isinstance(job, dict) and job.get("type") != "DRIVER"]
            self._counts = {state: states.count(state) for state in STATES}
