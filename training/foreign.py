"""How well ``unknown`` works: how far images of something else are from a model, against tiles of its own classes.

In come the distances of known tiles and a list of foreign images, out go the AUROC and the shares that the bundle's
threshold flags. Images are read and decoded one at a time and judged in batches, so memory is that of one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from configs.errors import TilefleetError
from training.bundle import BundleInfo, is_unknown, judge_pixels
from training.calibrate import Progress
from training.decode import decode_image, resize
from training.encoded import TileError
from training.images import Entry
from training.judge import Judge
from training.plots import plot_unknown

Distances = npt.NDArray[np.float32]


def judge_unknown(
    judge: Judge,
    info: BundleInfo,
    known: Distances,
    images: Sequence[Entry],
    plot: str,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """AUROC, threshold, and the shares it flags of ``known`` tiles' distances (false alarms) and of foreign ``images``.

    Both distributions are drawn to ``plot``. Raises :class:`TilefleetError` where not one image can be decoded.
    """
    assert info.unknown_threshold is not None
    foreign = foreign_distances(judge, info, images, progress=progress)
    result = {
        "images": len(foreign),
        "undecodable": len(images) - len(foreign),
        "auroc": auroc(known, foreign),
        "threshold": info.unknown_threshold,
        "flagged": float(is_unknown(info, torch.from_numpy(foreign)).float().mean()),
        "false_alarms": float(is_unknown(info, torch.from_numpy(known)).float().mean()),
    }
    plot_unknown(known, foreign, info.unknown_threshold, describe(result), plot)
    return result


def auroc(known: Distances, foreign: Distances) -> float:
    """The share of all pairs of a known tile and a foreign image in which the foreign one is farther away.

    A tie counts half. This is the area under the ROC curve (Hanley and McNeil 1982), and 0.5 is what chance gives.
    """
    ordered = np.sort(known)
    below, up_to = np.searchsorted(ordered, foreign, "left"), np.searchsorted(ordered, foreign, "right")
    return float((below + up_to).sum() / (2 * len(known) * len(foreign)))


def foreign_distances(
    judge: Judge,
    info: BundleInfo,
    images: Sequence[Entry],
    batch_size: int = 256,
    progress: Progress | None = None,
) -> Distances:
    """Distances float32 ``[decodable images]``, in order, computed on the device of ``judge``.

    Images are resized to the bundle's tile size. Raises :class:`TilefleetError` where not one of them can be decoded.
    """
    device = next(judge.parameters()).device
    pixels = torch.empty(batch_size, info.channels, info.tile_size, info.tile_size, dtype=torch.uint8)
    found: list[Distances] = []
    for start in range(0, len(images), batch_size):
        batch, filled = images[start : start + batch_size], 0
        for image in batch:
            try:
                pixels[filled] = resize(decode_image(image.read(), info.bands), info.tile_size)
            except TileError:
                continue
            filled += 1
        if filled:
            found.append(judge_pixels(judge, info, pixels[:filled], device)[1].cpu().numpy())
        if progress:
            progress(start + len(batch), len(images))
    if not found:
        raise TilefleetError(f"{images[0].location}: not one of {len(images)} foreign images can be decoded")
    return np.concatenate(found)


def describe(result: dict[str, Any]) -> str:
    """One line about what :func:`judge_unknown` found."""
    return (
        f"AUROC {result['auroc']:.4f}; flags {result['flagged']:.1%} of {result['images']:,} foreign images "
        f"and {result['false_alarms']:.1%} of the known tiles"
    )
