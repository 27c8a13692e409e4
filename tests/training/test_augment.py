"""Preprocessing and augmentation on the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from configs.errors import UsageError
from configs.schema import AugmentConfig
from training import augment as stages
from training.augment import augment, normalise, require_colours, symmetries
from training.randomness import keys

EVERYTHING = AugmentConfig(
    symmetries=True,
    rotation=30,
    perspective=0.4,
    brightness=0.3,
    contrast=0.3,
    saturation=0.3,
    hue=0.2,
    erasing=0.5,
)
SINGLY = [
    AugmentConfig(**{name: value}) for name, value in EVERYTHING.model_dump(exclude={"flips", "mixup"}).items()
] + [AugmentConfig(flips=True)]


def named(config: AugmentConfig) -> str:
    return ",".join(config.model_dump(exclude_defaults=True)) if config != EVERYTHING else "everything"


def tile_keys(count: int, step: int = 0) -> Tensor:
    return torch.from_numpy(keys(7, step, count=count).view("int64"))


def random_tiles(count: int, size: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.manual_seed(seed))


def smooth_tiles(count: int, size: int = 32) -> Tensor:
    """Like photographs: neighbouring pixels are alike, so a resampling a hair off stays within a few levels."""
    return vision.resize(random_tiles(count, size // 8), [size, size], antialias=True)


def test_normalise_is_the_usual_formula() -> None:
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    mean, std = [0.3, 0.4, 0.5], [0.2, 0.25, 0.1]
    expected = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(normalise(pixels, mean, std), expected, atol=1e-5)
    assert normalise(pixels, mean, std).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_tiles_of_any_channels_are_augmented_as_each_of_their_bands_would_be(channels: int) -> None:
    tiles = torch.randint(0, 256, (6, channels, 16, 16), dtype=torch.uint8, generator=torch.manual_seed(0))
    moves = AugmentConfig(symmetries=True, rotation=30, perspective=0.3, brightness=0.3, erasing=0.5)
    moved = augment(tiles, tile_keys(6), moves)
    assert (moved.shape, moved.dtype) == (tiles.shape, torch.uint8)
    assert torch.equal(moved, torch.cat([augment(band, tile_keys(6), moves) for band in tiles.split(1, 1)], 1))


def test_contrast_of_other_channels_leads_away_from_their_mean() -> None:
    tiles = torch.tensor([40, 80, 120, 160], dtype=torch.uint8).view(1, 4, 1, 1).expand(8, 4, 8, 8).contiguous()
    moved = augment(tiles, tile_keys(8), AugmentConfig(contrast=0.5))
    assert ((moved.float().mean((1, 2, 3)) - 100).abs() <= 0.5).all()
    assert len(moved.unique()) > 4


@pytest.mark.parametrize("name", ["hue", "saturation"])
def test_what_needs_colours_is_refused_without_them(name: str) -> None:
    require_colours(AugmentConfig(**{name: 0.1}), 3)
    require_colours(EVERYTHING.model_copy(update={"hue": 0, "saturation": 0}), 13)
    with pytest.raises(UsageError, match=f"augment.{name}: needs red, green and blue, and tiles have 1 channels"):
        require_colours(AugmentConfig(**{name: 0.1}), 1)


def test_symmetries_draws_all_eight_positions_equally() -> None:
    tile = torch.arange(27, dtype=torch.uint8).view(1, 3, 3, 3)
    batch = tile.expand(8000, -1, -1, -1)
    out = symmetries(batch, torch.from_numpy(keys(1, 2, count=8000).view("int64")))
    kinds, counts = out.flatten(1).unique(dim=0, return_counts=True)
    assert len(kinds) == 8
    assert counts.min() > 850
    assert torch.equal(out.sum((2, 3)), batch.sum((2, 3)))


def test_flips_go_both_ways_independently() -> None:
    tile = random_tiles(1, 4)
    out = augment(tile.expand(4000, -1, -1, -1), tile_keys(4000), AugmentConfig(flips=True))
    expected = [tile, tile.flip(-1), tile.flip(-2), tile.flip(-1, -2)]
    counts = [int((out == kind).flatten(1).all(1).sum()) for kind in expected]
    assert sum(counts) == 4000
    assert min(counts) > 900


@pytest.mark.parametrize("config", [EVERYTHING, *SINGLY], ids=named)
def test_a_tile_does_not_depend_on_how_its_batch_is_shared(config: AugmentConfig) -> None:
    pixels, all_keys = random_tiles(23, 17), tile_keys(23)
    whole = augment(pixels, all_keys, config)
    for first, end in [(0, 1), (0, 8), (1, 23), (5, 12), (22, 23)]:
        assert torch.equal(augment(pixels[first:end], all_keys[first:end], config), whole[first:end])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.data(), st.integers(0, 1000))
def test_any_share_of_any_batch_is_the_same(count: int, data: st.DataObject, step: int) -> None:
    first = data.draw(st.integers(0, count - 1))
    end = data.draw(st.integers(first + 1, count))
    pixels, all_keys = random_tiles(count, 8, seed=step), tile_keys(count, step)
    part = augment(pixels[first:end], all_keys[first:end], EVERYTHING)
    assert torch.equal(part, augment(pixels, all_keys, EVERYTHING)[first:end])


@pytest.mark.parametrize("config", [EVERYTHING, *SINGLY], ids=named)
def test_type_and_shape_stay_and_another_step_gives_other_pixels(config: AugmentConfig) -> None:
    pixels = random_tiles(16)
    before = pixels.clone()
    one, two = augment(pixels, tile_keys(16), config), augment(pixels, tile_keys(16, step=1), config)
    assert one.dtype == torch.uint8
    assert one.shape == pixels.shape
    assert not torch.equal(one, two)
    assert torch.equal(pixels, before)


def test_nothing_on_returns_the_very_same_tiles() -> None:
    pixels = random_tiles(2)
    assert augment(pixels, tile_keys(2), AugmentConfig()) is pixels


def test_rotation_is_that_of_torchvision_inside_the_tile() -> None:
    pixels = smooth_tiles(6)
    angles = torch.tensor([-180.0, -90, -12.5, 0, 30, 90])
    out = sample(pixels, stages._turned(angles))
    inside = disc(32)
    for tile, angle, turned in zip(pixels, angles.tolist(), out, strict=True):
        expected = vision.rotate(tile, angle, interpolation=vision.InterpolationMode.BILINEAR)
        assert difference(turned, expected)[:, inside].max() <= 2


def test_perspective_is_that_of_torchvision_inside_the_picture() -> None:
    pixels, size = smooth_tiles(5), 32
    inset = torch.rand(5, 4, 2, generator=torch.manual_seed(3)) * 0.5
    inset[0] = 0
    out = sample(pixels, stages._untilted(inset))
    square = [[0, 0], [size, 0], [size, size], [0, size]]
    white = torch.full((3, size, size), 255, dtype=torch.uint8)
    for tile, moved, tilted in zip(pixels, inset, out, strict=True):
        signs = torch.tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]])
        corners = (torch.tensor(square) + signs * moved * size / 2).tolist()
        expected = vision.perspective(tile, square, corners, fill=[0.0])
        inside = vision.perspective(white, square, corners, fill=[0.0])[0] == 255
        assert inside.sum() > 200
        assert difference(tilted, expected)[:, inside].max() <= 2


@given(st.lists(st.floats(0, 0.6), min_size=8, max_size=8))
def test_the_corners_of_a_tilted_picture_come_from_its_corners(inset: list[float]) -> None:
    corners = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]], dtype=torch.float64)
    moved = torch.tensor(inset, dtype=torch.float64).view(4, 2)
    places = torch.cat([corners * (1 - moved), torch.ones(4, 1)], 1) @ stages._untilted(moved[None])[0].T
    assert torch.allclose(places[:, :2] / places[:, 2:], corners, atol=1e-9)


def test_rotation_comes_before_perspective() -> None:
    pixels = smooth_tiles(1, 64)
    turned = stages._turned(torch.tensor([20.0]))
    untilted = stages._untilted(torch.rand(1, 4, 2, generator=torch.manual_seed(5)) * 0.4)
    once, twice = sample(pixels, turned @ untilted), sample(sample(pixels, turned), untilted)
    other = sample(sample(pixels, untilted), turned)
    inside = stages._sampling_grid(untilted, 64)[0].square().sum(-1) < 0.9
    assert difference(once, twice)[0, :, inside].max() <= 10  # what is resampled twice is a little smoother
    assert difference(once, other)[0, :, inside].max() > 40


def test_the_strongest_tilt_still_shows_pixels_of_the_tile() -> None:
    pixels = torch.full((2000, 3, 8, 8), 77, dtype=torch.uint8)
    out = augment(pixels, tile_keys(2000), AugmentConfig(perspective=1, rotation=180))
    assert torch.equal(out, pixels)


@pytest.mark.parametrize(
    ("name", "adjust", "low", "high"),
    [
        ("brightness", vision.adjust_brightness, 0.6, 1.4),
        ("contrast", vision.adjust_contrast, 0.6, 1.4),
        ("saturation", vision.adjust_saturation, 0.6, 1.4),
        ("hue", vision.adjust_hue, -0.4, 0.4),
    ],
)
def test_colours_move_as_in_torchvision(name: str, adjust: object, low: float, high: float) -> None:
    pixels, all_keys = random_tiles(8), tile_keys(8)
    pixels[0] = 90  # grey
    out = augment(pixels, all_keys, AugmentConfig(**{name: 0.4}))
    factors = stages._between(all_keys, name, low, high).tolist()
    assert max(factors) - min(factors) > 0.3
    for tile, factor, moved in zip(pixels, factors, out, strict=True):
        assert difference(moved, adjust(tile, factor)).max() <= 1  # type: ignore[operator]


def test_erasing_takes_its_share_of_tiles_and_of_their_area() -> None:
    pixels = torch.zeros(4000, 3, 32, 32, dtype=torch.uint8)
    out = augment(pixels, tile_keys(4000), AugmentConfig(erasing=0.25))
    assert set(out.unique().tolist()) == {0, stages.ERASED_VALUE}
    assert torch.equal(out[:, 0], out[:, 2])
    erased = (out[:, 0] > 0).float()
    share = erased.mean((1, 2))
    assert abs((share > 0).float().mean() - 0.25) < 0.03
    assert share[share > 0].min() > 0.01
    assert share.max() < 0.22
    boxes = erased.amax(1).sum(1) * erased.amax(2).sum(1)
    assert torch.equal(boxes, erased.sum((1, 2)))
    assert erased.mean(0).std() < 0.02 + erased.mean(0).mean()


def test_every_tile_is_erased_where_the_probability_is_one() -> None:
    out = augment(torch.zeros(500, 3, 4, 4, dtype=torch.uint8), tile_keys(500), AugmentConfig(erasing=1))
    assert (out.flatten(1).amax(1) == stages.ERASED_VALUE).all()


def test_blend_is_the_share_of_both_tiles() -> None:
    a, b = random_tiles(3, seed=1), random_tiles(3, seed=2)
    share = torch.tensor([1.0, 0.0, 0.3])
    mixed = stages.blend(a, b, share)
    assert torch.equal(mixed[:2], torch.stack([a[0], b[1]]))
    assert (mixed[2].float() - (0.3 * a[2] + 0.7 * b[2])).abs().max() <= 0.5001
    for i in range(3):
        assert torch.equal(stages.blend(a[i : i + 1], b[i : i + 1], share[i : i + 1])[0], mixed[i])


def sample(pixels: Tensor, source: Tensor) -> Tensor:
    grid = stages._sampling_grid(source, pixels.shape[-1])
    values = torch.nn.functional.grid_sample(pixels.float(), grid, padding_mode="reflection", align_corners=False)
    return values.round().to(torch.uint8)


def disc(size: int) -> Tensor:
    at = torch.arange(size) - (size - 1) / 2
    return at.square()[:, None] + at.square()[None, :] < (size / 2 - 1) ** 2


def difference(a: Tensor, b: Tensor) -> Tensor:
    return (a.int() - b.int()).abs()
