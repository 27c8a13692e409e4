"""Jobs by state from an http server that asks for the token as Ray's does: whom the token is shown, what may fail."""

from __future__ import annotations

import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from cluster import jobapi
from cluster.exporter import serving
from configs.errors import UsageError
from tests.scrapes import TOKEN, job_api, scrape, status, text


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, without a token."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_jobs_are_counted_by_state_and_the_token_is_shown_to_ray_alone(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs = [{"type": "SUBMISSION", "status": state} for state in ("RUNNING", "FAILED", "FAILED")]
    jobs.append({"type": "DRIVER", "status": "RUNNING"})
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # the token is not for a proxy
    with job_api(jobs) as (address, seen), serving([str(tmp_path)], port=0, address=address) as url:
        assert scrape(url)["jobs_up", ()] == 0
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
        assert scrape(url)["jobs_up", ()] == 0
        monkeypatch.setenv("RAY_AUTH_TOKEN", f"{TOKEN}\n")
        found = scrape(url)
        assert seen == [None, "Bearer wrong", f"Bearer {TOKEN}"]
        assert found["jobs_up", ()] == 1
        states = {labels[0]: value for (name, labels), value in found.items() if name == "jobs"}
        assert states == {"PENDING": 0, "RUNNING": 1, "STOPPED": 0, "SUCCEEDED": 0, "FAILED": 2}
        assert TOKEN not in text(url)
        monkeypatch.setenv("RAY_AUTH_TOKEN", f"{TOKEN}\nX-Other: 1")  # no header can hold it
        assert scrape(url)["jobs_up", ()] == 0
    assert TOKEN not in "".join(capfd.readouterr())


def test_without_an_address_there_are_no_metrics_of_jobs(tmp_path: Path) -> None:
    with serving([str(tmp_path)], port=0) as url:
        assert not any(name.startswith("jobs") for name, _ in scrape(url))


def test_a_token_may_stand_in_a_file(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / ".config" / "tilefleet").mkdir(parents=True)
    file = home / ".config" / "tilefleet" / "token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o600)
    with job_api([]) as (address, _), serving([str(tmp_path)], port=0, address=address) as url:
        assert scrape(url)["jobs_up", ()] == 1
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "missing"))
        assert scrape(url)["jobs_up", ()] == 0
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
        assert scrape(url)["jobs_up", ()] == 1


def test_a_job_api_that_is_dead_or_hangs_neither_fails_nor_holds_up_a_scrape(tmp_path: Path, home: Path) -> None:
    status(tmp_path / "run", "train")
    with job_api([]) as (gone, _):
        pass
    with serving([str(tmp_path)], port=0, address=gone) as url:
        assert scrape(url)["jobs_up", ()] == 0

    def drip(handler: BaseHTTPRequestHandler) -> None:
        with suppress(OSError):
            while True:  # a header that never ends, so that no time-out of a socket helps
                handler.wfile.write(b"X")
                time.sleep(0.2)

    with job_api(drip) as (address, seen), serving([str(tmp_path)], port=0, address=address) as url:
        for _ in range(2):
            began = time.monotonic()
            found = scrape(url)
            assert time.monotonic() - began < jobapi.TIMEOUT + 0.5
            assert found["jobs_up", ()] == 0
            assert ("tiles_planned", ("train", "run")) in found
        assert len(seen) == 1


@pytest.mark.parametrize("answer", [{"message": "no"}, [], ["text"], [{"status": ["RUNNING"]}]])
def test_an_answer_of_another_form_is_no_matter(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with job_api(answer) as (address, _), serving([str(tmp_path)], port=0, address=address) as url:
        found = scrape(url)
    assert found["jobs_up", ()] == isinstance(answer, list)
    assert sum(value for (name, _), value in found.items() if name == "jobs") == 0


def test_a_redirect_does_not_take_the_token_elsewhere(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with job_api([]) as (other, seen):

        def send_away(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(302)
            handler.send_header("Location", f"{other}/api/jobs/")
            handler.end_headers()

        with job_api(send_away) as (address, _), serving([str(tmp_path)], port=0, address=address) as url:
            assert scrape(url)["jobs_up", ()] == 0
    assert not seen


@pytest.mark.parametrize("address", ["http://198.51.100.7:8265", "http://head.example.invalid:8265"])
def test_plain_http_to_another_machine_is_refused_unless_allowed(address: str) -> None:
    with pytest.raises(UsageError, match=r"would show the cluster's token.*ssh -L 8265"):
        jobapi.JobApi(address)
    jobapi.JobApi(address, insecure_http=True)
    jobapi.JobApi(address.replace("http:", "https:"))


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://head:10001", "http://", "auto"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="looks like http://127"):
        jobapi.JobApi(address)
