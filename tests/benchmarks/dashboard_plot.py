"""The Grafana dashboard drawn without Grafana: one picture of what each panel would show, from a real Prometheus.

    python -m tests.benchmarks.dashboard_plot http://127.0.0.1:9090 dashboard.png [MINUTES] [RUN]

MINUTES (60) are those before now; RUN is a regular expression of runs, all of them unless given. Grafana's own way with
colours and fonts is not imitated; what is asked, its units, names, limits and places are those of ``dashboard.json``.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.dates import DateFormatter
from matplotlib.ticker import FuncFormatter

from tests.dashboard import Prometheus, Query, Series, load, queries

POINTS = 240
"""Moments at which a graph asks."""

COLUMNS = 24
WIDTH, HEIGHT = 0.85, 0.42
"""Inches of a cell of Grafana's grid."""

NO_DATA = "no data"


def draw(prometheus: Prometheus, picture: str, begin: float, end: float, run: str = ".*") -> None:
    """Draw all panels between two moments (Unix seconds) into the file ``picture``."""
    everything = load()["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in everything)
    figure = plt.figure(figsize=(COLUMNS * WIDTH, rows * HEIGHT), dpi=75)
    for panel in everything:
        box = panel["gridPos"]
        left, top = box["x"] / COLUMNS, 1 - box["y"] / rows
        width, height = box["w"] / COLUMNS, box["h"] / rows
        if panel["type"] == "row":
            figure.text(left + 0.005, top - height * 0.75, panel["title"], fontsize=15, weight="bold")
            continue
        inside = (left + 0.034, top - height + 1.9 / rows * HEIGHT * 2, width - 0.042, height - 2.9 / rows * HEIGHT * 2)
        axes = figure.add_axes(inside)
        axes.set_title(panel["title"], fontsize=11, loc="left")
        DRAW[panel["type"]](axes, panel, prometheus, begin, end, run)
    figure.savefig(picture)
    plt.close(figure)


def _graph(axes: Axes, panel: dict[str, Any], prometheus: Prometheus, begin: float, end: float, run: str) -> None:
    defaults, custom = panel["fieldConfig"]["defaults"], panel["fieldConfig"]["defaults"]["custom"]
    lines = [
        (_legend(query, one), one)
        for query in queries(panel, run)
        for one in prometheus.between(query.expr, begin, end, (end - begin) / POINTS)
    ]
    if custom.get("stacking", {}).get("mode") == "normal" and lines:
        moments = np.unique(np.concatenate([one.moments for _, one in lines]))
        values = [np.interp(moments, one.moments, np.nan_to_num(one.values), left=0, right=0) for _, one in lines]
        axes.stackplot([_clock(moment) for moment in moments], values, labels=[name for name, _ in lines], alpha=0.8)
    else:
        for name, one in lines:
            dashed = any(re.search(pattern.strip("/"), name) for pattern in _dashed(panel))
            style = {"linestyle": "--", "color": "grey", "linewidth": 1} if dashed else {"linewidth": 2}
            axes.plot([_clock(moment) for moment in one.moments], one.values, label=name, **style)
    for step in defaults["thresholds"]["steps"] if custom["thresholdsStyle"]["mode"] == "line" else []:
        if step["value"] is not None:
            axes.axhline(step["value"], color=step["color"], linewidth=0.8)
    axes.set_ylim(defaults.get("min"), defaults.get("max"))
    axes.set_xlim(_clock(begin), _clock(end))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, defaults["unit"])))
    axes.xaxis.set_major_formatter(DateFormatter("%H:%M"))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(fontsize=7, loc="upper left", framealpha=0.6)
    else:
        axes.text(0.5, 0.5, NO_DATA, transform=axes.transAxes, ha="center")


def _stat(axes: Axes, panel: dict[str, Any], prometheus: Prometheus, begin: float, end: float, run: str) -> None:
    axes.axis("off")
    found = _last(panel, prometheus, end, run)
    unit = panel["fieldConfig"]["defaults"]["unit"]
    for number, (name, value) in enumerate(found):
        place = ((number + 0.5) / len(found), 0.55)
        mapping = _override(panel, name, "mappings")
        text = mapping[0]["options"].get(f"{value:g}", {}).get("text") if mapping else None
        axes.text(*place, text or shown(value, unit), transform=axes.transAxes, fontsize=20, ha="center")
        axes.text(place[0], 0.2, name, transform=axes.transAxes, fontsize=9, ha="center")
    if not found:
        axes.text(0.5, 0.5, panel["fieldConfig"]["defaults"].get("noValue", NO_DATA), ha="center")


def _bars(axes: Axes, panel: dict[str, Any], prometheus: Prometheus, begin: float, end: float, run: str) -> None:
    found = _last(panel, prometheus, end, run)
    if queries(panel)[0].histogram:
        found.sort(key=lambda one: float(one[0]))
        counts = np.diff([0.0, *(value for _, value in found)]).tolist()
        found = [(name, count) for (name, _), count in zip(found, counts, strict=True)]
    names, values = [name for name, _ in found], [value for _, value in found]
    axes.barh(names, values)
    for number, value in enumerate(values):
        axes.text(value, number, f" {shown(value, panel['fieldConfig']['defaults']['unit'])}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.xaxis.set_visible(False)
    axes.tick_params(labelsize=8)


def _table(axes: Axes, panel: dict[str, Any], prometheus: Prometheus, begin: float, end: float, run: str) -> None:
    """Rows merged by their labels, columns named and ordered, as the panel's transformations do it."""
    organize = next(one["options"] for one in panel["transformations"] if one["id"] == "organize")
    merged: dict[tuple[str, str], dict[str, str]] = {}
    several = len(panel["targets"]) > 1
    for query in queries(panel, run):
        column = f"Value #{query.name[-1]}" if several else "Value"
        title = organize["renameByName"].get(column, column)
        unit = _override(panel, title, "unit") or "short"
        for one in prometheus.at(query.expr, end):
            key = (one.labels.get("run", ""), one.labels.get("kind", one.labels.get("alertname", "")))
            merged.setdefault(key, {}).update(one.labels | {column: shown(one.values[0], unit)})
    columns = sorted(organize["indexByName"], key=organize["indexByName"].get)
    titles = [organize["renameByName"].get(column, column) for column in columns]
    axes.axis("off")
    if not merged:
        axes.text(0.5, 0.5, panel["fieldConfig"]["defaults"].get("noValue", NO_DATA), ha="center")
        return
    cells = [[row.get(column, "") for column in columns] for row in merged.values()]
    table = axes.table(cells, colLabels=titles, loc="upper left", cellLoc="left", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.auto_set_column_width(range(len(columns)))


DRAW = {"timeseries": _graph, "stat": _stat, "bargauge": _bars, "table": _table}


def _last(panel: dict[str, Any], prometheus: Prometheus, end: float, run: str) -> list[tuple[str, float]]:
    return [
        (_legend(query, one), one.values[0]) for query in queries(panel, run) for one in prometheus.at(query.expr, end)
    ]


def _legend(query: Query, series: Series) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: series.labels.get(match[1], ""), query.legend)


def _dashed(panel: dict[str, Any]) -> Sequence[str]:
    overrides = panel["fieldConfig"]["overrides"]
    return [one["matcher"]["options"] for one in overrides if one["matcher"]["id"] == "byRegexp"]


def _override(panel: dict[str, Any], name: str, what: str) -> Any:
    """What the panel has of its own for the field ``name``, or None."""
    for one in panel["fieldConfig"]["overrides"]:
        if one["matcher"]["options"] == name:
            return next((own["value"] for own in one["properties"] if own["id"] == what), None)
    return None


def _clock(moment: float) -> datetime:
    return datetime.fromtimestamp(moment)


def shown(value: float, unit: str) -> str:
    """``value`` in one of Grafana's units, roughly as Grafana writes it."""
    if unit == "percentunit":
        return f"{value:.3g}".rstrip() if value != value else f"{value * 100:.3g} %"
    if unit == "s":
        for size, name in ((86400, "days"), (3600, "hours"), (60, "mins"), (1, "s"), (1e-3, "ms")):
            if value >= size:
                return f"{value / size:.3g} {name}"
        return f"{value / 1e-6:.3g} µs" if value else "0 s"
    if unit == "bytes":
        for size, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
            if value >= size:
                return f"{value / size:.3g} {name}"
    if unit == "dateTimeFromNow":
        return f"{shown(time.time() - value / 1000, 's')} ago"
    if unit == "short":
        for size, name in ((1e9, "Bil"), (1e6, "Mil"), (1e3, "K")):
            if value >= size:
                return f"{value / size:.3g} {name}"
    return f"{value:.3g}"


def main(address: str, picture: str, minutes: str = "60", run: str = ".*") -> None:
    """Draw the last ``minutes``."""
    end = time.time()
    draw(Prometheus(address), picture, end - 60 * float(minutes), end, run)


if __name__ == "__main__":
    main(*sys.argv[1:])
