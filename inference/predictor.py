"""A bundle and encoded tiles become classes, without Ray.

Encoded images come in, class, confidence and probabilities go out. Tiles are decoded and classified in batches, so
memory is bounded and the same tiles in the same order give the same bits on the same kind of processor.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from inference.forward import BATCH_SIZE, REFERENCE, Engine, find_device
from training.bundle import BundleInfo, is_unknown, load_bundle
from training.decode import decode_tiles
from training.encoded import jpeg_shape

DECODE_THREADS = 8
"""Most threads that decode for a GPU, unless more are asked for."""

Decoded = tuple[Tensor, list[str | None]]
"""Pixels, uint8 ``[N, channels, size, size]``, and for each tile None or why it could not be decoded."""

Decode = Callable[[Sequence[bytes]], Decoded]
"""Decodes a batch; see :func:`on_threads`, :func:`on_gpu` and :class:`inference.pool.DecoderPool`."""


@dataclass(frozen=True)
class Predictions:
    """What a model says of N tiles. One with an error has class -1, the rest 0, and is not unknown."""

    class_id: npt.NDArray[np.int32]  # [N]
    confidence: npt.NDArray[np.float32]  # [N], the largest probability
    probabilities: npt.NDArray[np.float32]  # [N, classes], softmax(logits / temperature)
    is_unknown: npt.NDArray[np.bool_]  # [N], farther than the bundle's threshold
    errors: list[str | None]  # why a tile could not be decoded: ``cause`` or ``cause: detail``
    seconds: dict[str, float]  # by stage: read (of a stream), decode, forward; each by the clock of its own thread


class Batch(NamedTuple):
    """Decoded tiles on their way to the model."""

    pixels: Tensor  # uint8 [N, channels, size, size]
    errors: list[str | None]
    read: float  # seconds
    decode: float


class Predictor:
    """The model of a bundle, ready on a device in an engine (see :mod:`inference.forward`).

    ``device`` is ``cpu``, ``cuda`` or ``auto``, which takes a GPU where there is one. ``threads`` sets PyTorch's
    threads for this process, and the engine's. ``decode`` decodes a batch, ``in_flight`` of them at once where a stream
    is read ahead; unless given, one thread does on a CPU and up to :data:`DECODE_THREADS` do for a GPU. Raises
    :class:`UsageError` for a device or engine that is not here, and what ``load_bundle`` raises.
    """

    def __init__(
        self,
        bundle: str,
        engine: str = REFERENCE,
        batch_size: int = BATCH_SIZE,
        threads: int | None = None,
        device: str = "auto",
        decode: Decode | None = None,
        in_flight: int = 1,
    ) -> None:
        self.device = find_device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        judge, self.info = load_bundle(bundle)
        self.engine = engine
        self.batch_size = batch_size
        self._forward = Engine(engine, judge, self.info, self.device, batch_size, threads)
        self._decode = decode or on_threads(self.info, decode_threads(self.device))
        self._in_flight = in_flight

    def predict(self, encoded: Sequence[bytes]) -> Predictions:
        """Classify encoded images; one that cannot be decoded gets an error and does not disturb the others."""
        parts = list(self.predict_stream(encoded, overlap=False))
        none = np.zeros((0, len(self.info.classes)), np.float32)
        return Predictions(
            class_id=np.concatenate([none[:, 0].astype(np.int32), *(part.class_id for part in parts)]),
            confidence=np.concatenate([none[:, 0], *(part.confidence for part in parts)]),
            probabilities=np.concatenate([none, *(part.probabilities for part in parts)]),
            is_unknown=np.concatenate([none[:, 0].astype(bool), *(part.is_unknown for part in parts)]),
            errors=[error for part in parts for error in part.errors],
            seconds={stage: sum(part.seconds[stage] for part in parts) for stage in ("decode", "forward")},
        )

    def predict_stream(self, tiles: Iterable[bytes], overlap: bool | None = None) -> Iterator[Predictions]:
        """Classify encoded images as they come, ``batch_size`` at a time, in order; the last batch may be smaller.

        With ``overlap`` threads draw and decode the next batches while this one is in the model or with the caller, so
        that no more than one and those in flight are held. Unless given it is so where that gains time: on a GPU, with
        more than one thread, or with several batches in flight. The results are the same to the bit. What ``tiles``
        raises is raised after the batches before it.
        """
        left = iter(tiles)
        if overlap is None:
            overlap = self.device == "cuda" or torch.get_num_threads() > 1 or self._in_flight > 1
        if not overlap:
            while batch := self._batch(*self._draw(left)):
                yield self._predictions(batch)
            return
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(self._in_flight) as decoders:

            def start() -> Future[Batch | None]:
                drawn = reader.submit(self._draw, left)  # by one thread, so in order
                return decoders.submit(lambda: self._batch(*drawn.result()))

            ahead = deque(start() for _ in range(self._in_flight))
            while batch := ahead.popleft().result():
                ahead.append(start())
                yield self._predictions(batch)

    def _draw(self, tiles: Iterator[bytes]) -> tuple[list[bytes], float]:
        """The next tiles, none at the end, and the seconds that reading them took."""
        began = time.perf_counter()
        return list(islice(tiles, self.batch_size)), time.perf_counter() - began

    def _batch(self, encoded: list[bytes], read: float) -> Batch | None:
        if not encoded:
            return None
        began = time.perf_counter()
        pixels, errors = self._decode(encoded)
        return Batch(pixels, errors, read, time.perf_counter() - began)

    def _predictions(self, batch: Batch) -> Predictions:
        began = time.perf_counter()
        logits, distances = self._forward(batch.pixels)
        probabilities = torch.softmax(logits, dim=1).numpy()
        failed = np.array([error is not None for error in batch.errors], dtype=bool)
        probabilities[failed] = 0
        return Predictions(
            class_id=np.where(failed, -1, probabilities.argmax(axis=1)).astype(np.int32),
            confidence=probabilities.max(axis=1),
            probabilities=probabilities,
            is_unknown=~failed & is_unknown(self.info, distances).numpy(),
            errors=batch.errors,
            seconds={"read": batch.read, "decode": batch.decode, "forward": time.perf_counter() - began},
        )


def decode_threads(device: str) -> int:
    """How many threads of this process decode for an engine on ``device``, unless told otherwise."""
    return min(len(os.sched_getaffinity(0)), DECODE_THREADS) if device == "cuda" else 1


def on_threads(info: BundleInfo, threads: int) -> Decode:
    """Decodes on the CPU, to tiles as the bundle of ``info`` takes them: each of ``threads`` a part of the batch."""

    def single(encoded: Sequence[bytes]) -> Decoded:
        return decode_tiles(encoded, info.tile_size, info.bands)

    if threads == 1:
        return single
    pool = ThreadPoolExecutor(threads)
    return lambda encoded: joined(pool.map(single, split(encoded, -(-len(encoded) // threads))))


def on_gpu(info: BundleInfo, device: str = "cuda") -> Decode:
    """Decodes plain JPEGs of the bundle's tile size on the GPU, to pixels that may differ a little from the CPU's.

    Everything else is left to threads.
    """
    on_cpu = on_threads(info, decode_threads(device))
    if info.bands is not None:
        return on_cpu
    return lambda encoded: _decode_on_gpu(encoded, info.tile_size, device, on_cpu)


def split(encoded: Sequence[bytes], length: int) -> list[Sequence[bytes]]:
    """``encoded`` in parts of so many tiles, in order; the last may be shorter."""
    return [encoded[start : start + length] for start in range(0, len(encoded), max(1, length))]


def joined(parts: Iterable[Decoded]) -> Decoded:
    """Decoded parts of a batch, in order, as one."""
    pixels, errors = zip(*parts, strict=True)
    return torch.cat(pixels), [error for part in errors for error in part]


def _decode_on_gpu(encoded: Sequence[bytes], size: int, device: str, on_cpu: Decode) -> Decoded:
    """As ``decode_tiles``, with pixels on ``device``: whole colour JPEGs that need no resizing are decoded there.

    The GPU's decoder fills in what a file that was cut short lacks, so one without its end marker is left to the CPU.
    """
    fits = [i for i, data in enumerate(encoded) if jpeg_shape(data) == (size, size, 3) and data.endswith(b"\xff\xd9")]
    pixels = torch.zeros(len(encoded), 3, size, size, dtype=torch.uint8, device=device)
    errors: list[str | None] = [None] * len(encoded)
    if fits:
        buffers = [torch.frombuffer(bytearray(encoded[i]), dtype=torch.uint8) for i in fits]
        try:
            pixels[fits] = torch.stack(decode_jpeg(buffers, ImageReadMode.RGB, device=device))
        except RuntimeError:  # one of them is damaged, and nothing says which
            fits = []
    done = set(fits)
    rest = [i for i in range(len(encoded)) if i not in done]
    if rest:
        decoded, causes = on_cpu([encoded[i] for i in rest])
        pixels[rest] = decoded.to(device)
        for i, cause in zip(rest, causes, strict=True):
            errors[i] = cause
    return pixels, errors
