"""Confidence one can use: a temperature and an ``unknown`` threshold for a bundle, fitted on the validation split.

In come a bundle and its shards, out goes the same bundle with both set. Training runs it at its end; evaluation reads
the logits through here too, so that all of them judge the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from training.bundle import BundleInfo, bundle_logits, known_score, load_bundle, save_bundle
from training.decode import decode_tiles
from training.shards import TileReader

FALSE_ALARMS = 0.01
"""Share of validation tiles that the threshold flags as unknown."""

_BISECTIONS = 60
_LOWEST, _HIGHEST = 1e-3, 1e3  # inverse temperatures that are searched

Progress = Callable[[int, int], None]
"""Called with the tiles done and the tiles in all."""


def calibrate(bundle: str, shards: str, device: torch.device) -> BundleInfo:
    """Fit temperature and threshold of ``bundle`` on the val split of ``shards`` and save them with it.

    An empty val split leaves the bundle as it is.
    """
    model, info = load_bundle(bundle)
    reader = TileReader(shards, "val")
    if not len(reader):
        return info
    logits, errors = split_logits(model, info.model_copy(update={"temperature": 1.0}), reader, device)
    decoded = torch.tensor([error is None for error in errors])
    labels = torch.from_numpy(reader.labels.astype(np.int64))
    temperature = fit_temperature(logits[decoded], labels[decoded])
    threshold = unknown_threshold(known_score(logits[decoded] / temperature))
    return save_bundle(
        bundle, model, info.model_copy(update={"temperature": temperature, "unknown_threshold": threshold})
    )


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature that minimises the mean cross-entropy of ``logits`` ``[N, classes]`` for ``labels`` ``[N]``.

    Guo et al., "On calibration of modern neural networks" (2017). The loss is convex in the inverse temperature, so
    the sign of its slope is enough to find the minimum by bisection.
    """
    wide = logits.double()
    right = wide.gather(1, labels[:, None]).mean()
    low, high = _LOWEST, _HIGHEST
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5
        expected = (torch.softmax(wide * middle, dim=1) * wide).sum(dim=1).mean()
        low, high = (low, middle) if expected > right else (middle, high)
    return float(1 / (low * high) ** 0.5)


def unknown_threshold(scores: Tensor, false_alarms: float = FALSE_ALARMS) -> float:
    """The largest threshold that at most ``false_alarms`` of the known tiles' ``scores`` ``[N]`` lie below."""
    return float(scores.sort().values[int(false_alarms * len(scores))])


def split_logits(
    model: nn.Module,
    info: BundleInfo,
    reader: TileReader,
    device: torch.device,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> tuple[Tensor, list[str | None]]:
    """Logits over the temperature, float32 ``[tiles, classes]`` on the CPU, and for each tile None or its error."""
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    logits = torch.empty(len(reader), len(info.classes))
    errors: list[str | None] = []
    for start in range(0, len(reader), batch_size):
        positions = range(start, min(start + batch_size, len(reader)))
        pixels, batch_errors = decode_tiles(reader.read(positions), info.tile_size)
        logits[start : positions.stop] = bundle_logits(model, info, pixels, device).cpu()
        errors += batch_errors
        if progress:
            progress(positions.stop, len(reader))
    return logits, errors
