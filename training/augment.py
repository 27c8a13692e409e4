"""What happens to pixels between decoding and the model: preprocessing, shared with inference, and augmentation.

Everything works on a whole batch on its own device. Augmentation is a pure function of the keys of the tiles (see
:mod:`training.randomness`), so it does not depend on how many workers share a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from training.randomness import uniform


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 ``[B, 3, H, W]`` to float32 in channels_last layout: scaled to 0..1, less ``mean``, over ``std``."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=pixels.device).view(1, -1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=pixels.device).view(1, -1, 1, 1)
    return torch.addcmul(shift, pixels.to(torch.float32), scale).contiguous(memory_format=torch.channels_last)


def symmetries(pixels: Tensor, keys: Tensor) -> Tensor:
    """Each tile in one of the eight positions of a square (D4), as a view from above has no upper side.

    ``pixels`` is ``[B, C, H, W]`` with H = W; ``keys`` is int64 ``[B]``, one for each tile.
    """
    choice = (uniform(keys, "symmetry") * 8).long()
    flipped = torch.where((choice & 1).bool().view(-1, 1, 1, 1), pixels.flip(-1), pixels)
    flipped = torch.where((choice & 2).bool().view(-1, 1, 1, 1), flipped.flip(-2), flipped)
    return torch.where((choice & 4).bool().view(-1, 1, 1, 1), flipped.transpose(-1, -2), flipped)
