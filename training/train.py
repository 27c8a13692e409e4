"""Ray Train around ``loop.py``: checks a recipe, starts DDP workers, follows them, comes back with the finished run.

Command: ``tilefleet train RECIPE.yaml [key=value ...] [--resume]``. Ray restarts workers that die; each restart goes
on from the newest whole checkpoint, so nothing is lost but the steps since then.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import yaml

from cluster import records, stop, storage
from cluster.session import by_host, grown, require_shared, session
from configs.errors import TilefleetError, UsageError
from configs.schema import RESUMABLE, Recipe, validate
from training import checkpoint
from training.shards import Index, load_index

CONFIG = "config.yaml"

MAX_FAILURES = 3
"""Times that Ray restarts the workers of a run before it is given up; hosts that go after a notice do not count."""

RESIZE_SECONDS = 10.0
"""Time between two looks for hosts that came back, where a run goes on without them; a look costs one call."""

Follow = Callable[[records.Status], None]


def train(recipe: Recipe, *, resume: bool = False, follow: Follow | None = None) -> records.Status:
    """Train ``recipe`` to its end and return the last status; ``follow`` is shown each new status on the way.

    Raises :class:`UsageError` for a recipe that cannot run here, before anything is written or started, and
    :class:`TilefleetError` when the run failed; its checkpoints are kept then.
    """
    recipe = recipe.model_copy(
        update={"shards": storage.absolute(recipe.shards), "runs": storage.absolute(recipe.runs)}
    )
    finished = prepare(recipe, resume=resume)
    if finished:
        return finished
    with session(), grown(recipe.min_workers or recipe.workers):
        layout = _layout(recipe)
        require_shared(recipe.run, [recipe.shards, *_weights(recipe)])
        write_config(recipe)
        command = checkpoint.claim(recipe.run)
        _fit(recipe, layout, command, follow)
    status = records.read_status(recipe.run)
    if status and status.state == "stopped":
        raise TilefleetError(f"{recipe.run}: stopped, all is saved; go on with --resume, or submit it again")
    if status is None or status.state != "done":
        raise TilefleetError(f"{recipe.run}: the workers ended without finishing the run; resume it with --resume")
    return status


def prepare(recipe: Recipe, *, resume: bool) -> records.Status | None:
    """Refuse what cannot be trained, with a :class:`UsageError`; the status of the run where it is finished already."""
    check(recipe, load_index(recipe.shards))
    return find_run(recipe, resume=resume)


def check(recipe: Recipe, index: Index) -> None:
    """Refuse what could never train, in one line that names the key."""
    tiles = index.tiles("train")
    if recipe.batch_size > tiles:
        raise UsageError(f"batch_size: {recipe.batch_size} is more than the {tiles} training tiles of {recipe.shards}")
    if recipe.workers > recipe.batch_size:
        raise UsageError(f"workers: {recipe.workers} is more than the batch_size of {recipe.batch_size}")
    if recipe.min_workers and recipe.min_workers > recipe.workers:
        raise UsageError(f"min_workers: {recipe.min_workers} is more than workers, {recipe.workers}")
    if recipe.trace and storage.is_uri(recipe.run):
        raise UsageError(
            f"trace: is written line by line, which object storage cannot do; {recipe.runs} must be a folder"
        )
    import torch

    from training import models
    from training.augment import require_colours

    require_colours(recipe.augment, index.channels)
    kind, classes = recipe.model, len(index.classes)
    if kind.weights and index.channels != 3 and not storage.exists(kind.weights):
        raise UsageError(
            f"model.weights: {kind.weights} is for RGB tiles, and these have {index.channels} channels; leave it out, "
            "or name a file with the weights of a model of as many"
        )
    with torch.device("meta"):  # shapes only: the model is checked without memory for its weights
        models.build(kind.name, classes, index.tile_size, channels=index.channels, **kind.arguments)


def find_run(recipe: Recipe, *, resume: bool) -> records.Status | None:
    """Make sure that the run's folder is free or holds this very run; its status where it is already finished.

    Raises :class:`UsageError` where the folder holds anything else.
    """
    location = storage.join(recipe.run, CONFIG)
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


def write_config(recipe: Recipe) -> None:
    """Leave ``recipe`` in its run, which makes the folder a run."""
    storage.write_bytes(storage.join(recipe.run, CONFIG), yaml.safe_dump(recipe.model_dump(mode="json")).encode())


def _layout(recipe: Recipe) -> dict[str, Any]:
    """Workers and the resources of each: a GPU where the cluster has them, otherwise an equal share of the CPUs."""
    gpus, cpus = by_host("GPU"), by_host("CPU")
    have, unit = (sum(gpus), "GPUs") if any(gpus) else (sum(cpus), "CPUs")
    least = recipe.min_workers or recipe.workers
    if least > have:
        key = "min_workers" if recipe.min_workers else "workers"
        raise UsageError(f"{key}: {least} asked for, the cluster has {have} {unit}")
    workers = {"num_workers": (least, recipe.workers) if recipe.min_workers else recipe.workers}
    if any(gpus):
        return workers | {"use_gpu": True, "resources_per_worker": {"GPU": 1, "CPU": 1}}
    return workers | {"use_gpu": False, "resources_per_worker": {"CPU": cpu_share(cpus, min(recipe.workers, have))}}


def cpu_share(hosts: list[int], workers: int) -> int:
    """The most CPUs that each of ``workers`` can have when no worker spans hosts of so many CPUs."""
    return next(share for share in range(max(hosts), 0, -1) if sum(cpus // share for cpus in hosts) >= workers)


def _fit(recipe: Recipe, layout: dict[str, Any], command: str, follow: Follow | None) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    records.clear_failure(recipe.run)
    stop.clear(recipe.run)
    filesystem, path = storage.filesystem(recipe.run)  # Ray's own would know neither our tries nor one-request writes
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"recipe": recipe.model_dump(mode="json"), "command": command},
        torch_config=TorchConfig(backend="nccl" if layout["use_gpu"] else "gloo"),
        scaling_config=ScalingConfig(**layout, elastic_resize_monitor_interval_s=RESIZE_SECONDS),
        run_config=RunConfig(
            name="ray",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=MAX_FAILURES, max_preemption_failures=-1),
        ),
    )
    failure = None
    with _following(recipe.run, follow), _stoppable(recipe.run):
        try:
            trainer.fit()
        except TrainingFailedError as error:
            failure = _last_line(error)
    if not checkpoint.is_current(recipe.run, command):
        raise TilefleetError(f"{recipe.run}: another command has taken over this run; this one has stopped")
    if failure and not records.read_failure(recipe.run):
        records.write_failure(recipe.run, failure)
    if line := records.read_failure(recipe.run):
        records.mark_failed(recipe.run, line)
        raise TilefleetError(line)


def _worker(config: dict[str, Any]) -> None:
    """One DDP rank, in a process that Ray started."""
    import ray.train
    import ray.train.torch
    import torch

    from training.loop import Trainer
    from training.process import set_up

    recipe, command = Recipe.model_validate(config["recipe"]), config["command"]
    if not checkpoint.is_current(recipe.run, command):
        return
    if records.read_failure(recipe.run):  # Ray restarts workers after any error, but this one it cannot mend
        return
    device = ray.train.torch.get_device()
    set_up(device)
    if device.type == "cpu":
        torch.set_num_threads(max(1, math.floor(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
    try:
        Trainer(
            recipe,
            device,
            report=ray.train.report,
            command=command,
            notice=lambda: ray.train.get_preemption_info() is not None,
            stop=lambda: stop.is_asked(recipe.run),
        ).fit()
    except TilefleetError as error:
        if checkpoint.is_current(recipe.run, command):
            records.write_failure(recipe.run, str(error))
        raise


@contextmanager
def _stoppable(run: str) -> Iterator[None]:
    """Let SIGTERM, as when the job is stopped, be a wish that workers save a checkpoint and end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    began = time.time()

    def ask(number: int, frame: FrameType | None) -> None:
        status = records.read_status(run)
        if status is None or status.updated < began:  # no worker is at work that could save anything
            signal.default_int_handler(number, frame)
        stop.ask(run)

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _following(run: str, follow: Follow | None) -> Iterator[None]:
    """Shows each new status of a run to ``follow`` from a thread, for the time of the block and once more after it."""
    if follow is None:
        yield
        return
    ended = threading.Event()

    def poll() -> None:
        shown, over, wait = 0.0, False, 5.0 if storage.is_uri(run) else 0.5  # each look at a store costs requests
        while not over:
            over = ended.wait(wait)
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


def _weights(recipe: Recipe) -> list[str]:
    """The file with which training starts, where it is one."""
    weights = recipe.model.weights
    return [weights] if weights and storage.exists(weights) else []


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"training failed: {lines[-1] if lines else type(error).__name__}"
