"""The command line of clusters: ``tilefleet cluster``, ``submit``, ``jobs`` and ``exporter``."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.submit import Address, Insecure, jobs, submit
from cluster.terminal import warn
from configs.errors import TilefleetError, UsageError

if TYPE_CHECKING:
    from cluster.nodes import Node

cluster = typer.Typer(help="Start, show and end a cluster.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Give ``app`` the commands of clusters."""
    app.add_typer(cluster, name="cluster")
    app.add_typer(submit, name="submit")
    app.add_typer(jobs, name="jobs")
    app.command()(exporter)


@cluster.command()
def up(
    host: Annotated[
        str | None, typer.Option(metavar="ADDRESS[:PORT]", help="Be the head of a cluster of several machines.")
    ] = None,
    join: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Be a worker of that head.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the job server; 0: any that is free.")] = 8265,
    cpus: Annotated[int | None, typer.Option(min=0, help="CPUs to offer; all if not given.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs to offer; all if not given.")] = None,
    monitoring: Annotated[bool, typer.Option("--monitoring", help="Start exporter and Prometheus beside it.")] = False,
    runs: Annotated[str, typer.Option(metavar="DIR", help="Where the exporter finds runs.")] = "runs",
) -> None:
    """Start a cluster on this machine.

    It listens on loopback alone, unless --host is given, and asks for a token.
    """
    from cluster import nodes

    if host and join:
        raise UsageError("--host and --join: a machine is the head of a cluster or joins one")
    if monitoring:
        from cluster import exporter, watch

        if join:
            raise UsageError("--monitoring and --join: it goes with the head, and watches all machines from there")
        watch.require(exporter.PORT, watch.PORT)
    node = nodes.up(host, join, port, cpus, gpus)
    print(f"{node.host}: {node.role} of the cluster {node.address}")
    if node.jobs:
        print(f"job server: {node.jobs}, for those with the token")
    if join or host:
        warn(
            f"Ray listens on every address of this machine, not on {node.host} alone, and not all of it asks for the "
            "token: close all ports but SSH to other networks (README, Security)"
        )
        warn("a token keeps others out but hides nothing: use a network of your own, or TLS (see RAY_USE_TLS of Ray)")
    if host:
        from cluster.token import hand_over

        print(f"for each other machine, give it the token:\n  {hand_over()}")
        print(f"and there:\n  tilefleet cluster up --join {node.address}")
    if join:
        print("jobs are submitted on the head, or through a tunnel to it")
    if monitoring and node.jobs:
        try:
            print(f"prometheus: {_watch(node, runs)}")
        except TilefleetError:
            nodes.down()
            raise
    print("end it with: tilefleet cluster down")


@cluster.command()
def status(address: Address = None, insecure_http: Insecure = False) -> None:
    """Show the nodes of a cluster, what is in use, and what they run."""
    from cluster import server

    for line in server.overview(server.find(address, insecure_http)):
        print(line)


@cluster.command()
def down() -> None:
    """End what `cluster up` started on this machine.

    Jobs are stopped first if it is the head; they keep what is finished.
    """
    from cluster import nodes

    node = nodes.current()
    if node and node.jobs and node.is_up:
        _stop_all(node.jobs)
    node = nodes.down()
    print(f"{node.host}: {node.role} of the cluster {node.address} has ended")
    if Path(node.folder).exists():
        warn(f"it had died before; its logs are in {node.folder}")


def exporter(
    runs: Annotated[list[str], typer.Option(metavar="DIR", help="Folder or URI under which runs lie; may repeat.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 9109,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    address: Annotated[str | None, typer.Option(metavar="URL", help="Job server, for the states of jobs.")] = None,
    keep: Annotated[float, typer.Option(min=0, metavar="HOURS", help="Show all of a run so long after its end.")] = 24,
    insecure_http: Insecure = False,
) -> None:
    """Serve the metrics of runs and jobs to Prometheus."""
    from cluster.exporter import serve

    serve(runs, port, host, address, keep, insecure_http=insecure_http)


def _watch(node: Node, runs: str) -> str:
    """Start exporter and Prometheus, which go with ``node``; where Prometheus answers."""
    from cluster import nodes, storage, watch

    program = Path(__file__).parent.parent / "tilefleet.py"
    options = ["--runs", storage.absolute(runs), "--address", str(node.jobs)]
    log = Path(node.folder) / "exporter.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, str(program), "exporter", *options],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    node = nodes.attach(node, process.pid)
    history = Path.home() / ".local" / "share" / "tilefleet" / "prometheus"
    found = watch.start(history, ray_folder=f"{node.folder}/ray")
    nodes.attach(node, found.process.pid)
    while "/metrics" not in log.read_text():  # which it prints once it serves them
        if process.poll() is not None:
            raise TilefleetError((log.read_text().splitlines() or ["monitoring: the exporter ended at once"])[-1])
        time.sleep(0.1)
    return found.address


def _stop_all(url: str) -> None:
    from cluster import server

    try:
        server.check(url)
        from cluster.jobs import Jobs

        found = Jobs(url)
        for job in found.all():
            if job.is_at_work:
                warn(f"{job.id}: stopping")
                found.stop(job)
    except TilefleetError as error:
        warn(f"jobs are not stopped first: {error}")
