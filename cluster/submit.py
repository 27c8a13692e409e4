"""The command line of jobs: ``tilefleet submit`` and ``tilefleet jobs``.

What is wrong with a run is found here, before its job leaves, by the checks of ``tilefleet train`` and ``tilefleet
classify``. They lie to the left of this package, so they are named as strings.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.terminal import warn
from configs.errors import TilefleetError, UsageError

if TYPE_CHECKING:
    from cluster.jobs import Job, Jobs, Work

Address = Annotated[
    str | None, typer.Option(metavar="URL", help="Job server; that of `cluster up` on this machine if not given.")
]
Insecure = Annotated[bool, typer.Option("--insecure-http", help="Speak plain http with another machine.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Show its log until it ends; leave with its exit code.")]
Id = Annotated[str, typer.Argument(metavar="ID", help="Id of a job, its beginning, or the name of the run.")]

submit = typer.Typer(help="Train or classify as a job of a cluster.", no_args_is_help=True)
jobs = typer.Typer(help="List, follow and stop the jobs of a cluster.", no_args_is_help=True)


@submit.command("train")
def submit_train(
    recipe: Annotated[str, typer.Argument(help="YAML file, as configs/eurosat_cnn.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, as epochs=5.")
    ] = None,
    address: Address = None,
    follow: Follow = False,
    insecure_http: Insecure = False,
) -> None:
    """Train a model on a cluster.

    Given again it joins the run, or goes on where that stopped.
    """
    from cluster import server
    from cluster.jobs import Work
    from configs.schema import RESUMABLE, load_recipe

    url = server.find(address, insecure_http)
    chosen, text = load_recipe(recipe, overrides or []), "recipe.yaml"
    weights = chosen.model.weights
    if weights and Path(weights).exists():
        weights = _place(weights)
    chosen = chosen.model_copy(
        update={
            "shards": _place(chosen.shards),
            "runs": _place(chosen.runs),
            "model": chosen.model.model_copy(update={"weights": weights}),
        }
    )
    settings = chosen.model_dump(mode="json", exclude=set(RESUMABLE))
    files = {text: json.dumps(chosen.model_dump(mode="json"))}  # which is YAML too
    work = Work("train", chosen.run, [text, "--resume"], json.dumps(settings, sort_keys=True), files)
    try:
        done = _is_here(chosen.shards, url) and resolve_name("training.train:prepare")(chosen, resume=True)
    except UsageError:
        if not _is_at_work(work, url):  # else its folder is only just being made, or holds other settings
            raise
        done = False
    if done:
        print(f"{chosen.run}: already finished")
        return
    _submit(work, url, follow)


@submit.command("classify")
def submit_classify(
    bundle: Annotated[str, typer.Argument(help="Bundle folder, as runs/NAME/bundle.")],
    archives: Annotated[
        list[str],
        typer.Argument(
            metavar="ARCHIVE... [KEY=VALUE]...", help="Tars, zips, folders, lists of paths; settings, as workers=2."
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder for the predictions; the same one resumes.")],
    address: Address = None,
    follow: Follow = False,
    insecure_http: Insecure = False,
) -> None:
    """Classify archives of tiles on a cluster.

    Given again it joins the run, or goes on where that stopped.
    """
    from cluster import server, storage
    from cluster.jobs import Work
    from configs.schema import parse_overrides, validate

    url = server.find(address, insecure_http)
    options = [text for text in archives if "=" in text and not storage.exists(text)]
    found = [_place(text) for text in archives if text not in options]
    if not found:
        raise UsageError("submit classify: no archive given; name tars, zips, folders or lists of paths")
    bundle, out = _place(bundle), _place(out)
    config = validate(resolve_name("inference.classify:ClassifyConfig"), parse_overrides(options), "submit classify")
    if _is_here(bundle, url):
        resolve_name("training.bundle:check_bundle")(bundle)
    if all(_is_here(text, url) for text in found):
        resolve_name("inference.archive:list_archives")(found)
    same = config.model_dump(exclude={"workers", "max_error_share"}) | {"bundle": bundle, "archives": sorted(found)}
    work = Work("classify", out, [bundle, *found, *options, "--out", out], json.dumps(same, sort_keys=True))
    _submit(work, url, follow)


@jobs.command("list")
def list_jobs(address: Address = None, insecure_http: Insecure = False) -> None:
    """List all jobs, the oldest first."""
    found = _jobs(address, insecure_http)
    rows = found.all()
    print(f"{'job':47} {'state':9} {'started':11} {'took':>10}" if rows else f"{found.url}: no jobs")
    for job in rows:
        print(f"{job.id:47} {job.state.lower():9} {_when(job):11} {_took(job):>10}")


@jobs.command("status")
def job_status(id: Id, address: Address = None, insecure_http: Insecure = False) -> None:
    """Show one job, and how far its run is."""
    from cluster.records import read_status

    job = _jobs(address, insecure_http).find(id)
    print(f"{job.id}: {job.state.lower()}, started {_when(job)}, took {_took(job)}")
    if not job.is_at_work and job.state != "SUCCEEDED" and (lines := job.message.strip().splitlines()):
        print(lines[-1])
    if not job.run:
        return
    print(f"run: {job.run}")
    try:
        known = read_status(job.run)
    except (TilefleetError, OSError):
        known = None
    if known:
        print(f"{known.state}: {known.done_tiles:,} of {known.planned_tiles:,} tiles on {known.workers} workers")


@jobs.command("logs")
def job_logs(id: Id, follow: Follow = False, address: Address = None, insecure_http: Insecure = False) -> None:
    """Show what a job printed."""
    found = _jobs(address, insecure_http)
    job = found.find(id)
    if follow:
        _follow(found, job)
    else:
        print(found.logs(job), end="")


@jobs.command("stop")
def stop_job(id: Id, address: Address = None, insecure_http: Insecure = False) -> None:
    """Let a job save what it has and end.

    Submitting its run again goes on with it.
    """
    found = _jobs(address, insecure_http)
    job = found.find(id)
    if job.is_at_work:
        warn(f"{job.id}: stopping, which takes until the next step or chunk is saved")
    job = found.stop(job)
    if job.is_at_work:
        raise TilefleetError(f"{job.id}: has not ended yet; see: tilefleet jobs status {job.id}")
    print(f"{job.id}: {job.state.lower()}")


def _place(location: str) -> str:
    from cluster import storage

    return storage.absolute(location)


def _is_here(location: str, url: str) -> bool:
    """Whether ``location`` can be checked from here; one that is missing may be on the disk of a far cluster."""
    from cluster import nodes, storage

    node = nodes.current()
    ours = node is not None and node.jobs == url and node.is_up
    return ours or storage.is_uri(location) or storage.exists(location)


def _is_at_work(work: Work, url: str) -> bool:
    try:
        job = _connected(url).last(work)
    except TilefleetError:
        return False
    return job is not None and job.is_at_work


def _jobs(address: str | None, insecure_http: bool) -> Jobs:
    from cluster import server

    return _connected(server.find(address, insecure_http))


def _connected(url: str) -> Jobs:
    from cluster import server

    server.check(url)  # the wrong token or address is said before Ray is imported
    from cluster.jobs import Jobs

    return Jobs(url)


def _submit(work: Work, url: str, follow: bool) -> None:
    found = _connected(url)
    job, how = found.submit(work)
    print(f"{job.id}: {how}", flush=True)
    if follow:
        _follow(found, job)
    elif job.is_at_work:
        print(f"its log: tilefleet jobs logs {job.base} --follow")


def _follow(found: Jobs, job: Job) -> None:
    from cluster.jobs import exit_code

    try:
        job = found.follow(job, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        warn(f"{job.id} goes on; come back with: tilefleet jobs logs {job.base} --follow")
        raise typer.Exit(130) from None
    warn(f"{job.id}: {job.state.lower()}")
    raise typer.Exit(exit_code(job))


def _when(job: Job) -> str:
    return time.strftime("%m-%d %H:%M", time.localtime(job.started))


def _took(job: Job) -> str:
    seconds = int((job.ended or time.time()) - job.started)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
