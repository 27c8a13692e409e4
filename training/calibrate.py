"""Confidence one can use: a temperature for a bundle, and a distance from which on a tile is ``unknown``.

In come a bundle and its shards, out goes the same bundle with both set: distances are measured from training tiles,
temperature and threshold are fitted on the validation split. How sure the model then is there, and of how many tiles it
knows nothing, is kept with its metrics, to compare with what it says of others. Training runs it at its end; evaluation
reads the logits through here too, so that all of them judge the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from training.augment import normalise
from training.bundle import BundleInfo, judge_pixels, load_bundle, save_calibration
from training.decode import decode_tiles
from training.judge import Judge, fit_reference
from training.sampler import Positions
from training.shards import TileReader

FALSE_ALARMS = 0.01
"""Share of validation tiles that the threshold flags as unknown."""

REFERENCE_TILES = 5000
"""Most training tiles from which distances are measured; evenly spread over the set."""

_BISECTIONS = 60
_LOWEST, _HIGHEST = 1e-3, 1e3  # inverse temperatures that are searched

Progress = Callable[[int, int], None]
"""Called with the tiles done and the tiles in all."""


def calibrate(bundle: str, shards: str, device: torch.device) -> BundleInfo:
    """Fit temperature, distances and threshold of ``bundle`` on ``shards`` and save them with it.

    An empty val split leaves the bundle as it is.
    """
    judge, info = load_bundle(bundle)
    reader = TileReader(shards, "val")
    if not len(reader):
        return info
    judge.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    judge.temperature = 1.0
    reference = fit_reference(*_features(judge, info, TileReader(shards, "train"), device))
    judge.refer_to(reference)
    logits, distances, errors = judge_split(judge, info, reader, device)
    decoded = torch.tensor([error is None for error in errors])
    labels = torch.from_numpy(reader.labels.astype(np.int64))
    temperature, threshold = fit_temperature(logits[decoded], labels[decoded]), unknown_threshold(distances[decoded])
    confidence = torch.softmax(logits[decoded].double() / temperature, dim=1).amax(dim=1)
    found = {
        "val_confidence": float(confidence.mean()),
        "val_unknown": float((~(distances[decoded] <= threshold)).double().mean()),
    }
    info = info.model_copy(update={"metrics": info.metrics | found})
    return save_calibration(bundle, info, temperature, reference, threshold)


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


def unknown_threshold(distances: Tensor, false_alarms: float = FALSE_ALARMS) -> float:
    """The least threshold that at most ``false_alarms`` of the known tiles' ``distances`` ``[N]`` lie above."""
    return float(distances.sort(descending=True).values[int(false_alarms * len(distances))])


def judge_split(
    judge: Judge,
    info: BundleInfo,
    reader: TileReader,
    device: torch.device,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor, list[str | None]]:
    """Logits over the temperature, float32 ``[tiles, classes]``, distances, float32 ``[tiles]``, both on the CPU, and
    for each tile None or why it cannot be decoded.
    """
    judge.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    logits, distances = torch.empty(len(reader), len(info.classes)), torch.empty(len(reader))
    errors: list[str | None] = []
    for place, pixels, batch_errors in _decoded(reader, np.arange(len(reader)), info, batch_size):
        logits[place], distances[place] = judge_pixels(judge, info, pixels, device)
        errors += batch_errors
        if progress:
            progress(place.stop, len(reader))
    return logits, distances, errors


def _decoded(
    reader: TileReader, positions: Positions, info: BundleInfo, batch_size: int
) -> Iterator[tuple[slice, Tensor, list[str | None]]]:
    """Batches of the tiles at ``positions``: their place in it, and what :func:`decode_tiles` makes of them."""
    for start in range(0, len(positions), batch_size):
        place = slice(start, min(start + batch_size, len(positions)))
        yield place, *decode_tiles(reader.read(positions[place].tolist()), info.tile_size, info.bands)


def _features(
    judge: Judge, info: BundleInfo, reader: TileReader, device: torch.device, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Features float32 ``[N, features]`` and labels int64 ``[N]`` of up to :data:`REFERENCE_TILES` tiles."""
    chosen = np.linspace(0, len(reader) - 1, min(len(reader), REFERENCE_TILES)).round().astype(np.int64)
    features, labels = [], []
    for place, pixels, errors in _decoded(reader, chosen, info, batch_size):
        decoded = torch.tensor([error is None for error in errors])
        with torch.inference_mode():
            found = judge.body(normalise(pixels[decoded].to(device), info.mean, info.std))
        features.append(found.float().cpu())
        labels.append(torch.from_numpy(reader.labels[chosen[place]].astype(np.int64))[decoded])
    return torch.cat(features), torch.cat(labels)
