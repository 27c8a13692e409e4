"""Who decodes for a GPU, threads on the CPU or the GPU itself: measured on real tiles, and checked as engines are.

The GPU's decoder rounds otherwise than the CPU's, so its pixels differ a little. It is taken where it is the faster and
classes stay the same. Both ways stand in :mod:`inference.predictor`, a third in :mod:`inference.pool`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from configs.errors import TilefleetError
from inference.engines import SECONDS, Trial, compare, joined
from inference.forward import BATCH_SIZE, REFERENCE, Engine
from inference.predictor import Decode, decode_threads, on_gpu, on_threads, split
from training.bundle import load_bundle


def choose_decoder(
    bundle: str, sample: Sequence[bytes], device: str, decode: str = "auto", batch_size: int = BATCH_SIZE
) -> tuple[str, dict[str, Trial]]:
    """``cpu`` or ``gpu``, whichever decodes ``sample``, a few hundred encoded images, the faster for ``device``.

    With it comes what was found of each. ``gpu`` is accepted where PyTorch in float32 gives the same classes for its
    pixels as for the CPU's, by the measure for engines, and without a tile that can be decoded not at all. ``decode``
    is ``auto``, or ``gpu``, which is checked and not compared in speed. Raises :class:`TilefleetError` where ``gpu`` is
    asked for and not accepted. Speed is that of one worker which has the machine to itself.
    """
    judge, info = load_bundle(bundle)
    threads, gpu = on_threads(info, decode_threads(device)), on_gpu(info, device)
    batches = split(sample, batch_size)
    engine = Engine(REFERENCE, judge, info, device, batch_size)
    answers: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for batch in batches:
        pixels, errors = threads(batch)
        whole = torch.tensor([error is None for error in errors])
        for answer, found in zip(answers, (pixels, gpu(batch)[0]), strict=True):
            if whole.any():
                answer.append(engine(found[whole.to(found.device)]))
    if not answers[0]:
        if decode == "gpu":
            raise TilefleetError("decode=gpu: no tile of the sample can be decoded to check it with; choose cpu")
        return "cpu", {"cpu": Trial(), "gpu": Trial(reason="there was no tile to check it with")}
    agreed = compare(info, joined(answers[0]), joined(answers[1]))
    verdict = "" if agreed.accepted else f"gives {agreed.other_class} of {agreed.tiles} tiles another class"
    if decode == "gpu" and verdict:
        raise TilefleetError(f"decode=gpu: {verdict}, which is too many; choose auto or cpu")
    trials = {
        "cpu": Trial(tiles_per_second=_rate(threads, batches, device)),
        "gpu": Trial(tiles_per_second=_rate(gpu, batches, device), agreement=agreed, reason=verdict),
    }
    accepted = ["gpu"] if decode == "gpu" else [name for name, trial in trials.items() if not trial.reason]
    taken = max(accepted, key=lambda name: trials[name].tiles_per_second or 0)
    other = trials["cpu" if taken == "gpu" else "gpu"]
    other.reason = other.reason or (f"slower than {taken}" if decode == "auto" else "not asked for")
    return taken, trials


def _rate(decode: Decode, batches: Sequence[Sequence[bytes]], device: str) -> float:
    """The best tiles/s over whole ``batches``, until their pixels are on ``device``."""
    rate, number, end = 0.0, 0, time.perf_counter() + SECONDS
    while not number or time.perf_counter() < end:
        batch = batches[number % len(batches)]
        began = time.perf_counter()
        decode(batch)[0].to(device)
        if device == "cuda":
            torch.cuda.synchronize()
        rate = max(rate, len(batch) / (time.perf_counter() - began))
        number += 1
    return rate
