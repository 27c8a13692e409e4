"""The forward pass of a bundle in PyTorch or OpenVINO: decoded pixels come in, what ``judge_pixels`` gives goes out.

Only the features of tiles are computed by what an engine is named for: the last layer and the distance, on which the
unknown tiles hang, stay in float32.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor, nn

from configs.errors import UsageError
from training.augment import normalise
from training.bundle import BundleInfo

REFERENCE = "torch"
"""The engine that others have to agree with: PyTorch in float32."""

ENGINES = {
    "cpu": ("openvino-bf16", "openvino", "torch-bf16", REFERENCE),
    "cuda": ("compiled-bf16", "torch-bf16", REFERENCE),
}
"""Device -> its engines, the likely fastest first. ``-bf16`` computes features in bfloat16, the others in float32;
``compiled`` is ``torch.compile`` with CUDA graphs."""

BATCH_SIZE = 256
"""Tiles that an engine takes at a time."""

PIECE_PIXELS, LEAST_PIECE = 1 << 17, 4
"""On a CPU features are computed for as many tiles as have this many pixels, 32 of 64x64, so that they stay in cache:
OpenVINO is up to twice as fast as with 256."""

Features = Callable[[Tensor], Tensor]


class Engine:
    """The forward pass ``name`` of ``judge``, which it takes over, for up to ``batch_size`` tiles at a time.

    Whatever is called, all arithmetic is done on arrays of the same shapes, so that a tile's result does not depend on
    how many tiles come with it. ``threads`` are OpenVINO's; PyTorch's are set for the process. To be called from one
    thread only. Raises :class:`UsageError` where there is no such engine here.
    """

    def __init__(
        self,
        name: str,
        judge: nn.Module,
        info: BundleInfo,
        device: str = "cpu",
        batch_size: int = BATCH_SIZE,
        threads: int | None = None,
    ) -> None:
        require(name, device)
        size = info.tile_size
        self.name = name
        self.batch_size = batch_size
        self.rows = min(batch_size, max(PIECE_PIXELS // size**2, LEAST_PIECE)) if device == "cpu" else batch_size
        body = _Body(judge.get_submodule("body"), info)
        judge.set_submodule("body", nn.Identity())
        self._rest = judge.to(device)
        width = judge.get_parameter("head.weight").shape[1]
        self._piece = torch.zeros(self.rows, info.channels, size, size, dtype=torch.uint8)
        self._features = torch.zeros(-(-batch_size // self.rows) * self.rows, width, device=device)
        if name.startswith("openvino"):
            self._forward = _openvino(body, self._piece, name.endswith("-bf16"), threads or torch.get_num_threads())
        else:
            self._forward = _torch(body, device, name.endswith("-bf16"), name.startswith("compiled"))

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 ``[N, channels, size, size]``, N up to ``batch_size``, to logits over the temperature, float32
        ``[N, classes]``, and distances, float32 ``[N]``, both on the CPU.
        """
        count = len(pixels)
        with torch.no_grad():
            for start in range(0, count, self.rows):
                piece = pixels[start : start + self.rows].contiguous()
                if len(piece) < self.rows:
                    self._piece[: len(piece)] = piece
                    piece = self._piece
                self._features[start : start + self.rows] = self._forward(piece)
            logits, distances = self._rest(self._features)
            return logits[:count].cpu(), distances[:count].cpu()


class _Body(nn.Module):
    """uint8 ``[B, channels, size, size]`` to features ``[B, features]``."""

    def __init__(self, body: nn.Module, info: BundleInfo) -> None:
        super().__init__()
        self.body = body
        self.mean, self.std = info.mean, info.std

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.body(normalise(pixels, self.mean, self.std))
        return features


def find_device(name: str) -> str:
    """``cpu`` or ``cuda``; ``auto`` is a GPU where there is one. Raises :class:`UsageError` for a missing device."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ENGINES or (name == "cuda" and not torch.cuda.is_available()):
        raise UsageError(f"device {name!r}: not available here; choose auto or cpu")
    return name


def require(name: str, device: str) -> None:
    """Raise :class:`UsageError` where this machine has no engine ``name`` on ``device``."""
    if reason := missing(name, device):
        here = [other for other in ENGINES[device] if not missing(other, device)]
        raise UsageError(f"engine {name}: {reason}; there are {', '.join(here)}")


def missing(name: str, device: str) -> str | None:
    """Why this machine has no engine ``name`` on ``device``; None where it has."""
    if name not in ENGINES[device]:
        return f"there is none on {device}"
    if name.startswith("openvino"):
        if find_spec("openvino") is None:
            return "OpenVINO is not installed (pip install openvino)"
        core = _import_openvino().Core()
        if name.endswith("-bf16") and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            return "this processor does not compute in bfloat16"
    return None


def _torch(body: nn.Module, device: str, bf16: bool, compiled: bool) -> Features:
    body = body.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    run = torch.compile(body, mode="reduce-overhead", dynamic=False) if compiled else body

    def features(pixels: Tensor) -> Tensor:
        # TF32 would make the reference one of ten bits of precision.
        exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        with exact, torch.autocast(device, torch.bfloat16, enabled=bf16):
            found: Tensor = run(pixels.to(device))
            return found

    return features


def _import_openvino() -> ModuleType:
    """OpenVINO without the companion that reports each conversion to its makers, which it can do without."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    module: ModuleType = openvino
    return module


def _openvino(body: nn.Module, piece: Tensor, bf16: bool, threads: int) -> Features:
    """The result of the function is overwritten by its next call."""
    openvino = _import_openvino()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of numbers of the bundle, which are constants indeed
        kind = (tuple(piece.shape), openvino.Type.u8)
        model = openvino.convert_model(body, example_input=piece[:1], input=[kind])
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # workers that know nothing of each other would share a core
    }
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    output = torch.from_numpy(request.get_output_tensor(0).data)

    def features(pixels: Tensor) -> Tensor:
        request.infer({0: pixels.numpy()}, share_inputs=True, share_outputs=True)
        return output

    return features
