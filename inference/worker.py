"""What one worker of a classification does: a chunk of the plan comes in, its part file goes out.

Plain Python and PyTorch, which is imported by the worker alone; :mod:`inference.classify` spreads chunks over many of
these. Equal chunks give equal rows, whoever classifies them and however often.
"""

from __future__ import annotations

import socket
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

from cluster import storage
from configs.errors import TilefleetError, UsageError
from inference import sink
from inference.plan import Chunk, PlanFile, Terms
from inference.readers import Tile, Tiles, read_chunk
from inference.sink import Summary
from inference.suspects import find_deadly
from training.bundle import read_info

if TYPE_CHECKING:
    from inference.predictor import Decode, Predictor
    from training.bundle import BundleInfo

Pool = Callable[["BundleInfo", int], tuple["Decode", int]]
"""Starts decoders for a bundle's tiles in batches of so many; gives them and the batches to keep in flight."""

SAMPLE_TILES, SAMPLE_CHUNKS = 512, 4
"""Tiles on which engines are measured and checked, and from how many chunks they are: each may be read whole."""


class ChunkClassifier:
    """Loads the bundle once, then turns chunks into part files and answers with their summaries.

    A full disk is waited for, up to ``patience`` seconds. With ``pool`` other processes decode, else this one.
    """

    def __init__(self, bundle: str, plan: PlanFile, patience: float, pool: Pool | None = None) -> None:
        self.bundle = bundle
        self.plan = plan
        self.out = plan.location.rpartition("/")[0]
        self.patience = patience
        self.pool = pool

    def classify(self, number: int, careful: bool) -> Summary | TilefleetError:
        """The summary of the chunk of this number once its part is written; an error is an answer, not raised.

        Where ``careful``, the chunk has ended processes before: its tiles are first decoded in processes of their own,
        and those that end theirs again become rows with an error.
        """
        try:
            _require_seen(self.bundle, self.plan.location)
            return self._classify(self.plan.read(number, number + 1)[0], careful)
        except TilefleetError as known:
            return type(known)(str(known))  # without its cause, which may not be fit to be sent
        except Exception:
            return TilefleetError(f"chunk {number} failed for a reason that is not known:\n{traceback.format_exc()}")

    @cached_property
    def _predictor(self) -> Predictor:
        from inference.predictor import Predictor, on_gpu
        from training.process import keep_freed_memory

        keep_freed_memory()  # each batch takes what the one before gave back
        terms, info = self.plan.terms, read_info(self.bundle)
        decode, in_flight = (on_gpu(info) if terms.decode == "gpu" else None), 1
        if self.pool:
            decode, in_flight = self.pool(info, terms.batch_size)
        return Predictor(self.bundle, terms.engine, terms.batch_size, terms.threads, terms.device, decode, in_flight)

    def _classify(self, chunk: Chunk, careful: bool) -> Summary:
        part = sink.part_location(self.out, chunk.id)
        if storage.exists(part):  # an earlier try wrote it and died before it could answer
            return sink.read_summary(part)
        _require_seen(chunk.archive)
        info = self._predictor.info
        deadly = find_deadly(read_chunk(chunk), info.tile_size, info.bands) if careful else {}
        tiles, waiting = read_chunk(chunk), deque[Tile]()
        rows = sink.Part(chunk.archive, info.classes, probabilities=self.plan.terms.probabilities)
        for predictions in self._predictor.predict_stream(_encoded(tiles, waiting, deadly)):
            batch = [waiting.popleft() for _ in predictions.errors]
            rows.add([tile.tile_id for tile in batch], [tile.error for tile in batch], predictions)
        if chunk.tiles not in (None, rows.summary.tiles):
            raise TilefleetError(f"{chunk.archive}: {rows.summary.tiles} rows for {chunk.tiles} tiles of a chunk")
        began = time.perf_counter()
        summary = rows.write(part, tiles.damage, self.patience)
        return summary.model_copy(update={"seconds": summary.seconds | {"write": time.perf_counter() - began}})


def _require_seen(*locations: str) -> None:
    """Raise where this host, which may have joined after the run began, does not see what all hosts have to."""
    for location in locations:
        if not storage.is_uri(location) and not storage.exists(location):
            raise TilefleetError(
                f"{location}: the host {socket.gethostname()} does not see it; on a cluster of several nodes a path "
                "must be object storage or on a disk that all of them share"
            )


def choose_engine(bundle: str, chunks: list[Chunk], wanted: Terms, careful: bool) -> Terms | TilefleetError:
    """The terms ``wanted`` with the engine and the decoder that suit this machine, measured on tiles of ``chunks``.

    Where ``careful``, tiles that end the process that decodes them are left out. An error is an answer, not raised.
    """
    from inference.decoders import choose_decoder
    from inference.engines import Trial, choose
    from inference.forward import find_device

    if wanted.decode == "gpu" and find_device("auto") != "cuda":
        return UsageError("decode=gpu: the workers have no GPU; choose auto, cpu or pool")
    some = chunks[:: -(-len(chunks) // SAMPLE_CHUNKS)]
    share = -(-SAMPLE_TILES // len(some))
    try:
        sample = [tile for chunk in some for tile in islice(read_chunk(chunk), share) if tile.data]
        info = read_info(bundle)
        deadly = find_deadly(sample, info.tile_size, info.bands) if careful else {}
        encoded = [tile.data for number, tile in enumerate(sample) if tile.data and number not in deadly]
        choice = choose(bundle, encoded, threads=wanted.threads, engine=wanted.engine, batch_size=wanted.batch_size)
        decode, ways = ("cpu" if wanted.decode == "auto" else wanted.decode), dict[str, Trial]()
        if choice.device == "cuda" and wanted.decode in ("auto", "gpu"):
            decode, ways = choose_decoder(bundle, encoded, choice.device, wanted.decode, wanted.batch_size)
    except TilefleetError as error:
        return type(error)(str(error))
    found = {
        "engine": choice.engine,
        "device": choice.device,
        "trials": {name: trial.model_dump() for name, trial in choice.trials.items()},
        "decode": decode,
        "decode_trials": {name: trial.model_dump() for name, trial in ways.items()},
    }
    return wanted.model_copy(update=found)


def _encoded(tiles: Tiles, waiting: deque[Tile], deadly: dict[int, str]) -> Iterator[bytes]:
    """The data of ``tiles``, each of which waits for its prediction; none of one that is ``deadly`` or has no data."""
    for number, tile in enumerate(tiles):
        if number in deadly:
            tile = Tile(tile.tile_id, None, deadly[number])
        waiting.append(tile)
        yield tile.data or b""
