"""A hundred thousand tiles, then ten times as many: rows, ids, memory and time a tile, each in one run of ``classify``.

    python -m tests.benchmarks.million BUNDLE data/eurosat [TILES]

repeats the tiles of the train split under new ids in plain tar shards of 1,000, about 4.3 GB for a million, in the
folder for temporary files. Processes are watched in ``/proc`` (Linux).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.dataset as ds

from cluster.terminal import progress_line
from inference import sink
from inference.bench import SHARD_TILES
from inference.classify import ClassifyConfig
from inference.job import watch_job
from inference.repeat import read_tiles, write_shards

TIMES = 10
"""How many times as many tiles the second run has."""


def main(bundle: str, shards: str, most: str = "1000000") -> None:
    """Classify both and print one JSON line each, and the ratios of the second to the first."""
    encoded, runs = read_tiles(shards, int(most)), []
    for tiles in (int(most) // TIMES, int(most)):
        with tempfile.TemporaryDirectory() as name, progress_line() as show:
            write_shards(Path(name) / "shards", encoded, tiles, SHARD_TILES, show)
            out = f"{name}/out"
            job = watch_job(bundle, f"{name}/shards", out, ClassifyConfig(workers=os.cpu_count()), tiles)
            table = ds.dataset(f"{out}/{sink.PREDICTIONS}").to_table(columns=["tile_id"])
            figures = {
                "tiles": tiles,
                "rows": table.num_rows,
                "unique_ids": pc.count_distinct(table["tile_id"]).as_py(),
                "steady_tiles_per_second": round(job.tiles_per_second, 1),
                "seconds": round(job.seconds, 1),
                "microseconds_a_tile": round(1e6 / job.tiles_per_second, 1),
                "driver_mb": round(job.memory["driver"]),
                "worker_mb": round(job.memory["worker"]),
                "engine": job.terms.engine,
            }
        print(json.dumps(figures), flush=True)
        runs.append(figures)
    few, many = runs
    names = ("driver_mb", "worker_mb", "microseconds_a_tile")
    print(json.dumps({name: round(many[name] / few[name], 3) for name in names}))


if __name__ == "__main__":
    main(*sys.argv[1:])
