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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from cluster import storage
from cluster.records import StatusWriter
from cluster.session import available_cpus, available_gpus, session
from configs.errors import TilefleetError, UsageError
from inference import archive, sink
from inference.archive import BadArchive, Chunk, Plan, Progress, Terms
from inference.predictor import ENGINES, Predictor
from inference.sink import Summary
from training.bundle import check_bundle, read_info

SUCCESS = "_SUCCESS.json"
THREADS = 1
"""PyTorch threads of an actor: one for each CPU it holds."""

CHUNK_RETRIES = 3
"""How often a chunk whose worker process died is tried again."""


class ClassifyConfig(BaseModel):
    """Options of a run. ``workers`` defaults to the GPUs of the cluster, or to its CPUs where it has none."""

    model_config = ConfigDict(extra="forbid")

    tiles_per_chunk: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=256, ge=1)
    workers: int | None = Field(default=None, ge=1)
    probabilities: bool = False


class Totals(BaseModel):
    """``_SUCCESS.json``. Counts are over all parts; seconds and rate are those of the run that finished."""

    model_config = ConfigDict(extra="forbid")

    tiles: int
    classified: int
    errors: int
    unknown: int
    errors_by_stage: dict[str, int]
    tiles_by_class: dict[str, int]
    bad_archives: list[BadArchive]
    chunks: int
    seconds: float
    tiles_per_second: float
    engine: str


class ChunkClassifier:
    """One worker: loads the bundle once, then turns chunks into part files and answers with their summaries.

    An error that a user can fix is an answer too: raised, it would reach the driver inside a stack trace of Ray's.
    """

    def __init__(self, bundle: str, out: str, terms: dict[str, Any]) -> None:
        self.bundle = bundle
        self.out = out
        self.terms = Terms.model_validate(terms)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """One row with the fields of a chunk in; one row with ``summary`` (JSON) or ``error`` out."""
        try:
            summary = self._classify(Chunk(**batch.to_pylist()[0]))
            answer: dict[str, list[str | None]] = {"summary": [summary.model_dump_json()], "error": [None]}
        except TilefleetError as error:
            answer = {"summary": [None], "error": [str(error)]}
        return pa.table(answer, schema=pa.schema([("summary", pa.string()), ("error", pa.string())]))

    @cached_property
    def _predictor(self) -> Predictor:
        device = next(device for device, engine in ENGINES.items() if engine == self.terms.engine)
        return Predictor(self.bundle, device, self.terms.batch_size, self.terms.threads)

    def _classify(self, chunk: Chunk) -> Summary:
        part = sink.part_location(self.out, chunk.id)
        if storage.exists(part):  # an earlier try wrote it and died before it could answer
            return sink.read_summary(part)
        began = time.perf_counter()
        tiles = archive.read_chunk(chunk)
        read = time.perf_counter() - began
        predictions = self._predictor.predict([tile.data or b"" for tile in tiles])
        unread = sum(tile.error is not None for tile in tiles)
        undecoded = sum(error is not None for error in predictions.errors) - unread
        table = sink.make_table(
            chunk.archive,
            [tile.tile_id for tile in tiles],
            [tile.error or error for tile, error in zip(tiles, predictions.errors, strict=True)],
            predictions.class_id,
            predictions.confidence,
            predictions.is_unknown,
            self._predictor.info.classes,
            predictions.probabilities if self.terms.probabilities else None,
        )
        seconds = {"read": read, **predictions.seconds}
        summary = sink.summarise(table, {"read": unread, "decode": undecoded}, seconds)
        began = time.perf_counter()
        sink.write_part(self.out, chunk.id, table, summary)
        return summary.model_copy(update={"seconds": seconds | {"write": time.perf_counter() - began}})


def classify(
    bundle: str,
    archives: Sequence[str],
    out: str,
    config: ClassifyConfig | None = None,
    progress: Progress | None = None,
) -> Totals:
    """Classify every tile of ``archives`` into ``out`` and return the totals; a finished run answers at once.

    ``progress`` is called with (``plan``, archives done, archives) and (``classify``, tiles done, tiles). Raises
    :class:`UsageError` where ``out`` holds something else or ``workers`` is too many, :class:`TilefleetError` where no
    tile could be planned, an archive changed, a disk is full or a worker keeps dying. Finished parts are always kept.
    """
    began = time.monotonic()
    config = config or ClassifyConfig()
    bundle, out = storage.absolute(bundle), storage.absolute(out)
    wanted = Terms(
        bundle_digest=read_info(bundle).digest,
        archives=tuple(sorted(storage.absolute(location) for location in archives)),
        engine="",
        threads=THREADS,
        **config.model_dump(exclude={"workers"}),
    )
    saved = _saved_run(out, wanted)
    if saved and storage.exists(storage.join(out, SUCCESS)):
        return Totals.model_validate_json(storage.read_bytes(storage.join(out, SUCCESS)))
    check_bundle(bundle)
    tars = [] if saved else archive.list_archives(archives)
    storage.make_dirs(out)
    status = StatusWriter(out, "classify")
    with _failure_recorded(status):
        plan, terms = saved or (_new_plan(tars, config, progress), wanted)
        done = archive.finished(out)
        todo = [chunk for chunk in plan.chunks if chunk.id not in done]
        before = _add_up(out, [chunk for chunk in plan.chunks if chunk.id in done])
        if todo:
            with session():
                terms, workers = _resources(terms, config.workers, len(todo))
                if not saved:
                    archive.write_plan(out, plan, terms)
                status.update(force=True, workers=workers, planned_tiles=plan.tiles)
                _follow(_answers(todo, bundle, out, terms, workers), before, plan.tiles, status, progress)
        after = _add_up(out, plan.chunks)
        if after.tiles != plan.tiles:
            raise TilefleetError(f"{out}: {after.tiles} rows for {plan.tiles} tiles; classify into a new folder")
        seconds = time.monotonic() - began
        totals = Totals(
            **after.model_dump(exclude={"seconds"}),
            bad_archives=plan.bad,
            chunks=len(plan.chunks),
            seconds=seconds,
            tiles_per_second=(after.tiles - before.tiles) / seconds,
            engine=terms.engine,
        )
        storage.write_bytes(storage.join(out, SUCCESS), totals.model_dump_json(indent=1).encode())
        status.update(planned_tiles=plan.tiles, done_tiles=plan.tiles)
        status.finish("done")
    return totals


def _saved_run(out: str, wanted: Terms) -> tuple[Plan, Terms] | None:
    """The plan in ``out``, or None where a new run may begin; raises where ``out`` is taken by something else."""
    if storage.exists(out) and not storage.is_dir(out):
        raise UsageError(f"{out}: is a file; name a folder for the predictions")
    saved = archive.read_plan(out)
    if saved is None:
        if any(not _is_leftover(location) for location in storage.list_files(out, recursive=True)):
            raise UsageError(f"{out}: holds something else than a classify run; choose an empty folder")
        return None
    if differing := wanted.differences(saved[1]):
        raise UsageError(f"{out}: holds another run (other {', '.join(differing)}); choose another folder")
    return saved


def _is_leftover(location: str) -> bool:
    """Whether a run that was killed while it planned may have left this file."""
    name = PurePosixPath(location).name
    return name == "status.json" or (name.startswith(".") and name.endswith(".tmp"))


def _new_plan(tars: Sequence[str], config: ClassifyConfig, progress: Progress | None) -> Plan:
    plan = archive.plan(tars, config.tiles_per_chunk, progress)
    if not plan.chunks:
        first = plan.bad[0]
        more = f", and {len(plan.bad) - 1} more archives are no better" if len(plan.bad) > 1 else ""
        raise TilefleetError(f"{first.archive}: {first.reason}{more}; there is nothing to classify")
    return plan


def _resources(terms: Terms, workers: int | None, chunks: int) -> tuple[Terms, int]:
    """The terms with the engine filled in, and the actors to start; a resumed run keeps its engine."""
    gpus = available_gpus()
    terms = terms.model_copy(update={"engine": terms.engine or ENGINES["cuda" if gpus else "cpu"]})
    limit, kind = (gpus, "GPUs") if terms.engine == ENGINES["cuda"] else (available_cpus(), "CPUs")
    if not limit:
        raise UsageError(f"the run was begun with the engine {terms.engine}, and this cluster has no {kind}")
    if workers and workers > limit:
        raise UsageError(f"workers={workers}: the cluster has {limit} {kind}; ask for {limit} or fewer")
    return terms, min(workers or limit, chunks)


def _answers(chunks: Sequence[Chunk], bundle: str, out: str, terms: Terms, workers: int) -> Iterator[Summary]:
    """Summaries of ``chunks`` as they are finished, by a pool of ``workers`` actors; raises the first error."""
    import ray.data
    import ray.exceptions
    from ray.util.annotations import RayDeprecationWarning

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    with ray.data.DataContext.current(context):
        dataset = ray.data.from_items([vars(chunk) for chunk in chunks], override_num_blocks=len(chunks))
        with warnings.catch_warnings():  # there is no newer way to bound the tries; unbounded, a deadly tile never ends
            warnings.simplefilter("ignore", RayDeprecationWarning)
            dataset = dataset.map_batches(
                ChunkClassifier,
                fn_constructor_args=(bundle, out, terms.model_dump()),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
                num_cpus=1,
                num_gpus=1 if terms.engine == ENGINES["cuda"] else 0,
                max_task_retries=CHUNK_RETRIES,  # restarts of actors are unbounded
            )
        try:
            for row in dataset.iter_rows():
                if row["error"] is not None:
                    raise TilefleetError(row["error"])
                yield Summary.model_validate_json(row["summary"])
        except ray.exceptions.RayActorError as error:
            raise TilefleetError(
                f"{out}: worker processes died {CHUNK_RETRIES + 1} times over one chunk, perhaps for lack of memory; "
                "what is finished is kept: run the same command again with fewer workers"
            ) from error


def _follow(
    answers: Iterator[Summary], before: Summary, planned: int, status: StatusWriter, progress: Progress | None
) -> None:
    """Keep ``status.json`` and the progress current while answers come."""
    total = before
    while True:
        status.update(
            done_tiles=total.tiles,
            failed_by_stage=total.errors_by_stage,
            seconds_by_stage=total.seconds,
            tiles_by_class=total.tiles_by_class,
        )
        if progress:
            progress("classify", total.tiles, planned)
        answer = next(answers, None)
        if answer is None:
            return
        total = sink.summed([total, answer])


def _add_up(out: str, chunks: Sequence[Chunk]) -> Summary:
    """What the footers of the chunks' parts say, together."""
    with ThreadPoolExecutor(16) as pool:
        return sink.summed(pool.map(lambda chunk: sink.read_summary(sink.part_location(out, chunk.id)), chunks))


@contextmanager
def _failure_recorded(status: StatusWriter) -> Iterator[None]:
    """Leave ``failed`` and the reason in ``status.json`` when the block fails; a full disk must not hide the reason."""
    try:
        yield
    except BaseException as error:
        reason = str(error) or type(error).__name__
        try:
            status.finish("failed", reason)
        except TilefleetError:  # the disk is full: the room of the old status does for the new one
            storage.remove(status.location)
            with suppress(TilefleetError):
                status.finish("failed", reason)
        raise
