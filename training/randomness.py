"""Random numbers as a pure function of what they are for: the epoch, the step, the tile's place in the global batch.

No generator has a state, so there is none to save, to restore or to share: any number of workers, and any resume,
draws the same numbers for the same tile at the same step. The mixing function is the finaliser of SplitMix64 (Steele,
Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

UInt64 = npt.NDArray[np.uint64]

NUMBERS = 1 << 24
"""How many different random numbers there are for a tile: as many as float32 tells apart in [0, 1)."""


def mix(values: UInt64) -> UInt64:
    """SplitMix64's finaliser over an array of uint64: well-mixed uint64 of the same shape."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def keys(seed: int, *path: int, count: int) -> UInt64:
    """``count`` uint64 keys, one a position, for the place named by ``seed`` and ``path`` (such as epoch and step)."""
    state = mix(np.array(seed, dtype=np.uint64))
    for number in path:
        state = mix(state ^ np.uint64(number))
    return mix(state ^ np.arange(count, dtype=np.uint64))


def permutation(seed: int, *path: int, count: int) -> npt.NDArray[np.int64]:
    """An order of ``count`` things for the place named by ``seed`` and ``path``: int64 ``[count]``, each once."""
    return np.argsort(keys(seed, *path, count=count), kind="stable").astype(np.int64)


def uniform(tile_keys: Tensor, purpose: str) -> Tensor:
    """One float32 in [0, 1) for each key (int64 ``[B]``), independent for each ``purpose``."""
    numbers = _mix32(_fold(tile_keys) ^ _fold(torch.tensor(zlib.crc32(purpose.encode()))))
    return numbers.to(torch.float32) * (1 / NUMBERS)


def symmetric_beta(tile_keys: Tensor, purpose: str, alpha: float) -> Tensor:
    """One float32 in 0..1 of the distribution Beta(alpha, alpha) for each key (int64 ``[B]``).

    Devroye, "Non-uniform random variate generation", 1986, section IX.4.4: two uniform numbers make one, for any alpha.
    """
    radius = (1 - uniform(tile_keys, f"{purpose} radius").double()).pow(-1 / alpha) - 1
    cosine = (2 * math.pi * uniform(tile_keys, f"{purpose} angle").double()).cos()
    return (0.5 + 0.5 * cosine.sign() / (1 + 1 / (radius * cosine.square())).sqrt()).float()


class TileDropout(nn.Module):
    """Dropout whose mask is a function of the tile's key, the layer and the element, not of the worker that computes
    it.

    Set :attr:`tile_keys` (int64 ``[B]``) before each training step, as :func:`set_tile_keys` does. In evaluation mode
    it passes its input through. Scaling is that of ``nn.Dropout`` (Srivastava et al. 2014, inverted).
    """

    def __init__(self, p: float, layer: int) -> None:
        super().__init__()
        self.p = p
        self.layer = layer
        self.tile_keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is ``[B, ...]``; returns the same shape."""
        if not self.training or self.p == 0:
            return x
        if self.tile_keys is None:
            raise RuntimeError("tile_keys must be set before a training step")
        elements = torch.arange(x[0].numel(), device=x.device) * 0x9E3779B1 + self.layer * 0x85EBCA6B
        numbers = _mix32(_fold(self.tile_keys)[:, None] ^ _fold(elements)[None, :])
        return x * (numbers >= math.ceil(self.p * NUMBERS)).view(x.shape) * (1 / (1 - self.p))


def replace_dropout(model: nn.Module) -> nn.Module:
    """Put :class:`TileDropout` in the place of every ``nn.Dropout`` of ``model``, which is changed and returned."""
    layer = 0
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, TileDropout(child.p, layer))
                layer += 1
    return model


def set_tile_keys(model: nn.Module, tile_keys: Tensor) -> None:
    """Give every :class:`TileDropout` of ``model`` the keys of the coming batch."""
    for module in model.modules():
        if isinstance(module, TileDropout):
            module.tile_keys = tile_keys


def _fold(values: Tensor) -> Tensor:
    """Both halves of int64 as one int32, which keeps what exclusive or does."""
    return ((values ^ (values >> 32)) & 0xFFFFFFFF).to(torch.int32)


def _mix32(values: Tensor) -> Tensor:
    """Numbers in [0, :data:`NUMBERS`) from int32, which is overwritten: the finaliser "lowbias32" (Wellons 2018).

    Torch has no unsigned shift, so the bits that a shift fills with the sign are cleared after it.
    """
    values ^= (values >> 16) & 0xFFFF
    values *= 0x7FEB352D
    values ^= (values >> 15) & 0x1FFFF
    values *= 0x846CA68B - (1 << 32)
    values ^= (values >> 16) & 0xFFFF
    return (values >> 8) & (NUMBERS - 1)
