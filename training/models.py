"""One registry of model builders: a name, a class count and a tile size become an untrained ``nn.Module``.

Every model takes float ``[batch, 3, tile_size, tile_size]`` and returns logits ``[batch, classes]``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torchvision.models import vgg16 as torchvision_vgg16

from configs.errors import UsageError


def cnn(classes: int, tile_size: int, dropout: float = 0.25) -> nn.Module:
    """Three 3x3 convolutions of 16, 32 and 64 channels, each with ReLU and 2x2 pooling, then 500 hidden units.

    The small CIFAR-10 network of introductory courses (PyTorch "CIFAR-10 CNN", 2018), with the first fully connected
    layer sized to the tile. Dropout acts before each fully connected layer.
    """
    side = tile_size // 8
    if side < 1:
        raise UsageError(f"model cnn: tiles of {tile_size} pixels are too small, 8 is the least")
    return nn.Sequential(
        *_conv_block(3, 16),
        *_conv_block(16, 32),
        *_conv_block(32, 64),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(64 * side * side, 500),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(500, classes),
    )


def vgg16(classes: int, tile_size: int, dropout: float = 0.5) -> nn.Module:
    """VGG16, configuration D of Simonyan and Zisserman (2015), as torchvision builds it, with a head of ``classes``."""
    if tile_size < 32:
        raise UsageError(f"model vgg16: tiles of {tile_size} pixels are too small, 32 is the least")
    model: nn.Module = torchvision_vgg16(weights=None, num_classes=classes, dropout=dropout)
    return model


BUILDERS: dict[str, Callable[..., nn.Module]] = {"cnn": cnn, "vgg16": vgg16}
"""Model name in a recipe or bundle -> its builder."""


def build(name: str, classes: int, tile_size: int, **arguments: float) -> nn.Module:
    """The untrained model ``name``; raises :class:`UsageError` for an unknown name, argument or size."""
    if name not in BUILDERS:
        raise UsageError(f"model.name: no model {name!r}; there are {', '.join(sorted(BUILDERS))}")
    try:
        return BUILDERS[name](classes, tile_size, **arguments)
    except TypeError as error:
        raise UsageError(f"model.arguments: {name} does not take them ({error})") from error


def _conv_block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
