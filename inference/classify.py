"""Archives become predictions, each tile exactly once, over all CPUs or GPUs of a Ray cluster.

Plan, then read, predict and write chunk by chunk in a pool of actors, then add up. A chunk whose part file is there is
done, so the same command run again finishes what an earlier one left:

    tilefleet classify BUNDLE ARCHIVE... --out DIR
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster import storage
from cluster.claim import claimed
from cluster.session import available_cpus, available_gpus, grown, require_shared, session
from configs.errors import TilefleetError, UsageError
from inference import plan as plans
from inference import sink
from inference.account import Account
from inference.archive import list_archives
from inference.ledger import Totals, add_up, finished, read_totals, take, write_totals
from inference.plan import BadArchive, Chunk, PlanFile, Progress, Terms
from inference.sink import Summary
from training.bundle import check_bundle, read_info

THREADS = 1
"""Threads of an actor's engine: one for each CPU it holds."""

TRIES, CAREFUL_FROM = 4, 2
"""How many workers may die over a chunk, and from how many on its tiles are first decoded in processes that may die."""

STARTS = 10
"""How many workers, for each that is wanted, may die in a row before they can work."""

CALL_SECONDS, LEAST_CALLS = 4.0, 16
"""What a worker is given at once: chunks for about so long, but so few that each worker is called so often. A call
costs Ray the time of some tens of tiles; a chunk may be as short."""

DISK_PATIENCE = 600.0
"""Seconds that a worker waits for room on a full disk."""


class ClassifyConfig(BaseModel):
    """Options of a run. ``workers`` defaults to the GPUs of the cluster, or to its CPUs where it has none.

    A run in which more than ``max_error_share`` of all tiles end as an error is stopped as soon as that is certain.
    """

    model_config = ConfigDict(extra="forbid")

    tiles_per_chunk: int = Field(default=4096, ge=1)
    batch_size: int = Field(default=256, ge=1)
    workers: int | None = Field(default=None, ge=1)
    engine: Literal["auto", "torch", "torch-bf16", "openvino", "openvino-bf16", "compiled-bf16"] = "auto"
    probabilities: bool = False
    max_error_share: float = Field(default=1.0, ge=0, le=1)


def classify(
    bundle: str,
    archives: Sequence[str],
    out: str,
    config: ClassifyConfig | None = None,
    progress: Progress | None = None,
) -> Totals:
    """Classify every tile of ``archives`` into ``out`` and return the totals; a finished run answers at once.

    ``progress`` is called with (``plan``, archives done, archives) and (``classify``, tiles done, tiles). Raises
    :class:`UsageError` where ``out`` holds something else, another process works on it or ``workers`` is too many,
    :class:`TilefleetError` where no tile could be planned, an archive changed, a disk stays full, too many tiles are
    bad or a chunk keeps ending its worker. Finished parts are always kept.
    """
    began = time.monotonic()
    config = config or ClassifyConfig()
    bundle, out = storage.absolute(bundle), storage.absolute(out)
    info = read_info(bundle)
    wanted = Terms(
        bundle_digest=info.digest,
        archives=tuple(sorted(storage.absolute(location) for location in archives)),
        threads=THREADS,
        **config.model_dump(exclude={"workers", "max_error_share"}),
    )
    saved = take(out, wanted)
    if saved and (totals := read_totals(out)):
        return totals
    check_bundle(bundle)
    found = [] if saved else list_archives(archives)
    storage.make_dirs(out)
    with claimed(out), ExitStack() as stack:
        account = Account(out, info, config.max_error_share)
        stack.enter_context(account.of_the_end())
        saved = take(out, wanted)  # another driver may have been at work until now
        if not saved:
            plans.write_plan(
                out,
                found,
                lambda sample: _decide(stack, bundle, wanted, sample),
                config.tiles_per_chunk,
                account.of_planning(progress),
            )
            saved = take(out, wanted)
            assert saved
        done = finished(out)
        before = add_up(out, done)
        todo = [number for number in range(saved.chunks) if plans.chunk_id(number) not in done]
        total = before
        _check_errors(out, total, saved, config.max_error_share)
        if todo:
            stack.enter_context(session())
            stack.enter_context(grown(config.workers or 1))
            require_shared(out, [bundle, *filter(storage.exists, saved.terms.archives)])
            workers = _workers(saved.terms, config.workers, len(todo))
            account.status.update(force=True, workers=workers, wanted_workers=workers)
            for summary in chain([Summary()], _answers(todo, bundle, saved, workers)):
                total = sink.summed([total, summary])
                account.status.update(workers=min(workers, _limit(saved.terms)[0]))
                account.of_tiles(total, saved, progress)
                _check_errors(out, total, saved, config.max_error_share)
        seconds = time.monotonic() - began
        totals = Totals(
            **total.model_dump(include=Totals.model_fields.keys() - {"seconds", "bad_archives"}),
            bad_archives=saved.bad + [BadArchive(*found) for found in sorted(total.bad_archives.items())],
            chunks=saved.chunks,
            seconds=seconds,
            tiles_per_second=(total.tiles - before.tiles) / seconds,
            engine=saved.terms.engine,
        )
        write_totals(out, totals, DISK_PATIENCE)
        account.of_tiles(total, saved)
        account.status.update(planned_tiles=total.tiles)
        account.status.finish("done")
    return totals


def _decide(stack: ExitStack, bundle: str, wanted: Terms, sample: list[Chunk]) -> Terms:
    """``wanted`` with the engine filled in, found by a worker; starts Ray for the rest of ``stack``."""
    stack.enter_context(session())
    stack.enter_context(grown(1))
    import ray  # only now, as it reads its settings then
    import ray.exceptions

    from inference.worker import choose_engine

    gpus = available_gpus()
    if not gpus and wanted.engine == "torch":
        return wanted
    choose = ray.remote(num_cpus=1, num_gpus=min(1, gpus), max_retries=0)(choose_engine)
    for careful in (False, True):
        try:
            chosen = choose.remote(bundle, sample, wanted, careful)
            import ray.data  # needed next, and takes seconds: meanwhile

            answer: Terms | TilefleetError = ray.get(chosen)
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError:  # it died: a tile of the sample may be deadly
            continue
        if isinstance(answer, TilefleetError):
            raise answer
        return answer
    raise TilefleetError(f"{bundle}: the process that tries engines died twice; name one with engine=torch")


def _workers(terms: Terms, workers: int | None, chunks: int) -> int:
    """The actors to start: one for each GPU or CPU, but no more than chunks."""
    limit, kind = _limit(terms)
    if not limit:
        raise UsageError(f"the run was begun on {kind}, and this cluster has none")
    if workers and workers > limit:
        raise UsageError(f"workers={workers}: the cluster has {limit} {kind}; ask for {limit} or fewer")
    return min(workers or limit, chunks)


def _limit(terms: Terms) -> tuple[int, str]:
    """How many actors the cluster has room for now, and what each of them takes."""
    return (available_gpus(), "GPUs") if terms.device == "cuda" else (available_cpus(), "CPUs")


def _answers(todo: Sequence[int], bundle: str, plan: PlanFile, workers: int) -> Iterator[Summary]:
    """The summaries of chunks as they are finished; ends when every one of ``todo`` is done.

    A chunk whose worker died is left to the next pass. Raises the first error that a worker answers, and where a chunk
    ends its workers again and again.
    """
    out = plan.location.rpartition("/")[0]
    for deaths in range(TRIES):
        left = set(todo)
        each = 1 if deaths else _chunks_a_call(plan, len(todo), workers)
        for number, answer in _pass(todo, each, bundle, plan, workers, deaths >= CAREFUL_FROM):
            left.remove(number)
            yield answer
        written = left & set(map(int, finished(out)))  # by workers that died before they could answer
        yield add_up(out, map(plans.chunk_id, sorted(written)))
        todo = sorted(left - written)
        if not todo:
            return
    archive = plan.read(todo[0], todo[0] + 1)[0].archive
    raise TilefleetError(
        f"{archive}: {TRIES} worker processes died over its chunk {plans.chunk_id(todo[0])}, perhaps for "
        "lack of memory; what is finished is kept: run the same command again with fewer workers"
    )


def _chunks_a_call(plan: PlanFile, chunks: int, workers: int) -> int:
    trial = plan.terms.trials.get(plan.terms.engine, {})
    rate, tiles = trial.get("tiles_per_second") or 0.0, plan.tiles / plan.chunks
    return max(1, min(int(CALL_SECONDS * rate / max(tiles, 1)), chunks // (LEAST_CALLS * workers)))


def _pass(
    numbers: Sequence[int], each: int, bundle: str, plan: PlanFile, workers: int, careful: bool
) -> Iterator[tuple[int, Summary]]:
    """Numbers and summaries of chunks as they are finished by a pool of actors, about ``each`` to a call; of dead
    actors those of the call are missing.
    """
    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = -1  # only death is an error there: see ChunkClassifier
    context.max_consecutive_actor_init_deaths = STARTS * workers
    context.execution_no_progress_timeout_s = -1  # a chunk may take longer, and so may room on a disk or for an actor
    calls = -(-len(numbers) // each)
    with ray.data.DataContext.current(context):
        dataset = ray.data.from_items([{"number": n} for n in numbers], override_num_blocks=calls)
        with warnings.catch_warnings():  # there is no newer way to say how often a task is tried
            warnings.simplefilter("ignore", RayDeprecationWarning)
            dataset = dataset.map_batches(
                ChunkClassifierActor,
                fn_constructor_args=(bundle, plan, DISK_PATIENCE, careful),
                batch_size=None,
                compute=ray.data.ActorPoolStrategy(size=min(workers, calls), max_tasks_in_flight_per_actor=2),
                num_cpus=1,
                num_gpus=1 if plan.terms.device == "cuda" else 0,
                max_task_retries=0,  # a retry would wait for its own actor, which may wait for a host that is gone
            )
        for row in dataset.iter_rows():
            if row["error"]:
                raise TilefleetError(row["error"])
            yield row["number"], Summary.model_validate_json(row["summary"])


class ChunkClassifierActor:
    """A :class:`ChunkClassifier` as Ray Data calls it."""

    def __init__(self, bundle: str, plan: PlanFile, patience: float, careful: bool) -> None:
        from inference.worker import ChunkClassifier

        self.classifier = ChunkClassifier(bundle, plan, patience)
        self.careful = careful

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The ``number`` of each chunk in; they and the ``summary`` (JSON) or ``error`` of each out."""
        answers = [self.classifier.classify(int(number), self.careful) for number in batch["number"]]
        errors = [str(answer) if isinstance(answer, TilefleetError) else "" for answer in answers]
        summaries = ["" if isinstance(answer, TilefleetError) else answer.model_dump_json() for answer in answers]
        return {"number": batch["number"], "summary": summaries, "error": errors}


def _check_errors(out: str, total: Summary, plan: PlanFile, allowed: float) -> None:
    if total.errors > allowed * max(plan.tiles, total.tiles):
        raise TilefleetError(
            f"{out}: {total.errors} of {max(plan.tiles, total.tiles)} tiles are bad already, more than "
            f"max_error_share={allowed:g}; the error column says why, what is finished is kept"
        )
