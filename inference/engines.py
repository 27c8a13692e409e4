"""Which engine classifies: measured on real tiles, and checked against PyTorch in float32, the reference.

:func:`choose` takes the fastest engine of a device that gives the same classes as the reference; :func:`agreement` says
what one costs on a whole split. What an engine is stands in :mod:`inference.forward`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from configs.errors import TilefleetError
from inference.forward import BATCH_SIZE, ENGINES, REFERENCE, Engine, find_device, missing, require
from training.bundle import BundleInfo, is_unknown, load_bundle
from training.decode import decode_tiles
from training.shards import TileReader

SECONDS, REFERENCE_SECONDS = 1.0, 3.0
"""How long an engine is measured, and how long the reference may take over the sample."""

ALLOWED = 0.001
"""Share of the tiles that may be given another class than by the reference."""

BORDERLINE = 0.1
"""A tile is undecided between two classes whose probabilities are nearer than this."""


class Agreement(BaseModel):
    """How an engine's answers compare with the reference's on the same tiles."""

    model_config = ConfigDict(extra="forbid")

    tiles: int
    other_class: int  # tiles whose top class is another
    other_class_decided: int  # those of them that the reference was not undecided about
    other_unknown: int  # tiles that only one of the two takes for unknown
    largest_difference: float  # of probabilities
    finite: bool  # logits and distances have neither NaN nor infinity
    accuracy: float | None = None  # of the engine, where labels are known
    reference_accuracy: float | None = None

    @property
    def accepted(self) -> bool:
        """At least 99.9 % of the tiles have the same top class; of fewer than 1000, all but one undecided tile."""
        if self.tiles * ALLOWED >= 1:
            return self.finite and self.other_class <= self.tiles * ALLOWED
        return self.finite and self.other_class <= 1 and not self.other_class_decided

    def __str__(self) -> str:
        if not self.finite:
            return "gives numbers that are not finite"
        return f"differs from {REFERENCE} in {self.other_class} of {self.tiles} tiles"


class Trial(BaseModel):
    """What :func:`choose` found of one engine; ``reason`` says why it was not taken, and is empty for the one taken."""

    model_config = ConfigDict(extra="forbid")

    tiles_per_second: float | None = None
    agreement: Agreement | None = None
    reason: str = ""


class Choice(BaseModel):
    """The engine to use on ``device`` (``cpu`` or ``cuda``), and what was found of each."""

    model_config = ConfigDict(extra="forbid")

    engine: str
    device: str
    trials: dict[str, Trial]


def choose(
    bundle: str,
    sample: Sequence[bytes],
    device: str = "auto",
    threads: int | None = None,
    engine: str = "auto",
    batch_size: int = BATCH_SIZE,
) -> Choice:
    """The fastest engine of ``device`` that agrees with the reference on ``sample``, a few hundred encoded images.

    Each engine is measured for :data:`SECONDS`, one that is half as fast as the best only until that shows. ``engine``
    other than ``auto`` is checked alone. Without a tile that can be decoded ``auto`` takes the reference. ``threads``
    sets PyTorch's threads for this process. Raises :class:`UsageError` where ``engine`` is not to be had here, and
    :class:`TilefleetError` where it does not agree.
    """
    device = find_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    if engine != "auto":
        require(engine, device)
    names = ENGINES[device] if engine == "auto" else (engine,)
    judge, info = load_bundle(bundle)
    pixels, errors = decode_tiles(sample, info.tile_size, info.bands)
    pixels = pixels[torch.tensor([error is None for error in errors], dtype=torch.bool)]
    if not len(pixels):
        if engine not in ("auto", REFERENCE):
            raise TilefleetError(f"engine {engine}: no tile of the sample can be decoded to check it with")
        unchecked = {name: Trial(reason="there was no tile to check it with") for name in names if name != REFERENCE}
        return Choice(engine=REFERENCE, device=device, trials=unchecked | {REFERENCE: Trial()})

    def build(name: str) -> Engine:
        return Engine(name, copy.deepcopy(judge), info, device, batch_size, threads)

    expected, best = _measure(build(REFERENCE), pixels, REFERENCE_SECONDS)
    trials = {REFERENCE: Trial(tiles_per_second=best)}
    for name in names:
        if name == REFERENCE:
            continue
        if reason := missing(name, device):
            trials[name] = Trial(reason=reason)
            continue
        found, rate = _measure(build(name), pixels, SECONDS, best / 2 if engine == "auto" else 0)
        agreed = compare(info, expected, found)
        if not agreed.accepted and engine != "auto":
            raise TilefleetError(f"engine {name}: {agreed}, which is too many; choose auto or {REFERENCE}")
        trials[name] = Trial(tiles_per_second=rate, agreement=agreed, reason="" if agreed.accepted else str(agreed))
        best = max(best, rate) if agreed.accepted else best
    taken = engine
    if engine == "auto":
        taken = max((name for name in names if not trials[name].reason), key=lambda name: _rate(trials[name]))
    for name, trial in trials.items():
        if name != taken and not trial.reason:
            trial.reason = f"slower than {taken}" if engine == "auto" else "not asked for"
    return Choice(engine=taken, device=device, trials=trials)


def agreement(
    bundle: str,
    engine: str,
    tiles: Iterable[bytes],
    labels: Sequence[int] | None = None,
    device: str = "auto",
    threads: int | None = None,
) -> Agreement:
    """How ``engine`` compares with the reference on all of ``tiles``, and the accuracy of both where ``labels`` says
    the classes.

    Tiles that cannot be decoded are left out, of accuracy too. Raises what :func:`choose` and ``load_bundle`` raise.
    """
    device = find_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    judge, info = load_bundle(bundle)
    engines = [Engine(name, copy.deepcopy(judge), info, device, threads=threads) for name in (REFERENCE, engine)]
    answers: list[list[tuple[Tensor, Tensor]]] = [[], []]
    decoded: list[bool] = []
    left = iter(tiles)
    while batch := list(islice(left, BATCH_SIZE)):
        pixels, errors = decode_tiles(batch, info.tile_size, info.bands)
        whole = [error is None for error in errors]
        decoded += whole
        for answer, forward in zip(answers, engines, strict=True):
            logits, distances = forward(pixels)
            answer.append((logits[whole], distances[whole]))
    if not any(decoded):
        raise TilefleetError(f"engine {engine}: there is no tile that can be decoded to check it with")
    expected, found = (joined(answer) for answer in answers)
    known = None if labels is None else torch.as_tensor(labels)[decoded]
    return compare(info, expected, found, known)


def on_split(
    bundle: str, shards: str, split: str, progress: Callable[[str, int, int], None] | None = None
) -> dict[str, Agreement]:
    """What each engine of this machine costs in accuracy on the tiles of ``split``, the reference itself left out."""
    device, reader = find_device("auto"), TileReader(shards, split)
    labels = reader.labels.tolist()
    found: dict[str, Agreement] = {}
    for name in (name for name in ENGINES[device] if name != REFERENCE and not missing(name, device)):

        def tiles(name: str = name) -> Iterator[bytes]:
            for start in range(0, len(reader), BATCH_SIZE):
                stop = min(start + BATCH_SIZE, len(reader))
                yield from reader.read(range(start, stop))
                if progress:
                    progress(f"engines, {name}", stop, len(reader))

        found[name] = agreement(bundle, name, tiles(), labels, device)
    return found


def compare(
    info: BundleInfo, expected: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], labels: Tensor | None = None
) -> Agreement:
    """Compare an engine's logits ``[N, classes]`` and distances ``[N]`` with the reference's of the same tiles, or of
    more, where the engine had no time for all. ``labels`` is int64 ``[N]``.
    """
    tiles = min(len(found[0]), len(expected[0]))
    (logits, distances), (true_logits, true_distances) = (
        (pair[0][:tiles], pair[1][:tiles]) for pair in (found, expected)
    )
    probabilities, reference = torch.softmax(logits, 1), torch.softmax(true_logits, 1)
    top, true_top = logits.argmax(1), true_logits.argmax(1)
    other = top != true_top
    margin = reference.amax(1) - reference.gather(1, top[:, None])[:, 0]
    return Agreement(
        tiles=tiles,
        other_class=int(other.sum()),
        other_class_decided=int((other & (margin >= BORDERLINE)).sum()),
        other_unknown=int((is_unknown(info, distances) != is_unknown(info, true_distances)).sum()),
        largest_difference=float((probabilities - reference).nan_to_num(1).abs().max()),
        finite=bool(logits.isfinite().all() and distances.isfinite().all()),
        accuracy=None if labels is None else float((top == labels).double().mean()),
        reference_accuracy=None if labels is None else float((true_top == labels).double().mean()),
    )


def _measure(engine: Engine, pixels: Tensor, seconds: float, least: float = 0) -> tuple[tuple[Tensor, Tensor], float]:
    """The engine's answers for the first tiles of ``pixels``, as many as it has time for, and its best tiles/s.

    It takes up to ``seconds``; :data:`SECONDS` once all are judged, and less where tiles/s are below ``least``.
    """
    engine(pixels[: engine.rows])  # compiles, allocates
    answers, judged, rate, start, step = [], 0, 0.0, 0, engine.rows
    began = time.perf_counter()
    end = began + seconds
    while True:
        before = time.perf_counter()
        answer = engine(pixels[start : start + step])
        count = len(answer[0])
        now = time.perf_counter()
        rate = max(rate, count / (now - before))
        if judged < len(pixels):
            answers.append(answer)
            judged += count
        if now >= end or rate < least or (judged == len(pixels) and now >= began + SECONDS):
            return joined(answers), rate
        start = (start + count) % len(pixels)
        step = max(engine.rows, min(engine.batch_size, int(rate * (end - now))))


def joined(answers: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What an engine answered batch by batch, as one."""
    return torch.cat([logits for logits, _ in answers]), torch.cat([distances for _, distances in answers])


def _rate(trial: Trial) -> float:
    return trial.tiles_per_second or 0
