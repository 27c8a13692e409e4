"""A bundle and encoded tiles become classes, without Ray.

Encoded images come in, class, confidence and probabilities go out. Tiles are decoded and classified in batches, so
memory is bounded and the same tiles in the same order give the same bits on the same kind of processor.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from inference.forward import BATCH_SIZE, REFERENCE, Engine, find_device
from training.bundle import is_unknown, load_bundle
from training.decode import decode_tiles
from training.encoded import jpeg_shape

DECODE_THREADS = 8
"""Most threads that decode for a GPU, unless more are asked for."""

Decoded = tuple[Tensor, list[str | None]]


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

    pixels: Tensor  # uint8 [N, 3, size, size]
    errors: list[str | None]
    read: float  # seconds
    decode: float


class Predictor:
    """The model of a bundle, ready on a device in an engine (see :mod:`inference.forward`).

    ``device`` is ``cpu``, ``cuda`` or ``auto``, which takes a GPU where there is one. ``threads`` sets PyTorch's
    threads for this process, and the engine's. ``decode_threads`` is how many decode a batch together: 1 on a CPU,
    unless given. With ``gpu_decode`` plain JPEGs of the bundle's tile size are decoded on the GPU, to pixels that may
    differ a little from the CPU's. Raises :class:`UsageError` for a device or engine that is not here, and what
    ``load_bundle`` raises.
    """

    def __init__(
        self,
        bundle: str,
        engine: str = REFERENCE,
        batch_size: int = BATCH_SIZE,
        threads: int | None = None,
        device: str = "auto",
        decode_threads: int | None = None,
        gpu_decode: bool = False,
    ) -> None:
        self.device = find_device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        judge, self.info = load_bundle(bundle)
        self.engine = engine
        self.batch_size = batch_size
        self._forward = Engine(engine, judge, self.info, self.device, batch_size, threads)
        cores = len(os.sched_getaffinity(0))
        self._decoders = decode_threads or (min(cores, DECODE_THREADS) if self.device == "cuda" else 1)
        self._gpu_decode = gpu_decode and self.device == "cuda"

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

        With ``overlap`` a thread draws and decodes the next batch while this one is in the model or with the caller,
        so that no more than two are held. Unless given it is so where that gains time: on a GPU, or with more than one
        thread. The results are the same to the bit. What ``tiles`` raises is raised after the batches before it.
        """
        left = iter(tiles)
        with ThreadPoolExecutor(self._decoders) as pool:
            decode = self._decoder(pool)
            if overlap is None:
                overlap = self.device == "cuda" or torch.get_num_threads() > 1
            if not overlap:
                while batch := self._next(left, decode):
                    yield self._predictions(batch)
                return
            with ThreadPoolExecutor(1) as reader:
                ahead = reader.submit(self._next, left, decode)
                while batch := ahead.result():
                    ahead = reader.submit(self._next, left, decode)
                    yield self._predictions(batch)

    def _next(self, tiles: Iterator[bytes], decode: Callable[[Sequence[bytes]], Decoded]) -> Batch | None:
        """Read and decode the next batch; None at the end."""
        began = time.perf_counter()
        encoded = list(islice(tiles, self.batch_size))
        read = time.perf_counter()
        if not encoded:
            return None
        pixels, errors = decode(encoded)
        return Batch(pixels, errors, read - began, time.perf_counter() - read)

    def _decoder(self, pool: ThreadPoolExecutor) -> Callable[[Sequence[bytes]], Decoded]:
        """What decodes a batch: one thread, or all of ``pool``, each a part of it, and the GPU before them."""

        def single(encoded: Sequence[bytes]) -> Decoded:
            return decode_tiles(encoded, self.info.tile_size)

        def shared(encoded: Sequence[bytes]) -> Decoded:
            length = -(-len(encoded) // self._decoders) or 1
            parts = [encoded[start : start + length] for start in range(0, len(encoded), length)]
            pixels, errors = zip(*pool.map(single, parts), strict=True)
            return torch.cat(pixels), [error for part in errors for error in part]

        on_cpu = single if self._decoders == 1 else shared
        if not self._gpu_decode:
            return on_cpu
        return lambda encoded: _decode_on_gpu(encoded, self.info.tile_size, self.device, on_cpu)

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


def _decode_on_gpu(
    encoded: Sequence[bytes], size: int, device: str, on_cpu: Callable[[Sequence[bytes]], Decoded]
) -> Decoded:
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
