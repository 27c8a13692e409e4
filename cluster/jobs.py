"""Runs as jobs of a cluster, by Ray's job server: submitted, listed, followed, stopped.

The run is a job's identity: its id is ``KIND-NAME-PLACE-N``, where PLACE stands for the run's folder and N counts the
attempts at it. So a run that is at work is joined, one that ended early goes on with the next attempt, and of two
commands that submit at the same moment Ray refuses the second, as it has that id already.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray
import ray.exceptions
from ray.job_submission import JobSubmissionClient

from cluster import records, server, token
from cluster.nodes import STOP_SECONDS
from cluster.package import stage
from configs.errors import TilefleetError, UsageError

AT_WORK = ("PENDING", "RUNNING")

PROGRESS = {"TILEFLEET_PROGRESS": "10"}
"""A job has no terminal: every so many seconds its progress is a line of its log."""

_NOISE = re.compile(r"^(\d{4}-\d\d-\d\d [\d:,]+\tINFO job_manager\.py|Running entrypoint for job )")


@dataclass(frozen=True)
class Work:
    """A run to submit: its folder, and the command line ``tilefleet KIND ARGUMENTS`` that begins it or goes on."""

    kind: str
    run: str
    arguments: Sequence[str]
    settings: str
    """What must be the same for it to be the same run."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Shipped beside the code: name -> text."""

    @property
    def base(self) -> str:
        """The id of its jobs, less the number of the attempt."""
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", self.run.rstrip("/").rpartition("/")[2])[:26]
        return f"{self.kind}-{name}-{hashlib.sha256(self.run.encode()).hexdigest()[:8]}"

    @property
    def digest(self) -> str:
        """What stands for its settings in a job."""
        return hashlib.sha256(self.settings.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """A submitted job; times are Unix seconds."""

    id: str
    state: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    run: str
    """Folder of its run; empty for a job that is not ours."""
    digest: str
    started: float
    ended: float | None
    exit_code: int
    message: str

    @property
    def base(self) -> str:
        """The id less the number of the attempt, for a job of ours."""
        return self.id.rpartition("-")[0] if self.run else self.id

    @property
    def attempt(self) -> int:
        """Which attempt at its run it is, from 1."""
        return int(self.id.rpartition("-")[2]) if self.run else 1

    @property
    def is_at_work(self) -> bool:
        """Whether it has not ended."""
        return self.state in AT_WORK


class Jobs:
    """The jobs of the cluster at ``url``, which :func:`cluster.server.find` has approved and ``check`` has tried.

    All calls raise :class:`TilefleetError` where the server does not answer and :class:`UsageError` where it does not
    take the token.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.WARNING)  # its notes are not for whoever submits
        bearer = token.read_token()
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        with _named_by(url), self._clear():
            self._client = JobSubmissionClient(url, headers=headers, verify=server.authorities())

    def all(self) -> list[Job]:
        """All submitted jobs, the oldest first."""
        with self._clear():
            found = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: job.started)

    def find(self, text: str) -> Job:
        """The job of that id, of an id that begins so, or the newest attempt at the run of that name or folder."""
        jobs = self.all()
        exact = [job for job in jobs if job.id == text]
        if exact:
            return exact[0]
        near = [job for job in jobs if job.id.startswith(text) or text in (job.run, job.run.rpartition("/")[2])]
        bases = sorted({job.base for job in near})
        if not bases:
            raise UsageError(f"{text}: no such job at {self.url}; see: tilefleet jobs list")
        if len(bases) > 1:
            raise UsageError(f"{text}: may be {', '.join(bases)}; name one of them")
        return max(near, key=lambda job: job.attempt)

    def last(self, work: Work) -> Job | None:
        """The newest attempt at ``work``."""
        return max((job for job in self.all() if job.base == work.base), key=lambda job: job.attempt, default=None)

    def submit(self, work: Work) -> tuple[Job, str]:
        """Make sure that ``work`` is being done, and say by which job and how.

        That is ``submitted``, ``resumed``, ``already running`` or ``already finished``. Raises :class:`UsageError`
        where a job of other settings works on the run.
        """
        for _ in range(5):
            last = self.last(work)
            if last and last.is_at_work:
                if last.digest != work.digest:
                    raise UsageError(
                        f"{work.run}: {last.id} works on it with other settings; choose another name, or stop that "
                        f"first: tilefleet jobs stop {last.id}"
                    )
                return last, "already running"
            if last and last.state == "SUCCEEDED" and last.digest == work.digest and _is_done(work.run):
                return last, "already finished"
            name = f"{work.base}-{last.attempt + 1 if last else 1}"
            if self._send(name, work):
                return self.find(name), "resumed" if last else "submitted"
        raise TilefleetError(f"{work.run}: its jobs end as soon as they begin; see: tilefleet jobs logs {work.base}")

    def stop(self, job: Job) -> Job:
        """Ask a job to save what it has and end, and wait until it did; one that has ended stays as it is."""
        if job.is_at_work:
            with self._clear():
                self._client.stop_job(job.id)
        end = time.monotonic() + STOP_SECONDS + 30
        while job.is_at_work and time.monotonic() < end:
            time.sleep(0.5)
            job = self.find(job.id)
        return job

    def logs(self, job: Job) -> str:
        """All that the job printed so far."""
        with self._clear():
            return _quiet(self._client.get_job_logs(job.id))

    def follow(self, job: Job, show: Callable[[str], object]) -> Job:
        """Pass what the job printed and prints to ``show`` until it ends; a lost connection is taken up again."""
        told, lost = 0, 0

        async def tail() -> None:
            nonlocal told, lost
            seen = 0
            async for text in self._client.tail_job_logs(job.id):
                seen, lost = seen + len(text), 0
                if seen > told:
                    show(_quiet(text[len(text) - (seen - told) :]))
                    told = seen

        while True:
            try:
                asyncio.run(tail())
                if not (now := self.find(job.id)).is_at_work:
                    return now
            except (RuntimeError, TilefleetError, aiohttp.ClientError, OSError) as error:
                lost += 1
                if isinstance(error, UsageError) or lost > 10:
                    raise server.silent(self.url) from error
            time.sleep(1)

    def _send(self, name: str, work: Work) -> bool:
        """Submit ``work`` under that id; False where Ray has a job of that id already."""
        with tempfile.TemporaryDirectory() as folder, self._clear():
            stage(folder, work.files)
            try:
                self._client.submit_job(
                    entrypoint=shlex.join(["python", "-m", "tilefleet", work.kind, *work.arguments]),
                    submission_id=name,
                    runtime_env={"working_dir": folder, "env_vars": PROGRESS},
                    metadata={"run": work.run, "settings": work.digest},
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    return False
                raise
        return True

    @contextmanager
    def _clear(self) -> Iterator[None]:
        try:
            yield
        except ray.exceptions.AuthenticationError as error:
            raise server.refused(self.url) from error
        except OSError as error:  # of requests too
            raise server.silent(self.url) from error
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise TilefleetError(f"{self.url}: {lines[-1] if lines else error!r}") from error


def exit_code(job: Job) -> int:
    """0, 1 or 2 as the command of an ended job left it; 1 for one that was stopped or never began."""
    return 0 if job.state == "SUCCEEDED" else 2 if job.exit_code == 2 else 1


def _job(details: Any) -> Job:
    metadata = details.metadata or {}
    ours = bool(re.search(r"-\d+$", details.submission_id)) and "run" in metadata
    return Job(
        id=details.submission_id,
        state=str(details.status.value),
        run=metadata["run"] if ours else "",
        digest=metadata.get("settings", ""),
        started=(details.start_time or 0) / 1000,
        ended=details.end_time / 1000 if details.end_time else None,
        exit_code=details.driver_exit_code or 0,
        message=details.message or "",
    )


def _is_done(run: str) -> bool:
    """Whether the run says so itself, where its folder can be read from here."""
    try:
        status = records.read_status(run)
    except (TilefleetError, OSError):
        return False
    return status is not None and status.state == "done"


def _quiet(text: str) -> str:
    """Lines of a log without those in which Ray speaks of itself."""
    return "".join(line for line in text.splitlines(keepends=True) if not _NOISE.match(line))


@contextmanager
def _named_by(url: str) -> Iterator[None]:
    """Keep Ray's client to ``url`` for the time of the block, and proxies out of the way of loopback for good.

    It would take the address of the environment instead of the one that it is given.
    """
    if (host := urlsplit(url).hostname) and host in ("127.0.0.1", "localhost", "::1"):
        others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
        os.environ["no_proxy"] = f"{others},{host}".lstrip(",")
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
