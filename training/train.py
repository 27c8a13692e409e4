"""Ray Train around ``loop.py``: checks a recipe, starts DDP workers, follows them, comes back with the finished run.

Command: ``tilefleet train RECIPE.yaml [key=value ...] [--resume]``. Ray restarts workers that die; each restart goes
on from the newest whole checkpoint, so nothing is lost but the steps since then.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from cluster import records, storage
from cluster.session import available_cpus, available_gpus, session
from configs.errors import TilefleetError, UsageError
from configs.schema import RESUMABLE, Recipe, validate
from training.shards import Index, load_index

MAX_FAILURES = 3
"""Times that Ray restarts the workers of a run before it is given up."""

Follow = Callable[[records.Status], None]


def train(recipe: Recipe, *, resume: bool = False, follow: Follow | None = None) -> records.Status:
    """Train ``recipe`` to its end and return the last status; ``follow`` is shown each new status on the way.

    Raises :class:`UsageError` for a recipe that cannot run here, before anything is written or started, and
    :class:`TilefleetError` when the run failed; its checkpoints are kept then.
    """
    recipe = recipe.model_copy(
        update={"shards": storage.absolute(recipe.shards), "runs": storage.absolute(recipe.runs)}
    )
    check(recipe, load_index(recipe.shards))
    finished = _claim(recipe, resume=resume)
    if finished:
        return finished
    with session():
        layout = _layout(recipe)
        storage.write_bytes(
            storage.join(recipe.run, "config.yaml"), yaml.safe_dump(recipe.model_dump(mode="json")).encode()
        )
        _fit(recipe, layout, follow)
    status = records.read_status(recipe.run)
    if status is None or status.state != "done":
        raise TilefleetError(f"{recipe.run}: the workers ended without finishing the run; resume it with --resume")
    return status


def check(recipe: Recipe, index: Index) -> None:
    """Refuse what could never train, in one line that names the key."""
    tiles = index.tiles("train")
    if recipe.batch_size > tiles:
        raise UsageError(f"batch_size: {recipe.batch_size} is more than the {tiles} training tiles of {recipe.shards}")
    if recipe.workers > recipe.batch_size:
        raise UsageError(f"workers: {recipe.workers} is more than the batch_size of {recipe.batch_size}")
    import torch

    from training import models

    with torch.device("meta"):  # shapes only: the model is checked without memory for its weights
        models.build(recipe.model.name, len(index.classes), index.tile_size, **recipe.model.arguments)


def _claim(recipe: Recipe, *, resume: bool) -> records.Status | None:
    """Make sure that the run's folder is free or holds this very run; its status where it is already finished."""
    location = storage.join(recipe.run, "config.yaml")
    if not storage.exists(location):
        if storage.list_files(recipe.run):
            raise UsageError(f"{recipe.run}: the folder holds something else; choose another name or runs folder")
        return None
    if not resume:
        raise UsageError(f"{recipe.run}: holds another run; go on with --resume or choose another name, as name=NAME")
    before = validate(Recipe, yaml.safe_load(storage.read_bytes(location)), location)
    old, new = before.model_dump(), recipe.model_dump()
    changed = [key for key in new if key not in RESUMABLE and old[key] != new[key]]
    if changed:
        raise UsageError(f"{recipe.run}: cannot be resumed with another {', '.join(changed)}; choose another name")
    status = records.read_status(recipe.run)
    return status if status and status.state == "done" else None


def _layout(recipe: Recipe) -> dict[str, Any]:
    """Resources of each worker: a GPU where the cluster has them, otherwise an equal share of the CPUs."""
    gpus, cpus = available_gpus(), available_cpus()
    have, unit = (gpus, "GPUs") if gpus else (cpus, "CPUs")
    if recipe.workers > have:
        raise UsageError(f"workers: {recipe.workers} asked for, the cluster has {have} {unit}")
    if gpus:
        return {"use_gpu": True, "resources_per_worker": {"GPU": 1, "CPU": 1}}
    return {"use_gpu": False, "resources_per_worker": {"CPU": cpus // recipe.workers}}


def _fit(recipe: Recipe, layout: dict[str, Any], follow: Follow | None) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    records.clear_failure(recipe.run)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"recipe": recipe.model_dump(mode="json")},
        torch_config=TorchConfig(backend="nccl" if layout["use_gpu"] else "gloo"),
        scaling_config=ScalingConfig(num_workers=recipe.workers, **layout),
        run_config=RunConfig(
            name="ray", storage_path=recipe.run, failure_config=FailureConfig(max_failures=MAX_FAILURES)
        ),
    )
    with _following(recipe.run, follow):
        try:
            trainer.fit()
        except TrainingFailedError as error:
            records.write_failure(recipe.run, _last_line(error))
    if line := records.read_failure(recipe.run):
        records.mark_failed(recipe.run, line)
        raise TilefleetError(line)


def _worker(config: dict[str, Any]) -> None:
    """One DDP rank, in a process that Ray started."""
    import ray.train
    import ray.train.torch
    import torch

    from training.loop import Trainer

    recipe = Recipe.model_validate(config["recipe"])
    if records.read_failure(recipe.run):  # Ray restarts workers after any error, but this one it cannot mend
        return
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, math.floor(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
    try:
        Trainer(recipe, device, report=ray.train.report).fit()
    except TilefleetError as error:
        records.write_failure(recipe.run, str(error))
        raise


@contextmanager
def _following(run: str, follow: Follow | None) -> Iterator[None]:
    """Shows each new status of a run to ``follow`` from a thread, for the time of the block and once more after it."""
    if follow is None:
        yield
        return
    ended = threading.Event()

    def poll() -> None:
        shown, over = 0.0, False
        while not over:
            over = ended.wait(0.5)
            status = records.read_status(run)
            if status and status.updated > shown:
                shown = status.updated
                follow(status)

    thread = threading.Thread(target=poll, name="follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"training failed: {lines[-1] if lines else type(error).__name__}"
