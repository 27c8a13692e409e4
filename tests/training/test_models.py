"""The model registry."""

from __future__ import annotations

import pytest
import torch

from configs.errors import UsageError
from training import models


@pytest.mark.parametrize(("name", "size"), [("cnn", 8), ("cnn", 64), ("cnn", 100), ("vgg16", 32), ("vgg16", 64)])
@pytest.mark.parametrize("classes", [2, 43])
def test_any_tile_size_and_class_count(name: str, size: int, classes: int) -> None:
    with torch.device("meta"):
        model = models.build(name, classes, size)
        assert model(torch.zeros(2, 3, size, size)).shape == (2, classes)


def test_cnn_is_the_published_network() -> None:
    model = models.build("cnn", 10, 32)
    shapes = [tuple(p.shape) for p in model.parameters() if p.ndim > 1]
    assert shapes == [(16, 3, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (500, 1024), (10, 500)]


@pytest.mark.parametrize(
    ("name", "size", "arguments", "says"),
    [
        ("resnet", 64, {}, "no model 'resnet'; there are cnn, vgg16"),
        ("cnn", 64, {"depth": 3}, "model.arguments"),
        ("cnn", 4, {}, "too small"),
        ("vgg16", 16, {}, "too small"),
    ],
)
def test_what_cannot_be_built_is_named(name: str, size: int, arguments: dict[str, float], says: str) -> None:
    with pytest.raises(UsageError, match=says), torch.device("meta"):
        models.build(name, 10, size, **arguments)
