"""Preprocessing and augmentation on the batch."""

from __future__ import annotations

import torch

from training.augment import normalise, symmetries
from training.randomness import keys


def test_normalise_is_the_usual_formula() -> None:
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    mean, std = [0.3, 0.4, 0.5], [0.2, 0.25, 0.1]
    expected = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(normalise(pixels, mean, std), expected, atol=1e-5)
    assert normalise(pixels, mean, std).is_contiguous(memory_format=torch.channels_last)


def test_symmetries_draws_all_eight_positions_equally() -> None:
    tile = torch.arange(27, dtype=torch.uint8).view(1, 3, 3, 3)
    batch = tile.expand(8000, -1, -1, -1)
    out = symmetries(batch, torch.from_numpy(keys(1, 2, count=8000).view("int64")))
    kinds, counts = out.flatten(1).unique(dim=0, return_counts=True)
    assert len(kinds) == 8
    assert counts.min() > 850
    assert torch.equal(out.sum((2, 3)), batch.sum((2, 3)))
