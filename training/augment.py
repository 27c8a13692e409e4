"""What happens to pixels between decoding and the model: preprocessing, shared with inference, and augmentation.

In comes a whole batch on its own device, out comes a batch of the same size. Augmentation is a pure function of pixels
and the keys of the tiles (see :mod:`training.randomness`), so it does not depend on how many workers share a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from configs.errors import UsageError
from configs.schema import AugmentConfig
from training.randomness import uniform

ERASED_AREA = (0.02, 0.2)
"""Least and largest share of a tile that erasing covers."""

ERASED_ASPECT = (0.3, 1 / 0.3)
"""Least and largest height of the erased rectangle over its width, as in the paper."""

ERASED_VALUE = 128
"""What stands in the erased rectangle, in all channels."""

_GREY = (0.2989, 0.587, 0.114)  # luma of ITU-R BT.601, with torchvision's digits


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 ``[B, C, H, W]`` to float32 in channels_last layout: scaled to 0..1, less ``mean``, over ``std``."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=pixels.device).view(1, -1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=pixels.device).view(1, -1, 1, 1)
    return torch.addcmul(shift, pixels.to(torch.float32), scale).contiguous(memory_format=torch.channels_last)


def require_colours(config: AugmentConfig, channels: int) -> None:
    """Raise :class:`UsageError` where ``config`` asks for colours that tiles of so many channels do not have."""
    for name in ("hue", "saturation"):
        if getattr(config, name) and channels != 3:
            raise UsageError(
                f"augment.{name}: needs red, green and blue, and tiles have {channels} channels; leave it out"
            )


def augment(pixels: Tensor, keys: Tensor, config: AugmentConfig) -> Tensor:
    """Training tiles as ``config`` wants them: uint8 ``[B, C, H, W]`` with H = W, to the same type and shape.

    ``keys`` is int64 ``[B]``, one for each tile. First come moves of whole pixels (symmetries, or flips, which they
    contain), then rotation and perspective in one resampling, then brightness, contrast, saturation and hue in this
    order, and erasing last. Between the first and the last of these, pixels are float32 and rounded once.
    """
    if config.symmetries:
        pixels = symmetries(pixels, keys)
    elif config.flips:
        pixels = _mirror(pixels, uniform(keys, "left-right") < 0.5, uniform(keys, "up-down") < 0.5)
    moves = config.rotation or config.perspective
    colours = config.brightness or config.contrast or config.saturation or config.hue
    if moves or colours:
        values = pixels.to(torch.float32)
        if moves:
            values = _project(values, keys, config.rotation, config.perspective)
        if colours:
            values = _colour(values, keys, config)
        pixels = values.round_().to(torch.uint8)
    if config.erasing:
        pixels = _erase(pixels, keys, config.erasing)
    return pixels


def blend(pixels: Tensor, partners: Tensor, share: Tensor) -> Tensor:
    """Mixup's tiles, uint8 ``[B, C, H, W]`` as both that they are made of; ``share`` float32 ``[B]`` is that of
    ``pixels``.

    Zhang et al., "mixup: beyond empirical risk minimization", ICLR 2018.
    """
    return torch.lerp(partners.float(), pixels.float(), share.view(-1, 1, 1, 1)).round_().to(torch.uint8)


def symmetries(pixels: Tensor, keys: Tensor) -> Tensor:
    """Each tile in one of the eight positions of a square (D4), as a view from above has no upper side.

    ``pixels`` is ``[B, C, H, W]`` with H = W; ``keys`` is int64 ``[B]``, one for each tile.
    """
    choice = (uniform(keys, "symmetry") * 8).long()
    places = (
        torch.arange(pixels.shape[-1] ** 2, device=pixels.device).view(1, 1, *pixels.shape[-2:]).expand(8, -1, -1, -1)
    )
    number = torch.arange(8, device=pixels.device)
    places = _mirror(places, (number & 1).bool(), (number & 2).bool())
    places = torch.where((number & 4).bool().view(-1, 1, 1, 1), places.transpose(-1, -2), places)
    source = places.flatten(2)[choice].expand(-1, pixels.shape[1], -1)
    return pixels.flatten(2).gather(2, source).view_as(pixels)


def _mirror(pixels: Tensor, left_right: Tensor, up_down: Tensor) -> Tensor:
    """Flip the tiles that the bool ``[B]`` of each direction name."""
    pixels = torch.where(left_right.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
    return torch.where(up_down.view(-1, 1, 1, 1), pixels.flip(-2), pixels)


def _between(keys: Tensor, purpose: str, low: float, high: float) -> Tensor:
    """One float32 in [low, high) for each key."""
    return low + (high - low) * uniform(keys, purpose)


def _project(values: Tensor, keys: Tensor, rotation: float, perspective: float) -> Tensor:
    """Rotate by up to ``rotation`` degrees, then tilt: float32 ``[B, C, H, W]``, sampled bilinearly, once.

    ``perspective`` is torchvision's distortion scale: each corner moves towards the centre by up to this share of half
    a side, in each direction. What was outside the tile is its own mirror image.
    """
    source = torch.eye(3, dtype=torch.float64, device=values.device).expand(len(keys), 3, 3)
    if rotation:
        source = _turned(_between(keys, "rotation", -rotation, rotation))
    if perspective:
        inset = [perspective * uniform(keys, f"corner {number}") for number in range(8)]
        source = source @ _untilted(torch.stack(inset, 1).view(-1, 4, 2))
    grid = _sampling_grid(source, values.shape[-1])
    return functional.grid_sample(values, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _turned(degrees: Tensor) -> Tensor:
    """Where each place of a picture turned anticlockwise comes from: float64 ``[B, 3, 3]`` for angles ``[B]``."""
    angle = torch.deg2rad(degrees.double())
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], 1).view(-1, 3, 3)


def _untilted(inset: Tensor) -> Tensor:
    """Where each place of a tilted picture comes from: float64 ``[B, 3, 3]``, up to a factor.

    ``inset`` is ``[B, 4, 2]``: how far each corner moved towards the centre in x and y, from the upper left one
    clockwise. The picture reaches from -1 to 1. From the square to the corners it is the projection of Heckbert
    ("Fundamentals of texture mapping and image warping", 1989, section 2.2.3), whose inverse is its adjugate.
    """
    outer = torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=torch.float64, device=inset.device)
    p0, p1, p2, p3 = (outer * (1 - inset.double())).unbind(1)
    d1, d2, d3 = p1 - p2, p3 - p2, p0 - p1 + p2 - p3
    area = _cross(d1, d2)
    g, h = _cross(d3, d2) / area, _cross(d1, d3) / area
    u = torch.cat([p1 - p0 + g * p1, g], 1)
    v = torch.cat([p3 - p0 + h * p3, h], 1)
    w = torch.cat([p0, torch.ones_like(g)], 1)
    from_unit_square = torch.stack([v.cross(w, dim=1), w.cross(u, dim=1), u.cross(v, dim=1)], 1)
    to_picture = torch.tensor([[2, 0, -1], [0, 2, -1], [0, 0, 1]], dtype=torch.float64, device=inset.device)
    return to_picture @ from_unit_square


def _cross(a: Tensor, b: Tensor) -> Tensor:
    """The cross product of vectors ``[B, 2]``: ``[B, 1]``."""
    return a[:, :1] * b[:, 1:] - a[:, 1:] * b[:, :1]


def _sampling_grid(source: Tensor, size: int) -> Tensor:
    """The projections ``[B, 3, 3]`` applied to the centres of all pixels: float32 ``[B, size, size, 2]`` in -1..1."""
    source = (source / source[:, 2:, 2:]).to(torch.float32)
    centres = (torch.arange(size, device=source.device, dtype=torch.float32) * 2 + 1) / size - 1
    along, down = centres.view(1, 1, 1, size), centres.view(1, 1, size, 1)
    x, y, depth = (source[..., :1, None] * along + (source[..., 1:2, None] * down + source[..., 2:, None])).unbind(1)
    # A strong tilt (above 2/3) can put the horizon into the tile, where places lie at infinity.
    return (torch.stack([x, y], -1) / depth[..., None]).nan_to_num(0.0).clamp(-4, 4)


def _colour(values: Tensor, keys: Tensor, config: AugmentConfig) -> Tensor:
    """Brightness, contrast, saturation and hue with the meaning they have in torchvision's ``ColorJitter``.

    ``values`` is float32 ``[B, C, H, W]`` in 0..255.
    """

    def factor(name: str, spread: float) -> Tensor:
        return _between(keys, name, 1 - spread, 1 + spread).view(-1, 1, 1, 1)

    if config.brightness:
        values = (values * factor("brightness", config.brightness)).clamp_(0, 255)
    if config.contrast:
        # Whole numbers, so that the sum is exact in any order and no tile depends on its neighbours in the batch.
        mean = _grey(values).floor_().mean((1, 2, 3), keepdim=True, dtype=torch.float64).to(torch.float32)
        values = _blend(values, mean, factor("contrast", config.contrast))
    if config.saturation:
        values = _blend(values, _grey(values), factor("saturation", config.saturation))
    if config.hue:
        values = _shift_hue(values, _between(keys, "hue", -config.hue, config.hue))
    return values


def _grey(values: Tensor) -> Tensor:
    """``[B, C, H, W]`` to ``[B, 1, H, W]``: the luma of RGB, the mean of other channels."""
    if values.shape[1] != 3:
        return values.mean(1, keepdim=True)
    red, green, blue = (weight * channel for weight, channel in zip(_GREY, values.unbind(1), strict=True))
    return (red + green + blue)[:, None]


def _blend(values: Tensor, other: Tensor, ratio: Tensor) -> Tensor:
    """``ratio`` of ``values`` and the rest of ``other``; above 1 it leads away from ``other``."""
    return (values * ratio + other * (1 - ratio)).clamp_(0, 255)


def _shift_hue(values: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of the HSV hexcone (Smith, "Color gamut transform pairs", 1978) by ``shift`` ``[B]`` full turns."""
    red, green, blue = values.unbind(1)
    top = values.amax(1)
    chroma = top - values.amin(1)
    span = chroma.clamp(min=1e-3)  # grey has no hue, and a shift does not change it
    sector = torch.where(
        top == red,
        (green - blue) / span,
        torch.where(top == green, (blue - red) / span + 2, (red - green) / span + 4),
    )
    sector = sector + 6 * shift.view(-1, 1, 1)
    channels = []
    for offset in (5, 3, 1):  # of red, green and blue, in sixths of a turn
        distance = torch.remainder(sector + offset, 6)
        channels.append(top - chroma * torch.minimum(distance, 4 - distance).clamp_(0, 1))
    return torch.stack(channels, 1)


def _erase(pixels: Tensor, keys: Tensor, probability: float) -> Tensor:
    """Put a grey rectangle of random size, shape and place into a share of the tiles.

    Zhong et al., "Random erasing data augmentation", AAAI 2020, with one value for all tiles and pixels.
    """
    height, width = pixels.shape[-2:]
    area = _between(keys, "erased area", *ERASED_AREA)
    stretch = (_between(keys, "erased aspect", *map(math.log, ERASED_ASPECT)).double() / 2).exp()
    rows = _erased_span(area.sqrt() * stretch * height, uniform(keys, "erased row"), height)
    columns = _erased_span(area.sqrt() / stretch * width, uniform(keys, "erased column"), width)
    chosen = uniform(keys, "erasing").view(-1, 1, 1) < probability
    erased = chosen & rows[:, :, None] & columns[:, None, :]
    return pixels.masked_fill(erased[:, None], ERASED_VALUE)


def _erased_span(length: Tensor, place: Tensor, size: int) -> Tensor:
    """Bool ``[B, size]``: ``length`` places in a row, from the start that ``place`` in [0, 1) chooses."""
    length = length.round().clamp(1, size)
    start = (place * (size - length + 1)).floor()
    at = torch.arange(size, device=length.device)
    return (at >= start[:, None]) & (at < (start + length)[:, None])
