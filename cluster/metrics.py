"""The metrics of one run: a status comes in, samples go out, each a name, the values of its labels and a number.

Labels are bounded: they name kinds, states, stages and classes, of which only so many have their own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import NamedTuple

from cluster.records import CONFIDENCE_BOUNDS, Status

MOST_CLASSES, MOST_STAGES = 100, 20
"""Labels of one run; what is beyond them is ``other``."""

LONGEST_LABEL = 80

RUN, KIND = ("run",), ("run", "kind")


class Metric(NamedTuple):
    """The names of a metric's labels, and what it says to a person on duty; what ends in ``_total`` only grows."""

    labels: tuple[str, ...]
    help: str


METRICS = {
    "run_state": Metric((*KIND, "state"), "1 for the state of a run; one whose driver died without a word is running."),
    "run_started_timestamp_seconds": Metric(KIND, "When a run was last started or resumed."),
    "run_updated_timestamp_seconds": Metric(KIND, "When a run last wrote its status; a dead driver writes none."),
    "run_progress_timestamp_seconds": Metric(KIND, "When a run last got further, or was started or resumed."),
    "tiles_planned": Metric(KIND, "Tiles of the whole run; those of compressed tars count as they are read."),
    "tiles_done_total": Metric(KIND, "Tiles that a run trained on, or classified, failed ones among them."),
    "tiles_failed_total": Metric((*KIND, "stage"), "Tiles that became an error, by the stage in which they did."),
    "error_ratio_limit": Metric(RUN, "Share of its tiles that may fail before a run is stopped (max_error_share)."),
    "stage_seconds_total": Metric(
        (*KIND, "stage"), "Time spent in a stage: of classify over all workers, of train of the first worker."
    ),
    "workers": Metric(KIND, "Workers of a running run; of classify, as many as the cluster has room for."),
    "workers_wanted": Metric(KIND, "Workers that a running run was to have."),
    "predictions_total": Metric((*RUN, "class"), "Tiles by class; unknown ones count for the nearest class."),
    "predictions_unknown_total": Metric(RUN, "Tiles that are far from all that the model was trained on."),
    "expected_unknown_ratio": Metric(RUN, "Share of unknown tiles that the model had in validation."),
    "expected_confidence": Metric(RUN, "Mean confidence that the model had in validation, 0 to 1."),
    "training_loss": Metric(RUN, "Training loss of the last logged step; not finite where training broke down."),
    "training_accuracy": Metric(RUN, "Accuracy on the validation split after the last whole epoch, 0 to 1."),
    "training_epoch": Metric(RUN, "Epoch that a training is in, from 1."),
    "training_epochs": Metric(RUN, "Epochs of the recipe; early stopping may end a run before."),
    "training_step": Metric(RUN, "Steps since training began; a restart goes back to its checkpoint."),
}
"""By the name that follows ``tilefleet_``; the first label is always the run."""

CONFIDENCE = Metric(RUN, "How sure the model is of the class of a tile, 0 to 1.")
"""The histogram ``prediction_confidence``."""

Sample = tuple[str, tuple[str, ...], float]
"""A name of :data:`METRICS`, the values of its labels after the run, the value."""


def samples(status: Status, shown: list[str], *, everything: bool = True) -> Iterator[Sample]:
    """The samples of a run, or, unless ``everything`` is asked for, only those that tell that there is such a run.

    ``shown`` holds, from call to call, those classes of the run that have a label of their own, where there are too
    many; so what is ``other`` only grows.
    """
    kind = (status.kind,)
    yield "run_state", (*kind, status.state), 1
    yield "run_started_timestamp_seconds", kind, status.started
    yield "run_updated_timestamp_seconds", kind, status.updated
    if not everything:
        return
    yield "run_progress_timestamp_seconds", kind, status.progressed or status.updated
    yield "tiles_planned", kind, status.planned_tiles
    yield "tiles_done_total", kind, status.done_tiles
    for stage, tiles in _labelled(status.failed_by_stage, MOST_STAGES, []).items():
        yield "tiles_failed_total", (*kind, stage), tiles
    for stage, seconds in _labelled(status.seconds_by_stage, MOST_STAGES, []).items():
        yield "stage_seconds_total", (*kind, stage), seconds
    if status.state == "running":
        yield "workers", kind, status.workers
        yield "workers_wanted", kind, status.wanted_workers
    if status.kind == "classify":
        for name, tiles in _labelled(status.tiles_by_class, MOST_CLASSES, shown).items():
            yield "predictions_total", (name,), tiles
        yield "predictions_unknown_total", (), status.unknown_tiles
    known = {
        "error_ratio_limit": status.error_limit,
        "expected_unknown_ratio": status.expected_unknown,
        "expected_confidence": status.expected_confidence,
        "training_loss": status.loss,
        "training_accuracy": status.accuracy,
        "training_epoch": status.epoch,
        "training_epochs": status.epochs,
        "training_step": status.step,
    }
    yield from ((name, (), value) for name, value in known.items() if value is not None)


def confidence_buckets(status: Status) -> list[tuple[str, float]]:
    """Tiles up to each confidence, as a histogram has them."""
    sums = list(accumulate(status.tiles_by_confidence.get(name, 0) for name in CONFIDENCE_BOUNDS))
    bounds = zip(CONFIDENCE_BOUNDS.values(), sums, strict=True)
    return [*((str(bound), tiles) for bound, tiles in bounds), ("+Inf", sums[-1])]


def label(text: str) -> str:
    """``text`` as the value of a label: of bounded length, without what a screen or a query would stumble over."""
    return re.sub(r"[^\w .,:()&+=@-]", "_", text)[:LONGEST_LABEL]


def _labelled(counts: Mapping[str, float], most: int, shown: list[str]) -> dict[str, float]:
    """``counts`` by label, of which the largest ``most`` have their own; once ``shown``, a label stays."""
    if len(counts) > most:
        largest = sorted(filter(counts.get, counts), key=lambda name: -counts[name])
        shown[:] = list(dict.fromkeys([*shown, *largest]))[:most]
        chosen = set(shown)
    else:
        chosen = set(counts)
    total: Counter[str] = Counter({"other": 0} if len(counts) > most else {})
    for name, count in counts.items():
        total[label(name) if name in chosen else "other"] += count  # type: ignore[assignment]
    return dict(total)
