"""The model bundle: the only thing inference takes from training.

A folder of two files: ``model.safetensors`` holds the weights, ``bundle.json`` everything needed to use them. Both
are covered by sha256 digests, so a bundle that was cut or changed is refused. Nothing in it is a pickle.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from cluster import storage
from configs.errors import TilefleetError, UsageError
from configs.schema import Sealed
from training import models
from training.augment import normalise

WEIGHTS = "model.safetensors"
INFO = "bundle.json"


class BundleInfo(Sealed):
    """``bundle.json``. ``mean`` and ``std`` are per channel on pixels scaled to 0..1."""

    version: int = 1
    architecture: str
    arguments: dict[str, float] = Field(default_factory=dict)
    classes: list[str]
    tile_size: int
    mean: list[float]
    std: list[float]
    temperature: float = 1.0
    unknown_threshold: float = 0.0
    metrics: dict[str, float] = Field(default_factory=dict)
    recipe: dict[str, Any] = Field(default_factory=dict)
    data_fingerprint: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    weights_sha256: str = ""


def save_bundle(location: str | Path, model: nn.Module, info: BundleInfo) -> BundleInfo:
    """Write a bundle; ``bundle.json`` comes last, so an interrupted save is seen as a changed bundle."""
    weights = save_safetensors(
        {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    )
    info = info.model_copy(update={"weights_sha256": hashlib.sha256(weights).hexdigest()}).sealed()
    storage.write_bytes(storage.join(location, WEIGHTS), weights)
    storage.write_bytes(storage.join(location, INFO), info.model_dump_json(indent=1).encode())
    return info


def read_info(location: str | Path) -> BundleInfo:
    """``bundle.json`` alone, checked against its digest; raises where it is missing, broken or changed."""
    path = storage.join(location, INFO)
    if not storage.exists(location):
        raise UsageError(f"{location}: no such bundle")
    if not storage.exists(path):
        raise TilefleetError(f"{location}: not a bundle, {INFO} is missing")
    try:
        info = BundleInfo.model_validate_json(storage.read_bytes(path))
    except ValidationError as error:
        raise TilefleetError(
            f"{path}: damaged or not a bundle ({error.error_count()} fields wrong); use another copy"
        ) from error
    if not info.is_intact():
        raise TilefleetError(f"{path}: changed since it was saved; use another copy or train again")
    return info


def check_bundle(location: str | Path) -> BundleInfo:
    """The info of a bundle that is whole; raises where any part is missing or changed. No model is built."""
    info = read_info(location)
    _read_weights(location, info)
    return info


def load_bundle(location: str | Path) -> tuple[nn.Module, BundleInfo]:
    """The trained model in evaluation mode, on the CPU, and its info; raises where any part is missing or changed."""
    info = read_info(location)
    weights = _read_weights(location, info)
    model = models.build(info.architecture, len(info.classes), info.tile_size, **info.arguments)
    try:
        model.load_state_dict(load_safetensors(weights))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise TilefleetError(f"{location}: the weights do not fit the model {info.architecture} ({reason})") from error
    return model.eval(), info


def bundle_logits(model: nn.Module, info: BundleInfo, pixels: Tensor, device: torch.device | str) -> Tensor:
    """Logits over the temperature, float32 ``[B, classes]`` on ``device``, for uint8 ``[B, 3, size, size]``.

    Evaluation and inference both judge these numbers: float32 on the CPU, bfloat16 autocast on a GPU. ``model`` must
    be on ``device``.
    """
    kind = torch.device(device).type
    with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        logits: Tensor = model(normalise(pixels.to(device), info.mean, info.std))
        return logits.float() / info.temperature


def known_score(logits: Tensor) -> Tensor:
    """How sure a model is that tiles are of one of its classes: ``[B]`` for calibrated logits ``[B, classes]``.

    It is the largest probability (Hendrycks and Gimpel 2017). The ``unknown`` threshold is set on this score, and
    whatever judges it takes the score from here.
    """
    return torch.softmax(logits, dim=1).amax(dim=1)


def is_unknown(info: BundleInfo, score: Tensor) -> Tensor:
    """Which tiles of :func:`known_score` ``[B]`` are unknown: bool ``[B]``."""
    return ~(score >= info.unknown_threshold)  # so NaN is unknown


def _read_weights(location: str | Path, info: BundleInfo) -> bytes:
    path = storage.join(location, WEIGHTS)
    if not storage.exists(path):
        raise TilefleetError(f"{location}: its weights are missing, {WEIGHTS} should stand beside {INFO}")
    weights = storage.read_bytes(path)
    if hashlib.sha256(weights).hexdigest() != info.weights_sha256:
        raise TilefleetError(f"{path}: changed since it was saved or cut short; use another copy or train again")
    return weights
