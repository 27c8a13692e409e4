"""How fast this machine trains, what sets the limit, and how that compares with what people write themselves.

Commands: ``tilefleet bench ingest`` and ``tilefleet bench train``. Each gives every part the same tiles and the same
number of processes and threads. Absolute rates on a shared machine are worth little, so the parts are measured in
rounds, one right after the other, and a ratio is the median of the rounds' own ratios; every second round goes
backwards, so that a machine that gets slower or quicker favours none. Each part has the machine as its users would have
it: Ray is up for Ray Train only, since even an idle one takes a share of the cores.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster import records
from cluster.session import session
from configs.errors import TilefleetError, UsageError
from configs.schema import Recipe
from training.decode import image_extension
from training.pack import pack
from training.randomness import permutation
from training.shards import Index, TileReader, load_index
from training.survey import Progress
from training.synthetic import CLASSES, write_tiles
from training.train import check, train

ROOT = Path(__file__).parent.parent
PLAIN = ROOT / "tests" / "benchmarks" / "plain_ddp.py"

PLAIN_MODELS = ("cnn", "vgg16")
"""Models that the plain script has too."""

RATIOS = {
    "both_over_model": ("both", "model"),
    "loader_over_model": ("loader", "model"),
    "ray_over_torchrun": ("ray", "both"),
    "over_plain": ("both", "plain"),
}
"""Name of each ratio of two rates, above and below the line."""

NAMES = {
    "first": "loader, first epoch",
    "loader": "loader, from the cache",
    "model": "model, batches in memory",
    "both": "whole loop, torchrun",
    "ray": "whole loop, Ray Train",
    "plain": "plain script, torchrun",
    "gather": "take from the cache",
}
"""What a table calls a rate, where its name does not say enough."""

Rates = dict[str, float]


@dataclass(frozen=True)
class Bench:
    """What one benchmark works on; ``recipe`` is that of every run, ``images`` the class folders of its tiles."""

    recipe: Recipe
    index: Index
    images: Path
    folder: Path
    threads: int

    def run(self, name: str) -> Recipe:
        """The recipe of a run of this name."""
        return self.recipe.model_copy(update={"name": name})


@contextmanager
def prepare(recipe: Recipe, shards: str | None, tiles: int, progress: Progress) -> Iterator[Bench]:
    """Prepare at most ``tiles`` training tiles of ``shards``, or synthetic ones, in a folder for the time of the block.

    Raises :class:`UsageError` for what cannot be measured here.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and recipe.workers > gpus:
        raise UsageError(f"workers: {recipe.workers} asked for, this machine has {gpus} GPUs")
    if recipe.epochs < 2:
        raise UsageError("epochs: the first half of them is warm-up, so bench needs 2 or more")
    with tempfile.TemporaryDirectory(prefix="tilefleet-bench-") as name:
        folder, raw = Path(name), Path(name) / "raw"
        if shards is None:
            each = -(-tiles // len(CLASSES))
            write_tiles(str(raw / "train"), each, progress=progress)
            write_tiles(str(raw / "val"), -(-each // 10), seed=1)
        else:
            _extract(shards, "train", tiles, raw)
            _extract(shards, "val", -(-tiles // 10), raw)
        bands = load_index(shards).bands if shards else None
        pack(str(raw), str(folder / "shards"), bands=bands, progress=progress)
        fixed = {"shards": str(folder / "shards"), "runs": str(folder / "runs"), "early_stopping": None, "trace": False}
        recipe = recipe.model_copy(update=fixed)
        index = load_index(recipe.shards)
        check(recipe, index)
        threads = 1 if gpus else max(1, (os.cpu_count() or 1) // recipe.workers)
        yield Bench(recipe, index, raw / "train", folder, threads)


def measure_ingest(bench: Bench, rounds: int, progress: Progress) -> dict[str, Any]:
    """Tiles/s of the loader without a model, and of its parts; medians of ``rounds``, summed over ranks.

    ``limit`` is the part that takes most of a tile's time in the first epoch, ``shares`` what each part takes of it.
    """
    done: list[list[Rates]] = []
    for number in range(rounds):
        progress("measure", number, rounds)
        done.append(_part(bench, "ingest", number))
    rates = {name: statistics.median(_summed(ranks)[name] for ranks in done) for name in done[0][0]}
    times = {name: 1 / rates[name] for name in ("read", "decode", "gather")}
    shares = {name: time / sum(times.values()) for name, time in times.items()}
    megabytes = rates.pop("read_bytes") / 1e6
    figures = {"tiles_per_second": rates, "read_megabytes_per_second": megabytes, "shares": shares}
    return _about(bench, "ingest") | figures | {"limit": max(shares, key=shares.__getitem__), "rounds": done}


def measure_train(bench: Bench, rounds: int, progress: Progress) -> dict[str, Any]:
    """Tiles/s of a training run and of its parts, and their ratios; medians of ``rounds``, summed over ranks.

    ``limit`` is the slower of loader and model; ``waiting`` the share of the whole loop's time in which rank 0 had no
    tiles to work on.
    """
    if os.environ.get("RAY_ADDRESS"):
        raise UsageError("RAY_ADDRESS: bench train measures this machine alone, not a cluster; unset it")
    parts: dict[str, Callable[[Bench, int], Rates]] = {
        "apart": _apart,
        "both": _both,
        "ray": _ray,
        "plain": _plain,
    }
    if bench.recipe.model.name not in PLAIN_MODELS or bench.index.bands:  # the plain script takes RGB alone
        del parts["plain"]
    done: list[Rates] = []
    for number in range(rounds):
        rates: Rates = {}
        for place, name in enumerate(reversed(parts) if number % 2 else parts):
            progress(f"measure, {name}", number * len(parts) + place, rounds * len(parts))
            rates |= parts[name](bench, number)
        done.append(rates)
    return _about(bench, "train") | summary(done)


def summary(rounds: list[Rates]) -> dict[str, Any]:
    """Medians of the rates and of the ratios of each round, what is the limit, and all rounds as they were."""
    rates = {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}
    ratios = {
        ratio: statistics.median(found[above] / found[below] for found in rounds)
        for ratio, (above, below) in RATIOS.items()
        if above in rates and below in rates
    }
    waiting = rates.pop("waiting")
    limit = min("loader", "model", key=rates.__getitem__)
    return {"tiles_per_second": rates, "waiting": waiting, "limit": limit} | ratios | {"rounds": rounds}


def table(result: Mapping[str, Any]) -> str:
    """What :func:`measure_ingest` or :func:`measure_train` returned, for people."""
    rates = result["tiles_per_second"]
    lines = [f"{'part':26} tiles/s", *(f"{NAMES.get(name, name):26} {rate:7,.0f}" for name, rate in rates.items())]
    if "read_megabytes_per_second" in result:
        lines += [f"{'read, in MB/s':26} {result['read_megabytes_per_second']:7.1f}"]
    lines += [f"{name:26} {result[name]:7.3f}" for name in RATIOS if name in result]
    lines += [f"{f'time of {name}':26} {share:7.1%}" for name, share in result.get("shares", {}).items()]
    return "\n".join([*lines, f"{'limit':26} {result['limit']:>7}"])


def _extract(shards: str, split: str, most: int, raw: Path) -> None:
    """Write at most ``most`` tiles of ``split``, in an order of chance, as files in ``raw/SPLIT/CLASS``."""
    reader, classes = TileReader(shards, split), load_index(shards).classes
    for position in permutation(0, 0, count=len(reader))[:most]:
        (data,) = reader.read([position])
        folder = raw / split / classes[reader.labels[position]]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{position}.{image_extension(data)}").write_bytes(data)


def _part(bench: Bench, name: str, number: int) -> list[Rates]:
    """What each rank measured of one of :data:`training.parts.PARTS`."""
    recipe = bench.run(f"{name}-{number}")
    out = bench.folder / "parts" / recipe.name
    _torchrun(bench, "-m", "training.parts", name, _written(bench, recipe), str(out))
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(recipe.workers)]


def _apart(bench: Bench, number: int) -> Rates:
    return _summed(_part(bench, "train", number))


def _both(bench: Bench, number: int) -> Rates:
    recipe = bench.run(f"both-{number}")
    _torchrun(bench, "-m", "training.loop", _written(bench, recipe))
    steady = _steady(recipe)
    waiting = sum(row["seconds_waiting"] for row in steady) / sum(row["seconds"] for row in steady)
    return {"both": _rate(steady), "waiting": waiting}


def _ray(bench: Bench, number: int) -> Rates:
    recipe = bench.run(f"ray-{number}")
    with session(cpus=bench.threads * recipe.workers):
        train(recipe)
    return {"ray": _rate(_steady(recipe))}


def _plain(bench: Bench, number: int) -> Rates:
    recipe = bench.recipe
    settings = {
        "model": recipe.model.name,
        "size": bench.index.tile_size,
        "batch-size": max(1, recipe.batch_size // recipe.workers),
        "epochs": max(2, recipe.epochs // 2),  # it keeps no tiles: one epoch of warm-up is enough
        "lr": recipe.optimizer.learning_rate,
    }
    if not PLAIN.exists():
        raise TilefleetError(f"{PLAIN}: missing; bench train needs a checkout of the project")
    said = _torchrun(bench, str(PLAIN), str(bench.images), *(f"--{key}={value}" for key, value in settings.items()))
    return {"plain": json.loads(said.splitlines()[-1])["tiles_per_second"]}


def _torchrun(bench: Bench, *program: str) -> str:
    """Run ``program`` with a process for each worker; returns its stdout."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(bench.recipe.workers)]
    logs = ["--log-dir", str(bench.folder / "logs")]  # else it leaves a folder behind for each start
    result = subprocess.run(
        [sys.executable, *launcher, *logs, *program],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(bench.threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "Error: " in line] or [f"exit {result.returncode}"]
        raise TilefleetError(f"bench: {' '.join(program[:3])} failed: {errors[0]}")
    return result.stdout


def _written(bench: Bench, recipe: Recipe) -> str:
    (bench.folder / f"{recipe.name}.json").write_text(recipe.model_dump_json())
    return str(bench.folder / f"{recipe.name}.json")


def _steady(recipe: Recipe) -> list[dict[str, Any]]:
    """The metrics of the second half of a run's epochs: until then a rank still meets tiles that it has not cached."""
    rows = records.read_metrics(recipe.run)
    return rows[len(rows) // 2 :]


def _rate(rows: list[dict[str, Any]]) -> float:
    tiles = sum(row["tiles_per_second"] * row["seconds"] for row in rows)
    return float(tiles / sum(row["seconds"] for row in rows))


def _summed(ranks: list[Rates]) -> Rates:
    return {name: sum(rank[name] for rank in ranks) for name in ranks[0]}


def _about(bench: Bench, name: str) -> dict[str, Any]:
    """What the figures of a benchmark belong to."""
    recipe = bench.recipe
    return {
        "benchmark": name,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "torch": str(torch.__version__),
        "workers": recipe.workers,
        "threads": bench.threads,
        "model": recipe.model.name,
        "precision": recipe.precision,
        "batch_size": recipe.batch_size,
        "tiles": bench.index.tiles("train"),
        "tile_size": bench.index.tile_size,
        "classes": len(bench.index.classes),
    }


def _processor() -> str:
    """The processor's name where Linux tells it, and the number of its cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name}, {os.cpu_count()} cores"
