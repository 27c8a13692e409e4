"""How fast this machine classifies, what sets the limit, and how that compares with what people write themselves.

Command: ``tilefleet bench classify``. Everything is measured over the same tiles with the same number of processes, in
rounds, one part right after the other, and a ratio is the median of the rounds' own ratios; every second round goes
backwards, so that a machine that gets slower or quicker favours none. The ceiling is what the cores could do if they
read, decoded and computed and did nothing else.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from configs.errors import TilefleetError, UsageError
from inference.classify import ClassifyConfig
from inference.forward import missing
from inference.job import watch_job
from inference.plan import Progress
from inference.repeat import Draw, draw_tiles, link_images, read_tiles, write_shards
from inference.stages import STAGES, measure_stages
from training import models
from training.bundle import BundleInfo, check_bundle, save_bundle
from training.encoded import Bands, channels, jpeg_shape
from training.shards import load_index

ROOT = Path(__file__).parent.parent
PROGRAMS = ROOT / "tests" / "benchmarks"

PEERS = {
    "ray_recipe": ("shards",),
    "plain_loader": ("shards",),
    "timm_style": ("images", "--channels-last"),
}
"""Programs in the manner of others: the folder that each classifies, and what timm's users would set."""

PEER_MODELS = ("cnn", "vgg16")
"""Models that those programs have too."""

SHARD_TILES, LEAST_CHUNKS = 1000, 8
"""Tiles in a shard, as ``tilefleet pack`` cuts them; fewer where a worker would get fewer shards than that."""

TILE_SIZE = 64
"""Of synthetic tiles, in pixels."""

CLASSES = 10

NAMES = {
    "read": "read only",
    "decode": "decode only",
    "forward": "forward only",
    "ceiling": "ceiling of the three",
    "whole": "whole job, once it runs",
    "ray_recipe": "Ray's recipe",
    "plain_loader": "plain DataLoader",
    "timm_style": "timm's manner",
    "first_part": "first part file",
}
"""What a table calls a figure, where its name does not say enough."""

START = "_with_start"
"""Ends the names of rates and ratios from the command to its end, beside those of work that runs already."""

Round = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What the benchmark works on; ``folder`` holds the ``shards`` and, for peers, the ``images``."""

    bundle: str
    info: BundleInfo
    folder: Path
    tiles: int
    workers: int
    config: ClassifyConfig
    peers: str | None


@contextmanager
def prepare(
    model: str, shards: str | None, tiles: int, peers: str | None, config: ClassifyConfig, draw: Draw, show: Progress
) -> Iterator[Bench]:
    """Prepare ``tiles`` tiles, of the train split of ``shards`` or drawn, in a folder for the time of the block.

    ``model`` is a bundle or the name of a model, whose weights are then of chance. ``peers`` is the precision that the
    other programs compute in, ``f32`` or ``bf16``; None leaves them out. Raises :class:`UsageError` for what cannot be
    measured here.
    """
    if os.environ.get("RAY_ADDRESS"):
        raise UsageError("RAY_ADDRESS: bench classify measures this machine alone, not a cluster; unset it")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    workers = config.workers or gpus or os.cpu_count() or 1
    if tiles < LEAST_CHUNKS * workers:
        raise UsageError(f"--tiles {tiles}: too few to measure; {workers} workers need {LEAST_CHUNKS * workers}")
    with tempfile.TemporaryDirectory(prefix="tilefleet-bench-") as name:
        folder, index = Path(name), load_index(shards) if shards else None
        size, bands = (index.tile_size, index.bands) if index else (TILE_SIZE, None)
        bundle, info = _bundle(model, folder / "bundle", size, bands)
        if info.bands and not shards:
            raise UsageError(f"{model}: is for chosen bands, which synthetic tiles do not have; name SHARDS that do")
        encoded = read_tiles(shards, tiles) if shards else draw_tiles(folder / "drawn", tiles, draw)
        if peers:
            _check_peers(info, encoded)
        each = min(SHARD_TILES, tiles // (LEAST_CHUNKS * workers))
        write_shards(folder / "shards", encoded, tiles, each, show)
        if peers:
            link_images(folder / "images", encoded, tiles, each)
        yield Bench(bundle, info, folder, tiles, workers, config.model_copy(update={"workers": workers}), peers)


def measure(bench: Bench, rounds: int, show: Progress) -> dict[str, Any]:
    """Rates of the whole job, of its stages and of the peers; see :func:`summary`."""
    done: list[Round] = []
    out = ""

    def whole(found: Round) -> None:
        nonlocal out
        out = str(bench.folder / f"out-{len(done)}")
        job = watch_job(bench.bundle, str(bench.folder / "shards"), out, bench.config, bench.tiles)
        found["tiles_per_second"] |= {"whole": job.tiles_per_second, "whole" + START: bench.tiles / job.seconds}
        found["startup_seconds"], found["peak_memory_mb"] = job.startup, job.memory
        found["engine"], found["engine_device"] = job.terms.engine, job.terms.device

    def stages(found: Round) -> None:  # over the plan of the last whole job, so with its engine
        found["core_seconds"] = measure_stages(bench.bundle, out, bench.workers)

    def peer(name: str) -> Callable[[Round], None]:
        return lambda found: found["tiles_per_second"].update(_peer(bench, name, len(done)))

    parts = {"whole job": whole, "stages": stages} | ({name: peer(name) for name in PEERS} if bench.peers else {})
    for number in range(rounds):
        found: Round = {"tiles_per_second": {}}
        for place, name in enumerate(reversed(parts) if number % 2 else parts):
            show(f"measure, {name}", number * len(parts) + place, rounds * len(parts))
            parts[name](found)
        done.append(found)
    return _about(bench) | summary(done, bench.workers)


def summary(rounds: Sequence[Round], workers: int) -> dict[str, Any]:
    """Medians over ``rounds`` of what was measured and of the ratios of each round; and all rounds as they were.

    ``core_seconds`` are those of a tile. ``ceiling`` is in tiles/s, ``share`` is that of it which the whole job reaches
    once it runs, ``binds`` the stage that takes most of a tile's time.
    """
    names = ("tiles_per_second", "core_seconds", "startup_seconds", "peak_memory_mb")
    medians = {name: _medians([one[name] for one in rounds]) for name in names}
    ratios = _medians([_ratios(one, workers) for one in rounds])
    costs = medians["core_seconds"]
    engine = {name: rounds[-1][name] for name in ("engine", "engine_device")}
    return engine | medians | ratios | {"binds": max(STAGES, key=costs.__getitem__), "rounds": list(rounds)}


def table(result: Mapping[str, Any]) -> str:
    """What :func:`measure` returned, for people."""
    rates, costs, workers = result["tiles_per_second"], result["core_seconds"], result["workers"]
    alone = {stage: workers / costs[stage] for stage in STAGES}
    steady = {name: rate for name, rate in rates.items() if not name.endswith(START)}
    lines = [f"{'part':24} {'tiles/s':>9} {'with start':>11}"]
    for name, rate in (alone | {"ceiling": result["ceiling"]} | steady).items():
        whole = f"{rates[name + START]:11,.0f}" if name + START in rates else ""
        lines.append(f"{NAMES.get(name, name):24} {rate:9,.0f} {whole}".rstrip())
    lines.append(f"{'share of the ceiling':24} {result['share']:9.1%}")
    for name in PEERS:
        if name in rates:
            over = f"over {NAMES[name]}"
            lines.append(f"{over:24} {result[f'over_{name}']:9.2f} {result[f'over_{name}{START}']:11.2f}")
    start = result["startup_seconds"]
    lines.append(f"{'seconds of the start':24} {sum(start.values()):9.1f}")
    lines += [f"  {NAMES.get(name, name):22} {seconds:9.1f}" for name, seconds in start.items()]
    lines += [
        f"{f'most memory, {name}, MB':24} {megabytes:9,.0f}" for name, megabytes in result["peak_memory_mb"].items()
    ]
    lines += [f"{'engine':24} {result['engine']:>9}", f"{'what binds':24} {result['binds']:>9}"]
    return "\n".join(lines)


def _ratios(one: Round, workers: int) -> dict[str, float]:
    """The ceiling of a round in tiles/s, and ratios to it and to the peers.

    On CPUs a worker has one core, which does all three stages. GPUs compute while all cores read and decode, so there
    the slower of the two sets the ceiling.
    """
    rates, costs = one["tiles_per_second"], one["core_seconds"]
    ceiling = workers / sum(costs.values())
    if one["engine_device"] == "cuda":
        ceiling = min(workers / costs["forward"], (os.cpu_count() or 1) / (costs["read"] + costs["decode"]))
    found = {"ceiling": ceiling, "share": rates["whole"] / ceiling}
    for name in PEERS:
        for start in ("", START) if name in rates else ():
            found[f"over_{name}{start}"] = rates[f"whole{start}"] / rates[name + start]
    return found


def _bundle(model: str, folder: Path, size: int, bands: Bands | None) -> tuple[str, BundleInfo]:
    """``model`` where it is a bundle, else one in ``folder`` of untrained weights, which compute as others do."""
    if model not in models.BUILDERS:
        return model, check_bundle(model)
    torch.manual_seed(0)
    classes = [f"class-{number}" for number in range(CLASSES)]
    half = [0.5] * channels(bands)
    info = BundleInfo(architecture=model, classes=classes, tile_size=size, bands=bands, mean=half, std=half)
    return str(folder), save_bundle(folder, models.build(model, CLASSES, size, channels=len(half)), info)


def _check_peers(info: BundleInfo, encoded: Sequence[bytes]) -> None:
    if info.architecture not in PEER_MODELS:
        raise UsageError(f"--peers: they have {' and '.join(PEER_MODELS)}, and no {info.architecture}")
    if info.bands or {jpeg_shape(tile) for tile in encoded} != {(info.tile_size, info.tile_size, 3)}:
        raise UsageError(f"--peers: they take colour JPEGs of {info.tile_size} pixels alone, which these are not")
    if not PROGRAMS.exists():
        raise TilefleetError(f"{PROGRAMS}: missing; --peers needs a checkout of the project")


def _peer(bench: Bench, name: str, number: int) -> dict[str, float]:
    """Rates of a program in tiles/s: as it says itself once it runs, and from its command to its end."""
    folder, *options = PEERS[name]
    settings = {
        "model": bench.info.architecture,
        "classes": len(bench.info.classes),
        "size": bench.info.tile_size,
        "workers": bench.workers,
        "precision": bench.peers,
    }
    places = [str(bench.folder / folder), str(bench.folder / f"{name}-{number}")]
    command = [
        str(PROGRAMS / f"{name}.py"),
        *places,
        *options,
        *(f"--{key}={value}" for key, value in settings.items()),
    ]
    began = time.perf_counter()
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "Error: " in line] or [f"exit {result.returncode}"]
        raise TilefleetError(f"bench: {name}.py failed: {errors[-1]}")
    said = json.loads(result.stdout.splitlines()[-1])
    if said["tiles"] != bench.tiles:
        raise TilefleetError(f"bench: {name}.py classified {said['tiles']} of {bench.tiles} tiles")
    return {name: said["tiles_per_second"], name + START: bench.tiles / seconds}


def _medians(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in figures) for name in figures[0]}


def _about(bench: Bench) -> dict[str, Any]:
    """What the figures belong to."""
    packages = ["torch", "ray", *(["openvino"] if not missing("openvino", "cpu") else [])]
    return {
        "benchmark": "classify",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        **{name: version(name) for name in packages},
        "workers": bench.workers,
        "model": bench.info.architecture,
        "batch_size": bench.config.batch_size,
        "peers": bench.peers,
        "tiles": bench.tiles,
        "tile_size": bench.info.tile_size,
        "classes": len(bench.info.classes),
    }


def _processor() -> str:
    """The processor's name where Linux tells it, and the number of its cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name}, {os.cpu_count()} cores"
