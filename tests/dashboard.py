"""The Grafana dashboard as tests read it: its panels and queries, and what a real Prometheus answers to them."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MONITORING = Path(__file__).parent.parent / "cluster" / "monitoring"

METRIC = re.compile(r"(?<![\w:])(?:run:|node:)?(?:tilefleet|ray)_\w+(?::\w+)?")
"""Names of metrics in a query, recorded ones too."""


class Query(NamedTuple):
    """One query of a panel; ``name`` is the panel's title and the query's letter."""

    name: str
    expr: str
    legend: str
    instant: bool
    histogram: bool
    """The answer is a histogram's buckets, each with what is in those before."""


def load() -> dict[str, Any]:
    """``dashboard.json``."""
    return json.loads((MONITORING / "dashboard.json").read_text())  # type: ignore[no-any-return]


def panels() -> list[dict[str, Any]]:
    """Its panels, without rows."""
    return [panel for panel in load()["panels"] if panel["type"] != "row"]


def queries(panel: dict[str, Any], run: str = ".*") -> list[Query]:
    """What a panel asks, with ``$run`` replaced by the regular expression ``run``."""
    return [
        Query(
            f"{panel['title']} {target['refId']}",
            target["expr"].replace("$run", run),
            target.get("legendFormat", ""),
            target["instant"],
            target.get("format") == "heatmap",
        )
        for target in panel["targets"]
    ]


class Series(NamedTuple):
    """Some values of one combination of labels, and their moments in Unix seconds."""

    labels: dict[str, str]
    moments: Sequence[float]
    values: Sequence[float]


class Prometheus:
    """A Prometheus at ``address``; a query that it refuses raises :class:`ValueError` with its reason."""

    def __init__(self, address: str) -> None:
        self.address = address

    def at(self, expr: str, moment: float) -> list[Series]:
        """What ``expr`` was at ``moment``."""
        answer = self.get("query", query=expr, time=moment)
        if answer["resultType"] == "scalar":
            return [Series({}, [answer["result"][0]], [float(answer["result"][1])])]
        return [Series(one["metric"], [one["value"][0]], [float(one["value"][1])]) for one in answer["result"]]

    def between(self, expr: str, begin: float, end: float, step: float) -> list[Series]:
        """What ``expr`` was every ``step`` seconds from ``begin`` to ``end``."""
        answer = self.get("query_range", query=expr, start=begin, end=end, step=step)
        return [
            Series(one["metric"], [t for t, _ in one["values"]], [float(value) for _, value in one["values"]])
            for one in answer["result"]
        ]

    def get(self, what: str, **arguments: object) -> Any:
        """The data of an answer of its HTTP API."""
        url = f"{self.address}/api/v1/{what}?{urllib.parse.urlencode(arguments)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"{arguments}: {json.load(error)['error']}") from error


def overlaps(boxes: Sequence[dict[str, int]]) -> Iterator[tuple[int, int]]:
    """Pairs of Grafana's grid positions that share a cell, by their place in ``boxes``."""
    for one, a in enumerate(boxes):
        for two, b in enumerate(boxes[:one]):
            beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
            below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
            if not beside and not below:
                yield one, two
