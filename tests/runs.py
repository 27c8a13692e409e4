"""Training runs as tests start them without Ray and read them afterwards: the output, the losses, the tiles seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cluster import records
from configs.schema import Recipe

ROOT = Path(__file__).parent.parent


def write_recipe(recipe: Recipe, folder: Path) -> Path:
    """``recipe`` as a file for another process."""
    file = folder / f"{recipe.name}.yaml"
    file.write_text(recipe.model_dump_json())
    return file


def torchrun(workers: int, *program: str | Path, threads: int = 1, timeout: float = 120) -> str:
    """What ``program`` printed as ``workers`` processes with ``threads`` each; it must succeed within ``timeout`` s."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    result = subprocess.run(
        [sys.executable, *launcher, *program],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def losses(run: Recipe) -> list[float]:
    """The loss of each step, in order."""
    return [loss for row in records.read_metrics(run.run) for loss in row["losses"]]


def trace(run: Recipe) -> list[dict[str, Any]]:
    """What each rank saw at each step, rank by rank, in the order of time: a step done again stands there again."""
    return [json.loads(line) for file in sorted(Path(run.run).glob("trace-rank-*.jsonl")) for line in file.open()]


def traced(run: Recipe) -> list[list[str]]:
    """The tiles of each global batch, in order, as the workers that did it last saw them."""
    lines = trace(run)
    latest = {(line["epoch"], line["step"]): line["workers"] for line in lines if line["rank"] == 0}
    shares = {
        (line["epoch"], line["step"], line["rank"]): line["tiles"]
        for line in lines
        if line["workers"] == latest[line["epoch"], line["step"]]
    }
    return [[tile for rank in range(latest[key]) for tile in shares[*key, rank]] for key in sorted(latest)]
