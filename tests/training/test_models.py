"""The model registry, and weights that a model starts from."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from configs.errors import UsageError
from training import models

LEAST = {"cnn": 8, "cnn2": 2, "customnet": 22, "folder_cnn": 4, "lenet": 16, "tilenet": 8, "vgg16": 32}


def shapes(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in model.parameters() if p.ndim > 1]


def test_every_model_is_tested_at_its_least_tile_size() -> None:
    assert LEAST.keys() == models.BUILDERS.keys()


@pytest.mark.parametrize("classes", [2, 43])
@pytest.mark.parametrize("name", LEAST)
def test_any_tile_size_and_class_count(name: str, classes: int) -> None:
    for size in (LEAST[name], LEAST[name] + 1, 32, 64, 100, 224):
        with torch.device("meta"):
            model = models.build(name, classes, size)
            assert model(torch.zeros(2, 3, size, size)).shape == (2, classes)


@pytest.mark.parametrize("channels", [1, 4, 13])
@pytest.mark.parametrize("name", LEAST)
def test_any_number_of_channels(name: str, channels: int) -> None:
    with torch.device("meta"):
        model = models.build(name, 5, 32, channels=channels)
        assert model(torch.zeros(2, channels, 32, 32)).shape == (2, 5)
        assert shapes(model)[1:] == shapes(models.build(name, 5, 32))[1:]


def test_the_first_layer_of_vgg16_is_drawn_as_the_others_are() -> None:
    torch.manual_seed(0)
    first = models.build("vgg16", 5, 32, channels=13).get_submodule("features.0")
    assert float(first.weight.std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.03)  # He et al. 2015, by outputs
    assert not first.bias.any()


@pytest.mark.parametrize("name", LEAST)
def test_tiles_that_are_too_small_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}: tiles of {LEAST[name] - 1} pixels are too small, {LEAST[name]} is"):
        models.build(name, 10, LEAST[name] - 1)


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("cnn", 32, [(16, 3, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (500, 1024), (10, 500)]),
        ("cnn2", 32, [(32, 3, 3, 3), (32, 32, 3, 3), (512, 8192), (10, 512)]),
        ("lenet", 32, [(6, 3, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)]),
        ("folder_cnn", 100, [(16, 3, 3, 3), (32, 16, 3, 3), (128, 20_000), (10, 128)]),
        (
            "customnet",
            64,
            [(64, 3, 3, 3), (128, 64, 3, 3), (256, 128, 3, 3), (2048, 9216), (512, 2048), (128, 512), (10, 128)],
        ),
    ],
)
def test_layers_are_the_published_ones(name: str, size: int, expected: list[tuple[int, ...]]) -> None:
    with torch.device("meta"):
        assert shapes(models.build(name, 10, size)) == expected


def test_dropout_is_where_it_was_published() -> None:
    def rates(name: str, **arguments: float) -> list[float]:
        with torch.device("meta"):
            model = models.build(name, 10, 32, **arguments)
        return [module.p for module in model.modules() if isinstance(module, nn.Dropout)]

    assert rates("cnn") == [0.25, 0.25]
    assert rates("cnn2") == [0.3, 0.5]
    assert rates("customnet") == [0.25, 0.5, 0.5, 0.5]
    assert rates("folder_cnn", dropout=0.8) == [0.8]
    assert rates("lenet") == []


def test_tilenet_is_as_small_as_it_says() -> None:
    model = models.build("tilenet", 10, 64)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 64, 64))
    assert round(counter.get_total_flops() / 1e6) == 208
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 1.6
    assert shapes(models.build("tilenet", 10, 64, width=16))[0] == (16, 3, 3, 3)


def test_tilenet_learns_a_handful_of_tiles() -> None:
    torch.manual_seed(0)
    model, tiles, labels = models.build("tilenet", 4, 8, width=8), torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(10):
        loss = nn.functional.cross_entropy(model(tiles), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 4


@pytest.mark.parametrize(
    ("name", "size", "arguments", "says"),
    [
        ("resnet", 64, {}, "no model 'resnet'; there are cnn, cnn2, customnet, folder_cnn, lenet, tilenet, vgg16"),
        ("cnn", 64, {"depth": 3}, "model.arguments"),
        ("cnn", 64, {"dropout": 2}, "model.arguments: cnn does not take them .*dropout"),
        ("tilenet", 64, {"width": 1.5}, "width is a number of channels, not 1.5"),
        ("tilenet", 64, {"width": 0}, "width is a number of channels, not 0"),
    ],
)
def test_what_cannot_be_built_is_named(name: str, size: int, arguments: dict[str, float], says: str) -> None:
    with pytest.raises(UsageError, match=says), torch.device("meta"):
        models.build(name, 10, size, **arguments)


@pytest.mark.parametrize("name", sorted(set(LEAST) - {"vgg16"}))
def test_the_backbone_is_all_but_the_head(name: str) -> None:
    with torch.device("meta"):
        model = models.build(name, 7, 32)
    head = list(model.parameters())[-2:]
    backbone = models.backbone(model)
    assert [p.shape[0] for p in head] == [7, 7]
    assert not any(p is h for p in backbone for h in head)
    assert len(backbone) == len(list(model.parameters())) - 2
