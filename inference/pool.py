"""Ray around :mod:`inference.worker`: a pool of workers that goes through chunks, and decoders that work for them.

Numbers of chunks come in, their summaries go out as they are finished. The pool has a worker for each GPU or CPU that
the cluster has at the moment: it grows when nodes join and goes on when nodes leave.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from configs.errors import TilefleetError
from inference.plan import PlanFile
from inference.sink import Summary

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from inference.predictor import Decode, Decoded
    from training.bundle import BundleInfo

STARTS = 10
"""How many workers, for each that is wanted, may die in a row before they can work."""

PART_TILES = 32
"""Tiles that a decoder is given at once: a call costs about as much as decoding one or two."""


@dataclass(frozen=True)
class Size:
    """How many workers there are at first, how many there may be, and how many decoders each has of its own."""

    workers: int
    most: int
    decoders: int = 0


def run_pass(
    numbers: Sequence[int], each: int, bundle: str, plan: PlanFile, patience: float, careful: bool, size: Size
) -> Iterator[tuple[int, Summary]]:
    """Numbers and summaries of chunks as they are finished by a pool of workers, about ``each`` to a call; of workers
    that died those of the call are missing. Raises the first error that one answers.
    """
    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = -1  # only death is an error there: see ChunkClassifier
    context.max_consecutive_actor_init_deaths = STARTS * size.workers
    context.execution_no_progress_timeout_s = -1  # a chunk may take longer, and so may room on a disk or for an actor
    calls = -(-len(numbers) // each)
    first, most = min(size.workers, calls), min(size.most, calls)
    with ray.data.DataContext.current(context):
        dataset = ray.data.from_items([{"number": n} for n in numbers], override_num_blocks=calls)
        with warnings.catch_warnings():  # there is no newer way to say how often a task is tried
            warnings.simplefilter("ignore", RayDeprecationWarning)
            dataset = dataset.map_batches(
                ChunkClassifierActor,
                fn_constructor_args=(bundle, plan, patience, careful, size.decoders),
                batch_size=None,
                compute=ray.data.ActorPoolStrategy(
                    min_size=1, initial_size=first, max_size=most, max_tasks_in_flight_per_actor=2
                ),
                num_cpus=1,
                num_gpus=1 if plan.terms.device == "cuda" else 0,
                max_task_retries=0,  # a retry would wait for its own actor, which may wait for a host that is gone
            )
        for row in dataset.iter_rows():
            if row["error"]:
                raise TilefleetError(row["error"])
            yield row["number"], Summary.model_validate_json(row["summary"])


class ChunkClassifierActor:
    """A :class:`ChunkClassifier` as Ray Data calls it; with ``decoders`` so many processes decode for it."""

    def __init__(self, bundle: str, plan: PlanFile, patience: float, careful: bool, decoders: int) -> None:
        from inference.worker import ChunkClassifier

        pool = partial(start_decoders, decoders) if decoders else None
        self.classifier = ChunkClassifier(bundle, plan, patience, pool)
        self.careful = careful

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The ``number`` of each chunk in; they and the ``summary`` (JSON) or ``error`` of each out."""
        answers = [self.classifier.classify(int(number), self.careful) for number in batch["number"]]
        errors = [str(answer) if isinstance(answer, TilefleetError) else "" for answer in answers]
        summaries = ["" if isinstance(answer, TilefleetError) else answer.model_dump_json() for answer in answers]
        return {"number": batch["number"], "summary": summaries, "error": errors}


def start_decoders(count: int, info: BundleInfo, batch_size: int) -> tuple[Decode, int]:
    """What decodes for the worker that calls this, and how many batches of a stream keep ``count`` decoders at work."""
    return DecoderPool(info, count), max(2, -(-2 * count * PART_TILES // batch_size))


class DecoderPool:
    """Decodes batches by ``count`` processes, each on a CPU anywhere in the cluster, to the bits that threads give.

    They end with the process that started them, which decodes by itself as long as none of them is up, and what one
    held that died. So a tile that ends the process that decodes it ends that of the worker next, and is found as
    without a pool; a host that is lost costs nothing but its CPUs. To be called from any number of threads.
    """

    def __init__(self, info: BundleInfo, count: int) -> None:
        import ray

        from inference.predictor import on_threads

        self._here = on_threads(info, 1)
        self._lock = threading.Lock()
        self._at_work: deque[Any] = deque()
        self._starting: dict[Any, Any] = {}  # what each answers once it is up -> the actor
        start = ray.remote(num_cpus=1, max_restarts=-1)(Decoder)
        for _ in range(count):
            self._await(start.remote(info))

    def __call__(self, encoded: Sequence[bytes]) -> Decoded:
        """The pixels of a batch and its errors, as :func:`training.decode.decode_tiles` gives them."""
        from inference.predictor import joined, split

        self._look()
        parts = split(encoded, PART_TILES)
        given = [(part, self._give(part)) for part in parts]
        return joined(self._take(part, *task) if task else self._here(part) for part, task in given)

    def _await(self, actor: Any) -> None:
        answer = actor.is_up.options(max_task_retries=-1).remote()  # also once it was started again
        self._starting[answer] = actor

    def _look(self) -> None:
        """Take in those that are up by now."""
        import ray
        import ray.exceptions

        with self._lock:
            waited = list(self._starting)
            for answer in ray.wait(waited, num_returns=len(waited), timeout=0)[0] if waited else []:
                actor = self._starting.pop(answer)
                try:
                    ray.get(answer)
                except ray.exceptions.RayError:  # it cannot be started at all
                    continue
                self._at_work.append(actor)

    def _give(self, part: Sequence[bytes]) -> tuple[Any, Any] | None:
        """Who got the part, and its answer to come."""
        with self._lock:
            if not self._at_work:
                return None
            self._at_work.rotate()
            actor = self._at_work[0]
        return actor, actor.decode.remote(list(part))

    def _take(self, part: Sequence[bytes], actor: Any, answer: Any) -> Decoded:
        import ray
        import ray.exceptions
        import torch

        try:
            pixels, errors = ray.get(answer)
        except ray.exceptions.RayError:
            with self._lock:
                if actor in self._at_work:
                    self._at_work.remove(actor)
                    self._await(actor)
            return self._here(part)
        return torch.tensor(pixels), errors


class Decoder:
    """Decodes parts of batches for one worker, in a process of its own."""

    def __init__(self, info: BundleInfo) -> None:
        import torch

        from inference.predictor import on_threads
        from training.process import keep_freed_memory

        keep_freed_memory()
        torch.set_num_threads(1)
        self._decode = on_threads(info, 1)

    def is_up(self) -> bool:
        """Answer."""
        return True

    def decode(self, encoded: list[bytes]) -> tuple[npt.NDArray[np.uint8], list[str | None]]:
        """The pixels of a part and its errors."""
        pixels, errors = self._decode(encoded)
        return pixels.numpy(), errors
