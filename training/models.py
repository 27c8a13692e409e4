"""One registry of model builders: a name, a class count and a tile size become an untrained ``nn.Module``.

Every model takes float ``[batch, channels, tile_size, tile_size]`` and returns logits ``[batch, classes]``; its last
linear layer is the head, :func:`backbone` is what is not.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from configs.errors import UsageError


def cnn(classes: int, tile_size: int, channels: int = 3, dropout: float = 0.25) -> nn.Module:
    """Three 3x3 convolutions of 16, 32 and 64 channels, each with ReLU and 2x2 pooling, then 500 hidden units.

    The small CIFAR-10 network of introductory courses (PyTorch "CIFAR-10 CNN", 2018), with the first fully connected
    layer sized to the tile. Dropout acts before each fully connected layer.
    """
    _require("cnn", tile_size, least=8)
    return nn.Sequential(
        *_conv(channels, 16, pool=True),
        *_conv(16, 32, pool=True),
        *_conv(32, 64, pool=True),
        nn.Flatten(),
        nn.Dropout(dropout),
        *_hidden(64 * (tile_size // 8) ** 2, 500, dropout),
        nn.Linear(500, classes),
    )


def cnn2(classes: int, tile_size: int, channels: int = 3, dropout: float = 0.3, head_dropout: float = 0.5) -> nn.Module:
    """Two 3x3 convolutions of 32 channels with ``dropout`` between them, 2x2 pooling, then 512 hidden units.

    The first CIFAR-10 network of Brownlee ("Object recognition with convolutional neural networks in Keras", 2016), as
    it was carried over to PyTorch by Tam (2023).
    """
    _require("cnn2", tile_size, least=2)
    return nn.Sequential(
        *_conv(channels, 32),
        nn.Dropout(dropout),
        *_conv(32, 32, pool=True),
        nn.Flatten(),
        *_hidden(32 * (tile_size // 2) ** 2, 512, head_dropout),
        nn.Linear(512, classes),
    )


def lenet(classes: int, tile_size: int, channels: int = 3) -> nn.Module:
    """Two 5x5 convolutions of 6 and 16 channels without padding, each with 2x2 pooling, then 120 and 84 hidden units.

    After LeNet-5 (LeCun et al., "Gradient-based learning applied to document recognition", 1998), with ReLU and maximum
    pooling, as in PyTorch's tutorial "Training a classifier".
    """
    _require("lenet", tile_size, least=16)
    side = ((tile_size - 4) // 2 - 4) // 2
    return nn.Sequential(
        *_conv(channels, 6, kernel=5, padding=0, pool=True),
        *_conv(6, 16, kernel=5, padding=0, pool=True),
        nn.Flatten(),
        *_hidden(16 * side * side, 120),
        *_hidden(120, 84),
        nn.Linear(84, classes),
    )


def customnet(
    classes: int, tile_size: int, channels: int = 3, dropout: float = 0.25, head_dropout: float = 0.5
) -> nn.Module:
    """Three 3x3 convolutions of 64, 128 and 256 channels without padding, each with 2x2 pooling, then 2048, 512 and 128
    hidden units: 20 million parameters at 64 pixels.

    "CustomNet", a network that was published with 81.8 % on EuroSAT RGB. ``dropout`` acts on the feature map,
    ``head_dropout`` after each hidden layer.
    """
    _require("customnet", tile_size, least=22)
    side = (((tile_size - 2) // 2 - 2) // 2 - 2) // 2
    return nn.Sequential(
        *_conv(channels, 64, padding=0, pool=True),
        *_conv(64, 128, padding=0, pool=True),
        *_conv(128, 256, padding=0, pool=True),
        nn.Dropout(dropout),
        nn.Flatten(),
        *_hidden(256 * side * side, 2048, head_dropout),
        *_hidden(2048, 512, head_dropout),
        *_hidden(512, 128, head_dropout),
        nn.Linear(128, classes),
    )


def folder_cnn(classes: int, tile_size: int, channels: int = 3, dropout: float = 0.0) -> nn.Module:
    """Two 3x3 convolutions of 16 and 32 channels, each with 2x2 pooling, then 128 hidden units with ``dropout``.

    The network of introductory courses on class folders of a few hundred photographs, where it learns them by heart.
    """
    _require("folder_cnn", tile_size, least=4)
    return nn.Sequential(
        *_conv(channels, 16, pool=True),
        *_conv(16, 32, pool=True),
        nn.Flatten(),
        *_hidden(32 * (tile_size // 4) ** 2, 128, dropout),
        nn.Linear(128, classes),
    )


def vgg16(classes: int, tile_size: int, channels: int = 3, dropout: float = 0.5) -> nn.Module:
    """VGG16, configuration D of Simonyan and Zisserman (2015), as torchvision builds it, with a head of ``classes``."""
    _require("vgg16", tile_size, least=32)
    from torchvision.models import vgg16 as build_vgg16  # here, as it takes a second that no other model needs

    model: nn.Module = build_vgg16(weights=None, num_classes=classes, dropout=dropout)
    if channels != 3:
        first = nn.Conv2d(channels, 64, kernel_size=3, padding=1)
        nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
        nn.init.zeros_(first.bias)  # type: ignore[arg-type]
        model.set_submodule("features.0", first)
    return model


def tilenet(classes: int, tile_size: int, channels: int = 3, width: float = 32, dropout: float = 0.2) -> nn.Module:
    """This project's own compact residual network for small tiles, made to be quick on a CPU.

    A 3x3 convolution of ``width`` channels, then three times a residual block (He et al. 2016) that keeps the shape and
    one that halves the side and doubles the channels, global average pooling, ``dropout`` and the head. A shortcut that
    changes the shape is average pooling before a 1x1 convolution (ResNet-D of He et al. 2019). The first convolution is
    pooled before its normalisation, which spares three quarters of the work on the largest feature map. With the
    default width and 10 classes it has 1.6 million parameters and takes 104 million multiply-adds for a tile of 64
    pixels.

    Batch normalisation (Ioffe and Szegedy 2015) takes its statistics over the tiles of one worker: results depend a
    little on the number of workers, unless the recipe sets ``sync_batch_norm``.
    """
    _require("tilenet", tile_size, least=8)
    if width < 1 or width != int(width):
        raise UsageError(f"model.arguments: tilenet's width is a number of channels, not {width:g}")
    stem = int(width)
    return nn.Sequential(
        nn.Conv2d(channels, stem, kernel_size=3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(stem),
        nn.ReLU(),
        *(_Residual(stem << stage, stem << stage + halve) for stage in range(3) for halve in (0, 1)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(stem << 3, classes),
    )


class _Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut, each normalised; ``[B, inputs, H, W]`` to ``[B, outputs, H, W]``, or to
    half of H and W where the channels change.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.main = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = (
            nn.Sequential(
                nn.AvgPool2d(2, ceil_mode=True),
                nn.Conv2d(inputs, outputs, kernel_size=1, bias=False),
                nn.BatchNorm2d(outputs),
            )
            if stride > 1
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.main(x) + self.shortcut(x))


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    builder.__name__: builder for builder in (cnn, cnn2, customnet, folder_cnn, lenet, tilenet, vgg16)
}
"""Model name in a recipe or bundle -> its builder."""


def build(name: str, classes: int, tile_size: int, *, channels: int = 3, **arguments: float) -> nn.Module:
    """The untrained model ``name``; raises :class:`UsageError` for an unknown name, argument or size."""
    if name not in BUILDERS:
        raise UsageError(f"model.name: no model {name!r}; there are {', '.join(sorted(BUILDERS))}")
    try:
        return BUILDERS[name](classes, tile_size, channels, **arguments)
    except (TypeError, ValueError) as error:
        raise UsageError(f"model.arguments: {name} does not take them ({error})") from error


def backbone(model: nn.Module) -> list[nn.Parameter]:
    """All parameters of ``model`` but those of its head, which is the last linear layer in every model so far."""
    head = head_names(model)
    return [parameter for key, parameter in model.named_parameters() if key not in head]


def take_head(model: nn.Module) -> nn.Module:
    """Take the head out of ``model``, which returns the features ``[batch, features]`` from then on, and return it."""
    name = _last_linear(model)
    head = model.get_submodule(name)
    model.set_submodule(name, nn.Identity())
    return head


def head_names(model: nn.Module) -> set[str]:
    """The names of the parameters of the head."""
    name = _last_linear(model)
    return {f"{name}.weight", f"{name}.bias"}


def _last_linear(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return str(names[-1])


def _require(name: str, tile_size: int, least: int) -> None:
    if tile_size < least:
        raise UsageError(f"model {name}: tiles of {tile_size} pixels are too small, {least} is the least")


def _conv(inputs: int, outputs: int, *, kernel: int = 3, padding: int = 1, pool: bool = False) -> list[nn.Module]:
    """A convolution with ReLU, and 2x2 pooling before it: the same values as after it, from a quarter of the work."""
    convolution = nn.Conv2d(inputs, outputs, kernel_size=kernel, padding=padding)
    return [convolution, *([nn.MaxPool2d(2)] if pool else []), nn.ReLU()]


def _hidden(inputs: int, outputs: int, dropout: float | None = None) -> list[nn.Module]:
    """A hidden layer with ReLU; dropout of 0 still has its place, so that layers have the same names for any value."""
    return [nn.Linear(inputs, outputs), nn.ReLU(), *([] if dropout is None else [nn.Dropout(dropout)])]
