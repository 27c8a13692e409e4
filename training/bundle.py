"""The model bundle: the only thing inference takes from training.

A folder: ``model.safetensors`` holds the weights, ``unknown.safetensors``, once the bundle is calibrated, where the
features of training tiles lie, and ``bundle.json`` everything needed to use them. All are covered by sha256 digests, so
a bundle that was cut or changed is refused. Nothing in it is a pickle. What looks at no weights
imports no PyTorch.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from cluster import storage
from configs.errors import TilefleetError, UsageError
from configs.schema import Sealed
from training.encoded import Bands, channels

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from training.judge import Judge, Reference

WEIGHTS = "model.safetensors"
REFERENCE = "unknown.safetensors"
INFO = "bundle.json"
VERSION = 3


class BundleInfo(Sealed):
    """``bundle.json``. ``mean`` and ``std`` are per channel on pixels scaled to 0..1, ``bands`` those of the shard set.

    Tiles farther than ``unknown_threshold`` (see :mod:`training.judge`) are unknown; None, before calibration: none is.
    """

    version: int = VERSION
    architecture: str
    arguments: dict[str, float] = Field(default_factory=dict)
    classes: list[str]
    tile_size: int
    bands: Bands | None = None
    mean: list[float]
    std: list[float]
    temperature: float = 1.0
    unknown_threshold: float | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    recipe: dict[str, Any] = Field(default_factory=dict)
    data_fingerprint: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    weights_sha256: str = ""
    reference_sha256: str = ""

    @property
    def channels(self) -> int:
        """Channels of the pixels that the model takes."""
        return channels(self.bands)


def save_bundle(location: str | Path, model: nn.Module, info: BundleInfo) -> BundleInfo:
    """Write an uncalibrated bundle; ``bundle.json`` comes last, so an interrupted save is seen as a changed bundle."""
    from safetensors.torch import save as save_safetensors

    weights = save_safetensors(
        {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    )
    info = info.model_copy(update={"weights_sha256": hashlib.sha256(weights).hexdigest()}).sealed()
    storage.write_bytes(storage.join(location, WEIGHTS), weights)
    storage.write_bytes(storage.join(location, INFO), info.model_dump_json(indent=1).encode())
    return info


def save_calibration(
    location: str | Path, info: BundleInfo, temperature: float, reference: Reference, unknown_threshold: float
) -> BundleInfo:
    """Give a saved bundle, whose info is ``info``, what was found on its validation split."""
    from safetensors.torch import save as save_safetensors

    data = save_safetensors(vars(reference))
    found = {"temperature": temperature, "unknown_threshold": unknown_threshold}
    info = info.model_copy(update=found | {"reference_sha256": hashlib.sha256(data).hexdigest()}).sealed()
    storage.write_bytes(storage.join(location, REFERENCE), data)
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
    if info.version != VERSION:
        raise TilefleetError(f"{path}: a bundle of version {info.version}, this is for version {VERSION}; train again")
    if not info.is_intact():
        raise TilefleetError(f"{path}: changed since it was saved; use another copy or train again")
    return info


def check_bundle(location: str | Path) -> BundleInfo:
    """The info of a bundle that is whole; raises where any part is missing or changed. No model is built."""
    info = read_info(location)
    _read(location, WEIGHTS, info.weights_sha256)
    if info.reference_sha256:
        _read(location, REFERENCE, info.reference_sha256)
    return info


def load_bundle(location: str | Path) -> tuple[Judge, BundleInfo]:
    """The trained model in evaluation mode, on the CPU, and its info; raises where any part is missing or changed."""
    from safetensors.torch import load as load_safetensors

    from training import models
    from training.judge import Judge, Reference

    info = read_info(location)
    weights = _read(location, WEIGHTS, info.weights_sha256)
    classes, size = len(info.classes), info.tile_size
    model = models.build(info.architecture, classes, size, channels=info.channels, **info.arguments)
    try:
        model.load_state_dict(load_safetensors(weights))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise TilefleetError(f"{location}: the weights do not fit the model {info.architecture} ({reason})") from error
    reference = None
    if info.reference_sha256:
        reference = Reference(**load_safetensors(_read(location, REFERENCE, info.reference_sha256)))
    return Judge(model, info.temperature, reference).eval(), info


def judge_pixels(judge: Judge, info: BundleInfo, pixels: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Logits over the temperature, float32 ``[B, classes]``, and distances, float32 ``[B]``, both on ``device``, for
    uint8 ``[B, channels, size, size]``.

    Evaluation and inference both judge these numbers: float32 on the CPU, bfloat16 autocast on a GPU. ``judge`` must
    be on ``device``.
    """
    import torch

    from training.augment import normalise

    kind = torch.device(device).type
    with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        found: tuple[Tensor, Tensor] = judge(normalise(pixels.to(device), info.mean, info.std))
        return found


def is_unknown(info: BundleInfo, distances: Tensor) -> Tensor:
    """Which tiles are unknown by their distances ``[B]``: bool ``[B]``."""
    if info.unknown_threshold is None:
        import torch

        return torch.zeros_like(distances, dtype=torch.bool)
    return ~(distances <= info.unknown_threshold)  # so NaN is unknown


def _read(location: str | Path, name: str, sha256: str) -> bytes:
    path = storage.join(location, name)
    if not storage.exists(path):
        raise TilefleetError(f"{location}: a part is missing, {name} should stand beside {INFO}")
    data = storage.read_bytes(path)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise TilefleetError(f"{path}: changed since it was saved or cut short; use another copy or train again")
    return data
