"""What Ray itself takes of a machine while it trains: CPU seconds of every process over steady epochs, by the kernel.

    python -m tests.benchmarks.ray_share data/eurosat [key=value ...]

trains ``configs/bench.yaml`` with ``tilefleet train``, which starts Ray, then with the same loop under ``torchrun``,
and watches ``/proc`` (Linux) in the second half of the epochs. On a machine whose cores are all at work, what Ray's own
processes take is not there for the workers: ``limit`` is the share of torchrun's rate that is left then.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from cluster.records import read_status
from configs.schema import load_recipe
from tests.benchmarks.first_step import ROOT, alive

RECIPE = str(ROOT / "configs" / "bench.yaml")


def main(shards: str, *overrides: str) -> None:
    """Measure both and print a table of Ray's processes, and one JSON line."""
    settings = [f"shards={shards}", "epochs=6", *overrides]
    workers = str(load_recipe(RECIPE, settings).workers)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", workers, "-m", "training.loop"]
    rate, cpu = _measure([str(ROOT / "tilefleet.py"), "train", RECIPE, *settings])
    plain_rate, plain_cpu = _measure([*torchrun, RECIPE, *settings])
    cores = os.cpu_count() or 1
    working = sum(share for name, share in cpu.items() if "RayTrainWorker" in name)
    others = sum(cpu.values()) - working
    for name, share in cpu.most_common(12):
        print(f"{share:6.3f} cores  {name}")
    figures = {
        "cores": cores,
        "tiles_per_second": rate,
        "torchrun_tiles_per_second": plain_rate,
        "ray_over_torchrun": rate / plain_rate,
        "workers_cores": working,
        "ray_cores": others,
        "idle_cores": cores - working - others,
        "torchrun_cores": sum(plain_cpu.values()),
        "limit": (cores - others) / cores,
    }
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


def _measure(command: list[str]) -> tuple[float, Counter[str]]:
    """Tiles/s over the second half of a run, and the mean share of a core that each process took meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, *command, f"runs={folder}"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
        )
        try:
            began, tiles, before = _moment(process, Path(folder) / "bench", 0.5)
            ended, more, after = _moment(process, Path(folder) / "bench", 0.95)
        finally:
            process.terminate()
            process.wait()
    shares: Counter[str] = Counter()
    for pid, (name, cpu) in after.items():
        shares[name] += (cpu - before.get(pid, (name, 0.0))[1]) / (ended - began)
    return (more - tiles) / (ended - began), shares


def _moment(
    process: subprocess.Popen[bytes], run: Path, share: float
) -> tuple[float, int, dict[int, tuple[str, float]]]:
    """When, at how many tiles and with which CPU seconds a run has done ``share`` of its tiles."""
    while process.poll() is None:
        status = read_status(run)
        if status and status.planned_tiles and status.done_tiles >= share * status.planned_tiles:
            return status.updated, status.done_tiles, {pid: (p.name, p.cpu) for pid, p in alive(0).items()}
        time.sleep(0.02)
    raise SystemExit(f"the run ended with {process.returncode} before {share:.0%} of its tiles")


if __name__ == "__main__":
    main(*sys.argv[1:])
