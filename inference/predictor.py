"""A bundle and encoded tiles become classes, in plain PyTorch, without Ray.

Encoded images come in, class, confidence and probabilities go out. Tiles are decoded and classified in batches, so
memory is bounded and the same tiles in the same order give the same bits on the same kind of processor.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from configs.errors import UsageError
from training.bundle import is_unknown, judge_pixels, load_bundle
from training.decode import decode_tiles

ENGINES = {"cpu": "torch-f32", "cuda": "torch-bf16"}
"""Device -> the name of what computes there, as written in a plan."""


@dataclass(frozen=True)
class Predictions:
    """What a model says of N tiles. One with an error has class -1, the rest 0, and is not unknown."""

    class_id: npt.NDArray[np.int32]  # [N]
    confidence: npt.NDArray[np.float32]  # [N], the largest probability
    probabilities: npt.NDArray[np.float32]  # [N, classes], softmax(logits / temperature)
    is_unknown: npt.NDArray[np.bool_]  # [N], farther than the bundle's threshold
    errors: list[str | None]  # why a tile could not be decoded: ``cause`` or ``cause: detail``
    seconds: dict[str, float]  # by stage: decode, forward


class Predictor:
    """The model of a bundle, ready on a device: float32 on the CPU, bfloat16 autocast on a GPU.

    ``device`` is ``cpu``, ``cuda`` or ``auto``, which takes a GPU where there is one. ``threads`` sets PyTorch's
    threads for this process. Raises :class:`UsageError` for a missing device, and what ``load_bundle`` raises.
    """

    def __init__(self, bundle: str, device: str = "auto", batch_size: int = 256, threads: int | None = None) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device not in ENGINES or (device == "cuda" and not torch.cuda.is_available()):
            raise UsageError(f"device {device!r}: not available here; choose auto or cpu")
        if threads is not None:
            torch.set_num_threads(threads)
        judge, self.info = load_bundle(bundle)
        self.judge = judge.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device = device
        self.engine = ENGINES[device]
        self.batch_size = batch_size

    def predict(self, encoded: Sequence[bytes]) -> Predictions:
        """Classify encoded images; one that cannot be decoded gets an error and does not disturb the others."""
        probabilities = np.zeros((len(encoded), len(self.info.classes)), dtype=np.float32)
        unknown = np.zeros(len(encoded), dtype=bool)
        errors: list[str | None] = []
        seconds = {"decode": 0.0, "forward": 0.0}
        for start in range(0, len(encoded), self.batch_size):
            batch = encoded[start : start + self.batch_size]
            began = time.perf_counter()
            pixels, causes = decode_tiles(batch, self.info.tile_size)
            decoded = time.perf_counter()
            place = slice(start, start + len(batch))
            probabilities[place], unknown[place] = self._forward(pixels)
            seconds["decode"] += decoded - began
            seconds["forward"] += time.perf_counter() - decoded
            errors += causes
        failed = np.array([error is not None for error in errors], dtype=bool)
        probabilities[failed] = 0
        confidence = probabilities.max(axis=1)
        return Predictions(
            class_id=np.where(failed, -1, probabilities.argmax(axis=1)).astype(np.int32),
            confidence=confidence,
            probabilities=probabilities,
            is_unknown=~failed & unknown,
            errors=errors,
            seconds=seconds,
        )

    def _forward(self, pixels: torch.Tensor) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        logits, distances = judge_pixels(self.judge, self.info, pixels, self.device)
        return torch.softmax(logits, dim=1).cpu().numpy(), is_unknown(self.info, distances).cpu().numpy()
