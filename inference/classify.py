"""Archives become predictions, each tile exactly once, over all CPUs or GPUs of a Ray cluster.

Plan, then read, predict and write chunk by chunk in a pool of actors, then add up. A chunk whose part file is there is
done, so the same command run again finishes what an earlier one left:

    tilefleet classify BUNDLE ARCHIVE... --out DIR
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Literal

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
from inference.pool import Size, run_pass
from inference.sink import Summary
from training.bundle import check_bundle, read_info

THREADS = 1
"""Threads of an actor's engine: one for each CPU it holds."""

TRIES, CAREFUL_FROM = 4, 2
"""How many workers may die over a chunk, and from how many on its tiles are first decoded in processes that may die."""

CALL_SECONDS, LEAST_CALLS = 4.0, 16
"""What a worker is given at once: chunks for about so long, but so few that each worker is called so often. A call
costs Ray the time of some tens of tiles; a chunk may be as short."""

DISK_PATIENCE = 600.0
"""Seconds that a worker waits for room on a full disk."""


class ClassifyConfig(BaseModel):
    """Options of a run. ``workers`` defaults to the GPUs of the cluster, or to its CPUs where it has none; they become
    more with the cluster, unless they are given.

    ``decode`` says who decodes tiles: threads of each worker (``cpu``), its GPU (``gpu``), or processes on CPUs that
    the workers leave free, anywhere in the cluster (``pool``). ``auto`` is ``cpu`` where workers have no GPU; where
    they have, the faster of ``cpu`` and ``gpu`` on tiles of the archives. ``pool`` is taken only where it is asked for:
    it is for GPUs on machines with few cores. A run in which more than ``max_error_share`` of all tiles end as an error
    is stopped as soon as that is certain.
    """

    model_config = ConfigDict(extra="forbid")

    tiles_per_chunk: int = Field(default=4096, ge=1)
    batch_size: int = Field(default=256, ge=1)
    workers: int | None = Field(default=None, ge=1)
    engine: Literal["auto", "torch", "torch-bf16", "openvino", "openvino-bf16", "compiled-bf16"] = "auto"
    decode: Literal["auto", "cpu", "gpu", "pool"] = "auto"
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
    :class:`UsageError` where ``out`` holds something else, another process works on it, or ``workers`` or ``decode``
    asks for what the cluster lacks; :class:`TilefleetError` where no tile could be planned, an archive changed, a disk
    stays full, too many tiles are bad or a chunk keeps ending its worker. Finished parts are always kept.
    """
    began = time.monotonic()
    config = config or ClassifyConfig()
    bundle, out = storage.absolute(bundle), storage.absolute(out)
    info = read_info(bundle)
    wanted = Terms(
        bundle_digest=info.digest,
        archives=tuple(sorted(storage.absolute(location) for location in archives)),
        bands=info.bands,
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
            size = _size(saved.terms, config.workers, len(todo))
            account.status.update(force=True, workers=size.workers, wanted_workers=size.workers)
            for summary in chain([Summary()], _answers(todo, bundle, saved, size)):
                total = sink.summed([total, summary])
                workers = min(size.most, _limit(saved.terms)[0]) if account.status.is_due else None
                account.of_tiles(total, saved, progress, workers)
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
    """``wanted`` with engine and decoder filled in, found by a worker; starts Ray for the rest of ``stack``."""
    stack.enter_context(session())
    stack.enter_context(grown(1))
    import ray  # only now, as it reads its settings then
    import ray.exceptions

    from inference.worker import choose_engine

    if wanted.decode == "pool":
        _check_pool(1)  # before there is a plan that says so
    gpus = available_gpus()
    if not gpus and wanted.engine == "torch" and wanted.decode != "gpu":
        return wanted.model_copy(update={"decode": "cpu"} if wanted.decode == "auto" else {})
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


def _size(terms: Terms, workers: int | None, chunks: int) -> Size:
    """The pool to start with: a worker for each GPU or CPU, but no more than chunks."""
    limit, kind = _limit(terms)
    if terms.decode == "pool":
        _check_pool(workers or 1)
    if not limit:
        raise UsageError(f"the run was begun on {kind}, and this cluster has none")
    if workers and workers > limit:
        raise UsageError(f"workers={workers}: the cluster has {limit} {kind}; ask for {limit} or fewer")
    first = min(workers or limit, chunks)
    most = min(workers or chunks, chunks)
    if terms.decode != "pool":
        return Size(first, most)
    decoders = available_cpus() // first - 1
    return Size(first, most if kind == "GPUs" else first, decoders)  # Ray Data knows of no CPUs that decoders hold


def _limit(terms: Terms) -> tuple[int, str]:
    """How many workers the cluster has room for now, and what each of them takes."""
    limit, kind = (available_gpus(), "GPUs") if terms.device == "cuda" else (available_cpus(), "CPUs")
    return min(limit, available_cpus() // 2) if terms.decode == "pool" else limit, kind


def _check_pool(workers: int) -> None:
    """Raise :class:`UsageError` where the cluster has no CPU for each of so many workers and one for its decoder."""
    cpus = available_cpus()
    if cpus < 2 * workers:
        raise UsageError(
            f"decode=pool: {2 * workers} CPUs are needed, one for each worker and one to decode for it, and the "
            f"cluster has {cpus}; " + (f"ask for workers={cpus // 2}" if cpus > 1 else "choose decode=cpu")
        )


def _answers(todo: Sequence[int], bundle: str, plan: PlanFile, size: Size) -> Iterator[Summary]:
    """The summaries of chunks as they are finished; ends when every one of ``todo`` is done.

    A chunk whose worker died is left to the next pass. Raises the first error that a worker answers, and where a chunk
    ends its workers again and again.
    """
    out = plan.location.rpartition("/")[0]
    for deaths in range(TRIES):
        left = set(todo)
        each = 1 if deaths else _chunks_a_call(plan, len(todo), size.workers)
        for number, answer in run_pass(todo, each, bundle, plan, DISK_PATIENCE, deaths >= CAREFUL_FROM, size):
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


def _check_errors(out: str, total: Summary, plan: PlanFile, allowed: float) -> None:
    if total.errors > allowed * max(plan.tiles, total.tiles):
        raise TilefleetError(
            f"{out}: {total.errors} of {max(plan.tiles, total.tiles)} tiles are bad already, more than "
            f"max_error_share={allowed:g}; the error column says why, what is finished is kept"
        )
