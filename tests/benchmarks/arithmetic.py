"""How many tiles a second the arithmetic of this machine allows a model, whatever computes it without a trick.

In goes a model and a tile size; out comes one JSON line: the operations of a tile's forward pass, for each precision
the rate of a large matrix product on all cores or on the GPU, and tiles/s at that rate.

    python -m tests.benchmarks.arithmetic vgg16 64
"""

from __future__ import annotations

import json
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from training import models

SIDE, SECONDS = 4096, 5.0
PRECISIONS = {"f32": torch.float32, "bf16": torch.bfloat16}


def operations(model: str, tile_size: int) -> int:
    """Floating-point operations of a tile's forward pass, a multiply-add counted as two."""
    network = models.build(model, 10, tile_size).eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, tile_size, tile_size))
    return int(counter.get_total_flops())


def rate(precision: torch.dtype, device: str) -> float:
    """The best of some seconds of matrix products, in floating-point operations a second."""
    left, right = (torch.randn(SIDE, SIDE, device=device).to(precision) for _ in range(2))
    best, end = 0.0, time.monotonic() + SECONDS
    while time.monotonic() < end:
        began = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * SIDE**3 / (time.perf_counter() - began))
    return best


def main(model: str, tile_size: int) -> None:
    """Measure and print."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    each = operations(model, tile_size)
    found = {name: rate(precision, device) for name, precision in PRECISIONS.items()}
    print(
        json.dumps(
            {
                "model": model,
                "tile_size": tile_size,
                "device": device,
                "gflop_per_tile": round(each / 1e9, 3),
                "gflop_per_second": {name: round(value / 1e9) for name, value in found.items()},
                "tiles_per_second": {name: round(value / each, 1) for name, value in found.items()},
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
