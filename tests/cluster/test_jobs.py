"""``tilefleet submit`` and ``tilefleet jobs``: what is found before a job leaves, and the jobs of a cluster."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from cluster import server
from configs.errors import UsageError
from configs.schema import Recipe
from tests.cluster.conftest import FOREIGN, User
from tests.conftest import need
from tests.runs import write_recipe

Edit = Callable[..., Path]


@pytest.fixture
def recipe(small_recipe: dict[str, Any], tmp_path: Path) -> Edit:
    """A recipe that trains in seconds, as a file; keys may be given."""
    return lambda **keys: write_recipe(Recipe.model_validate(small_recipe | keys), tmp_path)


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the environment nor this machine knows a cluster."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("nowhere")
def test_an_address_is_taken_from_where_it_is_said_most_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="tilefleet cluster up"):
        server.find(None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # of drivers
    with pytest.raises(UsageError, match="--address"):
        server.find(None)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    assert server.find(None) == "http://127.0.0.1:1"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:2/")
    assert server.find(None) == "http://127.0.0.1:2"
    assert server.find("http://localhost:3") == "http://localhost:3"


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize("url", ["ray://127.0.0.1:10001", "ftp://127.0.0.1", "http://"])
def test_what_is_no_job_server_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="looks like http"):
        server.find(url)


@pytest.mark.usefixtures("nowhere")
def test_plain_http_to_another_machine_is_refused_with_the_way_to_do_it_right() -> None:
    with pytest.raises(UsageError, match=r"ssh -N -L 8265:127\.0\.0\.1:8265 192\.0\.2\.7\).*--insecure-http"):
        server.find("http://192.0.2.7:8265")
    assert server.find("http://192.0.2.7:8265", insecure_http=True) == "http://192.0.2.7:8265"
    assert server.find("https://192.0.2.7") == "https://192.0.2.7"


@pytest.mark.process
def test_a_server_that_does_not_answer(user: User) -> None:
    for arguments in (["cluster", "status"], ["jobs", "list"], ["jobs", "stop", "x"]):
        code, _, err = user.run(*arguments, "--address", "http://127.0.0.1:1")
        assert code == 1
        assert (
            err
            == "tilefleet: http://127.0.0.1:1: no job server answers there; is the cluster up, and the tunnel to it?\n"
        )


def test_the_id_of_a_job_is_its_run() -> None:
    need(find_spec("aiohttp"), "ray[default], whose job server takes jobs")
    from cluster.jobs import Work

    work = Work("train", "/data/runs/a run", ["recipe.yaml"], "{}")
    assert re.fullmatch(r"train-a-run-[0-9a-f]{8}", work.base)
    assert replace(work, run="/other/a run").base != work.base
    assert replace(work, settings="other").base == work.base
    assert len(replace(work, kind="classify", run="s3://bucket/" + "x" * 200).base) < 46


@pytest.mark.ray
@pytest.mark.parametrize(
    ("keys", "options", "words"),
    [
        ({}, ["epoch=3"], "epoch: unknown key; did you mean epochs?"),
        ({}, ["shards=none"], "none"),
        ({"batch_size": 100_000}, [], "training tiles"),
        ({}, ["model.name=alexnet"], "model.name"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_found_before_the_job_leaves(
    owner: User, recipe: Edit, keys: dict[str, Any], options: list[str], words: str
) -> None:
    jobs = owner.must("jobs", "list")
    code, out, err = owner.run("submit", "train", recipe(**keys), *options)
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) == 1
    assert owner.must("jobs", "list") == jobs


@pytest.mark.ray
def test_what_is_wrong_with_a_classification_is_found_before_the_job_leaves(
    owner: User, bundle: Path, shards: Path, tmp_path: Path
) -> None:
    out = ["--out", tmp_path / "out"]
    for arguments, words in (
        ([bundle, shards / "test", "batchsize=4"], "did you mean batch_size?"),
        ([tmp_path / "none", shards / "test"], "none"),
        ([bundle, tmp_path / "none.tar"], "none.tar"),
        ([bundle, "batch_size=4"], "no archive given"),
    ):
        code, told, err = owner.run("submit", "classify", *arguments, *out)
        assert (code, told) == (2, ""), err
        assert words in err
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
def test_a_classification_is_followed_to_its_end(owner: User, bundle: Path, shards: Path, tmp_path: Path) -> None:
    from inference.sink import read_predictions
    from training.shards import load_index

    command = ["submit", "classify", bundle, shards / "test", "engine=torch", "--out", tmp_path / "out"]
    code, out, err = owner.run(*command, "--follow")
    assert code == 0, out + err
    tiles = load_index(shards).tiles("test")
    first, *log = out.splitlines()
    assert first.endswith("-1: submitted")
    assert f"{tmp_path / 'out'}: {tiles} tiles, {tiles} classified, 0 errors" in log
    assert any(line.startswith(f"classify: {tiles} of {tiles}") for line in log)
    assert not any("job_manager" in line or "Running entrypoint" in line for line in log)
    assert err == f"tilefleet: {first.partition(':')[0]}: succeeded\n"
    assert len(read_predictions(str(tmp_path / "out"))) == tiles
    job = first.partition(":")[0]
    assert owner.must(*command) == f"{job}: already finished\n"
    listed = owner.must("jobs", "list")
    assert max(map(len, listed.splitlines())) <= 80
    assert re.search(rf"^{job} +succeeded ", listed, re.MULTILINE)
    assert f"{tiles:,} of {tiles:,} tiles" in owner.must("jobs", "status", job[:12])
    assert f"{tiles} classified" in owner.must("jobs", "logs", job)
    assert owner.must("jobs", "stop", "out") == f"{job}: succeeded\n"


@pytest.mark.ray
def test_the_exit_code_is_the_jobs_own(owner: User, recipe: Edit, tmp_path: Path) -> None:
    code, out, err = owner.run("submit", "train", recipe(name="wide", workers=3), "--follow")
    assert code == 2
    assert "workers: 3 asked for, the cluster has 2 CPUs" in out
    assert "wide" in err
    assert err.rstrip().endswith(": failed")
    code, _, err = owner.run("jobs", "status", "no-such-job")
    assert code == 2
    assert "no such job" in err


@pytest.mark.process
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_shell_completes_commands(user: User, shell: str) -> None:
    asked = {"COMP_WORDS": "tilefleet cluster ", "COMP_CWORD": "2", "_TYPER_COMPLETE_ARGS": "tilefleet cluster "}
    out = user.run(_TILEFLEET_COMPLETE=f"complete_{shell}", **asked)[1]
    assert {"up", "status", "down"} <= set(re.findall(r"\w+", out))
    assert not list(user.home.iterdir())


def test_every_new_command_says_what_it_does_in_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tilefleet

    monkeypatch.setenv("COLUMNS", "80")
    for line in (
        *("cluster", "cluster up", "cluster status", "cluster down", "submit", "submit train", "submit classify"),
        *("jobs", "jobs list", "jobs status", "jobs logs", "jobs stop", "exporter"),
    ):
        monkeypatch.setattr(sys, "argv", ["tilefleet", *line.split(), "--help"])
        with pytest.raises(SystemExit) as ended:
            tilefleet.main()
        text = capsys.readouterr().out
        assert ended.value.code == 0
        assert max(map(len, text.splitlines())) <= 80, text
        assert "Usage: tilefleet " + line in text


def test_progress_without_a_terminal_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cluster.terminal import progress_line

    monkeypatch.setenv("TILEFLEET_PROGRESS", "60")
    with progress_line() as show:
        for done in range(0, 1001, 10):
            show("train, epoch 1/1", done, 1000, "loss 0.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train, epoch 1/1: 0 of 1,000 loss 0.5"
    assert lines[1].startswith("train, epoch 1/1: 1,000 of 1,000 ")
    assert len(lines) == 2
