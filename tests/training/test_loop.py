"""The training loop without Ray: resume, worker counts, uneven batches."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import records
from configs.errors import TilefleetError
from configs.schema import Recipe
from tests.runs import ROOT, losses, torchrun, trace, write_recipe
from training.bundle import load_bundle
from training.loop import Trainer
from training.shards import load_tiles

CPU = torch.device("cpu")


def recipe(keys: dict[str, Any], **changes: Any) -> Recipe:
    return Recipe.model_validate(keys | changes)


def seen(run: Recipe) -> list[str]:
    """The tiles of a run in global order; of a step that was done again, both times."""
    lines = sorted(trace(run), key=lambda line: (line["epoch"], line["step"], line["rank"]))
    return [tile for line in lines for tile in line["tiles"]]


def test_a_run_leaves_metrics_status_checkpoints_and_a_bundle(small_recipe: dict[str, Any]) -> None:
    run = recipe(small_recipe, epochs=3)
    Trainer(run, CPU).fit()
    rows, status = records.read_metrics(run.run), records.read_status(run.run)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert status
    assert status.state == "done"
    assert status.done_tiles == status.planned_tiles
    _, info = load_bundle(f"{run.run}/bundle")
    assert info.metrics["val_accuracy"] == max(row["val_accuracy"] for row in rows)


def test_stopped_and_resumed_is_equal_to_the_bit(small_recipe: dict[str, Any]) -> None:
    whole, stopped = recipe(small_recipe, name="whole", trace=True), recipe(small_recipe, name="stopped", trace=True)
    Trainer(whole, CPU).fit()

    class Stop(Exception):
        pass

    trainer = Trainer(stopped, CPU)
    step, calls = trainer.learner.step, []

    def stop_at_seventh(batch: Any, learning_rate: float) -> Any:
        calls.append(batch)
        if len(calls) == 7:  # one past the checkpoint of step 6
            raise Stop
        return step(batch, learning_rate)

    trainer.learner.step = stop_at_seventh  # type: ignore[method-assign]
    with pytest.raises(Stop):
        trainer.fit()
    Trainer(stopped, CPU).fit()
    assert losses(stopped) == losses(whole)
    assert seen(stopped) == seen(whole)
    a, b = load_bundle(f"{whole.run}/bundle")[0], load_bundle(f"{stopped.run}/bundle")[0]
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.process
def test_any_number_of_workers_trains_the_same_model(small_recipe: dict[str, Any]) -> None:
    """Batches of 16 over 3 workers are uneven, and the last one of an epoch is smaller still."""
    workers = 3
    keys = small_recipe | {"augment": {"symmetries": True, "mixup": 0.4}, "shuffle_window": 2, "trace": True}
    one, more = recipe(keys, name="one"), recipe(keys, name="more")
    Trainer(one, CPU).fit()
    torchrun(workers, "-m", "training.loop", write_recipe(more, Path(more.runs)))
    assert seen(more) == seen(one)
    assert len(list(Path(more.run).glob("trace-rank-*.jsonl"))) == workers
    for a, b in zip(losses(one), losses(more), strict=True):
        assert abs(a - b) <= 1e-4 * abs(a)
    for a, b in zip(records.read_metrics(one.run), records.read_metrics(more.run), strict=True):
        assert a["val_accuracy"] == pytest.approx(b["val_accuracy"], abs=0.05)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(small_recipe: dict[str, Any]) -> None:
    wild = recipe(small_recipe, optimizer={"name": "sgd", "learning_rate": 1e20}, schedule={"warmup": 0})
    with pytest.raises(TilefleetError, match="loss is not finite at epoch 1, step"):
        Trainer(wild, CPU).fit()
    assert not (Path(wild.run) / "bundle").exists()


def test_bf16_trains(small_recipe: dict[str, Any]) -> None:
    run = recipe(small_recipe, precision="bf16", epochs=3)
    Trainer(run, CPU).fit()
    rows = records.read_metrics(run.run)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


def test_a_changed_shard_stops_the_run_and_is_named(small_recipe: dict[str, Any], shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    shard = copy / "train" / "shard-000000.tar"
    tile = load_tiles(copy, "train").slice(0, 1).to_pylist()[0]
    data = bytearray(shard.read_bytes())
    data[tile["offset"] + tile["size"] // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(TilefleetError, match=r"shard-000000\.tar: tile .* changed"):
        Trainer(recipe(small_recipe, shards=str(copy)), CPU).fit()


@pytest.mark.process
def test_the_loop_runs_with_ray_not_installed(small_recipe: dict[str, Any], tmp_path: Path) -> None:
    run = recipe(small_recipe, epochs=1)
    hide = "import sys; sys.modules['ray'] = None; from training.loop import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", hide, write_recipe(run, tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (Path(run.run) / "bundle" / "bundle.json").exists()
