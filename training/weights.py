"""Weights that a model starts from: torchvision's own by their name, or those of a trained one in a file.

In come a model and where the weights are, out comes the same model with them; its head keeps the values it has.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from cluster import storage
from configs.errors import TilefleetError, UsageError
from training.models import head_names

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

PUBLISHED = frozenset({"vgg16"})
"""Models for which torchvision can fetch weights, by the name that it gives them."""


def initialise(name: str, model: nn.Module, weights: str) -> None:
    """Give ``model``, which is a ``name``, the weights of a trained one; its head keeps the values it has.

    ``weights`` is torchvision's own name of them, such as ``IMAGENET1K_V1``, which is fetched once and kept in torch's
    cache, or a state dict in a file: ``.safetensors`` (that of a bundle too), or torch's ``.pth``, which is never
    unpickled beyond tensors. Raises :class:`UsageError` where there is no such thing, :class:`TilefleetError` where it
    cannot be fetched or read, does not fit the model, or holds values that are not finite.
    """
    published = _published(name)
    if weights in published:
        state = _fetch(weights, published[weights])
    elif storage.exists(weights) and not storage.is_dir(weights):
        state = _read_state(weights)
    else:
        names = f"a name that torchvision knows for {name} ({', '.join(published)})" if published else "nothing else"
        raise UsageError(f"model.weights: {weights}: no such file; it can be a .safetensors or .pth file, or {names}")
    head = head_names(model)
    wanted = {key: value for key, value in model.state_dict().items() if key not in head}
    state = {key: value for key, value in state.items() if key not in head}
    for key in wanted | state:
        if key not in state:
            raise TilefleetError(f"{weights}: does not fit model {name}: {key} is missing")
        if key not in wanted:
            raise TilefleetError(f"{weights}: does not fit model {name}, which has no {key}")
        if state[key].shape != wanted[key].shape:
            shapes = f"{list(state[key].shape)}, not {list(wanted[key].shape)}"
            raise TilefleetError(f"{weights}: does not fit model {name}: {key} is {shapes}")
        if not state[key].isfinite().all():
            raise TilefleetError(f"{weights}: {key} holds values that are not finite; use other weights")
    model.load_state_dict(state, strict=False)


def _published(name: str) -> Mapping[str, WeightsEnum]:
    if name not in PUBLISHED:
        return {}
    from torchvision.models import get_model_weights

    members: Mapping[str, WeightsEnum] = get_model_weights(name).__members__
    return members


def _fetch(name: str, published: WeightsEnum) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = published.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network, no room; a download that is not what it should be
        file = published.url.rsplit("/", 1)[-1]
        raise TilefleetError(
            f"model.weights: {name} cannot be fetched ({error}); copy {file} here and give its path instead"
        ) from error
    return state


def _read_state(location: str) -> dict[str, Tensor]:
    data = storage.read_bytes(location)
    if location.endswith(".safetensors"):
        try:
            tensors: dict[str, Tensor] = load_safetensors(data)
            return tensors
        except SafetensorError as error:
            raise TilefleetError(f"{location}: damaged or not a safetensors file ({error})") from error
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # the restricted unpickler raises many types on damaged or hostile files
        raise TilefleetError(f"{location}: damaged, or holds more than tensors; use another copy") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TilefleetError(f"{location}: not a state dict (names and tensors); save model.state_dict() alone")
    return state
