"""The benchmark of classification: its figures follow from what was measured, and all classify the same tiles once."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import tilefleet
from configs.errors import UsageError
from inference import plan as plans
from inference.archive import list_archives
from inference.bench import PEER_MODELS, PEERS, PROGRAMS, Bench, prepare, summary, table
from inference.classify import ClassifyConfig
from inference.job import phases, steady_rate
from inference.plan import Chunk, Terms
from inference.readers import read_chunk
from inference.repeat import draw_tiles, link_images, write_shards
from inference.stages import STAGES, measure_stages
from training import models
from training.shards import TileReader

WORKERS, TILES, SIDE = 2, 70, 32
CONFIG = ClassifyConfig(workers=WORKERS, batch_size=8)
ALONE = {"argparse", "json", "logging", "os", "time", "pathlib", "numpy", "PIL", "pyarrow", "plain_ddp"} | {
    "ray",
    "torch",
    "torchvision",
    "webdataset",
}
RATES = {"whole": 800.0, "whole_with_start": 400.0}
PEER_RATES = dict.fromkeys(PEERS, 100.0) | {f"{name}_with_start": 80.0 for name in PEERS}
ROUND: dict[str, Any] = {
    "tiles_per_second": RATES | PEER_RATES,
    "core_seconds": {"read": 1e-4, "decode": 4e-4, "forward": 15e-4},
    "startup_seconds": {"imports": 3.0, "plan": 1.0, "ray": 9.0, "engine": 8.0, "first_part": 4.0},
    "peak_memory_mb": {"driver": 200.0, "worker": 900.0},
    "engine": "openvino",
    "engine_device": "cpu",
}
ABOUT = {"workers": WORKERS, "device": "a machine"}


def no_progress(stage: str, done: int, total: int) -> None:
    """Takes what a progress line would show."""


def no_drawing(folder: str, each: int) -> None:
    raise AssertionError("tiles were drawn though there are real ones")


def prepared(shards: Path | None, model: str = "cnn", tiles: int = TILES, peers: str | None = "f32") -> Any:
    return prepare(model, str(shards) if shards else None, tiles, peers, CONFIG, no_drawing, no_progress)


def keep_plan(bench: Bench, out: Path, engine: str) -> str:
    """A plan of the benchmark's shards in ``out``, as a run would keep it."""
    found = list_archives([str(bench.folder / "shards")])

    def decide(sample: list[Chunk]) -> Terms:
        kept = {"bundle_digest": bench.info.digest, "archives": tuple(found), "engine": engine, "threads": 1}
        return Terms(**kept, tiles_per_chunk=4096, batch_size=8, probabilities=False)  # type: ignore[arg-type]

    out.mkdir()
    plans.write_plan(str(out), found, decide)
    return str(out)


def test_ratios_are_medians_of_those_of_each_round() -> None:
    """A machine that is twice as slow in one round changes rates, not ratios."""
    slow = ROUND | {
        "tiles_per_second": {name: rate / 2 for name, rate in ROUND["tiles_per_second"].items()},
        "core_seconds": {name: seconds * 2 for name, seconds in ROUND["core_seconds"].items()},
    }
    odd = ROUND | {"tiles_per_second": ROUND["tiles_per_second"] | {"whole": 10.0}}
    found = summary([ROUND, slow, odd], WORKERS)
    assert found["ceiling"] == pytest.approx(WORKERS / 2e-3)
    assert found["share"] == pytest.approx(0.8)
    assert found["over_ray_recipe"] == found["over_plain_loader"] == found["over_timm_style"] == 8
    assert found["over_ray_recipe_with_start"] == 5
    assert found["tiles_per_second"]["whole"] == 400
    assert found["binds"] == "forward"
    assert found["rounds"] == [ROUND, slow, odd]


@pytest.mark.parametrize(("forward", "ceiling"), [(1e-3, 2000.0), (1e-6, 8 / 5e-4)])
def test_with_gpus_the_slower_of_them_and_the_cores_is_the_ceiling(
    monkeypatch: pytest.MonkeyPatch, forward: float, ceiling: float
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    costs = ROUND["core_seconds"] | {"forward": forward}
    found = summary([ROUND | {"engine_device": "cuda", "core_seconds": costs}], WORKERS)
    assert found["ceiling"] == pytest.approx(ceiling)


def test_without_peers_nothing_is_compared() -> None:
    found = summary([ROUND | {"tiles_per_second": RATES}], WORKERS)
    assert not [name for name in found if name.startswith("over_")]
    assert "recipe" not in table(ABOUT | found)


def test_the_table_names_what_was_measured() -> None:
    shown = table(ABOUT | summary([ROUND], WORKERS))
    assert "whole job, once it runs        800         400" in shown
    assert "ceiling of the three         1,000" in shown
    assert "share of the ceiling         80.0%" in shown
    assert "over plain DataLoader         8.00        5.00" in shown
    assert "seconds of the start          25.0" in shown


def test_the_steady_rate_is_that_of_all_workers_at_work() -> None:
    """A worker does 50 tiles a second."""
    together = [(float(second), second + 1.0, 50) for second in (2, 3, 4, 5) for _ in range(2)]
    in_turn = [(2 + half / 2, 3 + half / 2, 50) for half in range(8)]
    late = [(-8.0 + second, -7.0 + second, 50) for second in range(10)]
    assert steady_rate(together, 2) == steady_rate(list(reversed(together)), 2) == 100
    assert steady_rate(in_turn, 2) == pytest.approx(100)
    assert steady_rate(late + together, 2) == 100
    assert steady_rate(in_turn[:1], 2) == 50
    idle = [(2.0, 2.5, 50), (2.0, 2.5, 50), (3.0, 3.5, 50), (3.0, 3.5, 50)]
    assert steady_rate(idle, 2) == pytest.approx(200 / 1.5)


def test_phases_fill_the_time_from_the_command_on() -> None:
    assert phases(10, {"a": 12, "b": 13, "c": 17}) == {"a": 2, "b": 1, "c": 4}
    assert phases(10, {"a": 12, "b": None, "c": 17}) == {"a": 2, "c": 5}
    assert phases(10, {"a": 12, "b": 11, "c": 17}) == {"a": 2, "b": 0, "c": 5}


def test_tiles_come_again_under_new_ids(shards: Path, tmp_path: Path) -> None:
    reader = TileReader(shards, "train")
    encoded = reader.read(range(10))
    write_shards(tmp_path / "shards", encoded, 25, 4, no_progress)
    link_images(tmp_path / "images", encoded, 25, 4)
    found: dict[str, bytes] = {}
    for shard in sorted((tmp_path / "shards").glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = tar.getmembers()
            assert len(members) == (4 if shard.stem != "shard-000006" else 1)
            for member in members:
                stream = tar.extractfile(member)
                assert stream
                found[Path(member.name).stem] = stream.read()
    assert list(found.values()) == [encoded[number % 10] for number in range(25)]
    assert {file.stem: file.read_bytes() for file in (tmp_path / "images").glob("*/*.jpg")} == found


def test_drawn_tiles_are_no_more_than_are_asked_for(tmp_path: Path) -> None:
    from training.synthetic import write_tiles

    assert len(draw_tiles(tmp_path / "drawn", 3, write_tiles)) == 3


def test_all_parts_get_the_same_tiles(shards: Path, bundle: Path, tmp_path: Path) -> None:
    with prepared(shards, str(bundle)) as bench:
        folder = bench.folder
        chunks = plans.open_plan(keep_plan(bench, tmp_path / "out", "torch"))
        assert chunks
        tiles = [tile for chunk in chunks for tile in read_chunk(chunk)]
        assert len({tile.tile_id for tile in tiles}) == bench.tiles == TILES
        assert {tile.tile_id for tile in tiles} == {file.stem for file in (folder / "images").glob("*/*")}
        assert {tile.data for tile in tiles} <= set(
            TileReader(shards, "train").read(range(len(TileReader(shards, "train"))))
        )
        assert chunks.chunks >= 8 * WORKERS
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tiles": 15}, "--tiles 15: too few to measure; 2 workers need 16"),
        ({"model": "lenet"}, "--peers: they have cnn and vgg16, and no lenet"),
        ({"model": "missing"}, "missing: no such bundle"),
    ],
)
def test_what_cannot_be_measured_is_refused(shards: Path, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says), prepared(shards, **arguments):
        pass


def test_a_cluster_is_refused(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(UsageError, match="RAY_ADDRESS: "), prepared(shards):
        pass


@pytest.mark.parametrize("name", PEERS)
def test_the_peers_stand_alone(name: str) -> None:
    nodes = list(ast.walk(ast.parse((PROGRAMS / f"{name}.py").read_text())))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {module.partition(".")[0] for module in imported} <= ALONE


def test_the_peers_have_the_models_that_are_compared() -> None:
    """`cnn` of theirs is that of tests/benchmarks/plain_ddp.py, `vgg16` torchvision's, as it is ours."""
    from torchvision.models import vgg16

    with torch.device("meta"):
        theirs, ours = vgg16(num_classes=10), models.build("vgg16", 10, SIDE)
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}
    assert PEER_MODELS == ("cnn", "vgg16")


@pytest.fixture(scope="module")
def bench_folder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards and images of :data:`TILES` tiles."""
    folder = tmp_path_factory.mktemp("bench")
    encoded = TileReader(shards, "train").read(range(20))
    write_shards(folder / "shards", encoded, TILES, 4, no_progress)
    link_images(folder / "images", encoded, TILES, 4)
    return folder


@pytest.mark.process
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.ray] * ("ray" in name)) for name in PEERS])
def test_a_peer_classifies_every_tile_once(name: str, bench_folder: Path, tmp_path: Path) -> None:
    folder, *options = PEERS[name]
    command = [PROGRAMS / f"{name}.py", bench_folder / folder, tmp_path / "out", *options]
    settings = ["--size=32", "--workers=2", "--batch-size=8", "--precision=bf16"]
    said = subprocess.run([sys.executable, *command, *settings], capture_output=True, text=True, check=True).stdout
    found = json.loads(said.splitlines()[-1])
    rows = pq.read_table(tmp_path / "out")
    assert set(rows["tile_id"].to_pylist()) == {file.stem for file in (bench_folder / "images").glob("*/*")}
    assert found["tiles"] == len(rows) == TILES
    assert set(rows["class_id"].to_pylist()) <= set(range(10))
    assert found["tiles_per_second"] > TILES / found["seconds"] / 2


@pytest.mark.process
def test_the_stages_are_measured_over_a_plan(shards: Path, bundle: Path, tmp_path: Path) -> None:
    with prepared(shards, str(bundle), peers=None) as bench:
        found = measure_stages(bench.bundle, keep_plan(bench, tmp_path / "out", "torch"), WORKERS)
    assert tuple(found) == STAGES
    assert all(seconds > 0 for seconds in found.values())


@pytest.mark.ray
@pytest.mark.process
@pytest.mark.timeout(600)
def test_the_whole_benchmark(shards: Path, bundle: Path) -> None:
    options = ["--model", bundle, "--tiles", TILES, "--workers", WORKERS, "--rounds", 1, "--peers", "f32"]
    arguments = ["bench", "classify", shards, *options, "engine=torch", "batch_size=8"]
    result = CliRunner().invoke(tilefleet.app, [str(argument) for argument in arguments], catch_exceptions=False)
    *lines, last = result.stdout.splitlines()
    found = json.loads(last)
    rates = found["tiles_per_second"]
    steady = {"whole", *PEERS}
    assert set(rates) == steady | {f"{name}_with_start" for name in steady}
    assert all(rate > 0 for rate in rates.values())
    assert found["ceiling"] == pytest.approx(WORKERS / sum(found["core_seconds"].values()))
    assert found["share"] == pytest.approx(rates["whole"] / found["ceiling"])
    assert 0 < found["share"] < 1.2
    assert found["binds"] in STAGES
    assert found["over_ray_recipe"] == pytest.approx(rates["whole"] / rates["ray_recipe"])
    assert found["over_plain_loader_with_start"] > 0
    assert sum(found["startup_seconds"].values()) < TILES / rates["whole_with_start"]
    assert list(found["startup_seconds"])[:2] == ["imports", "plan"]
    assert 50 < found["peak_memory_mb"]["driver"] < found["peak_memory_mb"]["worker"]
    assert (found["engine"], found["workers"], found["tiles"], found["peers"]) == ("torch", WORKERS, TILES, "f32")
    assert {"device", "torch", "ray", "model", "tile_size", "batch_size"} <= set(found)
    assert "share of the ceiling" in "\n".join(lines)
