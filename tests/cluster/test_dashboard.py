from __future__ import annotations

import enum
import importlib.util
import json
import re
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import need
from tests.dashboard import METRIC, MONITORING, load, overlaps, panels

PANELS = pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
RULES = [rule for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def grafana() -> Any:
    """Grafana's own types."""
    need(importlib.util.find_spec("grafana_foundation_sdk"), "grafana-foundation-sdk is not installed")
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    return Dashboard.from_json(load())


def test_grafana_knows_every_key_of_it(grafana: Any) -> None:
    assert list(lost(load(), encoded(grafana), "dashboard")) == []


def test_every_value_is_of_the_type_that_grafana_has_for_it(grafana: Any) -> None:
    assert list(mistyped(grafana, "dashboard")) == []


def lost(before: Any, after: Any, place: str) -> typing.Iterator[str]:
    """Where ``before`` holds something that ``after`` has not."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            if key in after:
                yield from lost(value, after[key], f"{place}.{key}")
            else:
                yield f"{place}.{key}"
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (one, two) in enumerate(zip(before, after, strict=True)):
            yield from lost(one, two, f"{place}[{number}]")
    elif before != after:
        yield f"{place}: {before!r} became {after!r}"


def mistyped(node: Any, place: str) -> typing.Iterator[str]:
    """Where an object of Grafana's types, or one below it, holds something else than its annotations say."""
    if isinstance(node, list):
        for number, one in enumerate(node):
            yield from mistyped(one, f"{place}[{number}]")
    elif type(node).__module__.startswith("grafana_foundation_sdk") and not isinstance(node, enum.Enum):
        for name, wanted in typing.get_type_hints(type(node)).items():
            value = getattr(node, name)
            if not fits(value, wanted):
                yield f"{place}.{name}: {value!r} is not {wanted}"
            yield from mistyped(value, f"{place}.{name}")


def fits(value: Any, wanted: Any) -> bool:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted in (typing.Any, object):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(fits(one, arguments[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(one, arguments[1]) for one in value.values())
    if isinstance(wanted, type) and issubclass(wanted, enum.Enum):
        return value in {member.value for member in wanted}
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(value, dict) and hasattr(wanted, "from_json"):  # Grafana's reader leaves some as they are
        decoded = wanted.from_json(value)
        return not [*mistyped(decoded, ""), *lost(value, encoded(decoded), "")]
    return isinstance(value, wanted)


def encoded(node: Any) -> Any:
    from grafana_foundation_sdk.cog.encoder import JSONEncoder

    return json.loads(JSONEncoder().encode(node))


def test_the_check_of_types_sees_a_wrong_one(grafana: Any) -> None:
    from grafana_foundation_sdk.models.dashboard import Dashboard

    wrong = load()
    wrong["panels"][1]["gridPos"]["w"] = "wide"
    wrong["panels"][1]["fieldConfig"]["defaults"]["thresholds"]["mode"] = "relative"
    assert len(list(mistyped(Dashboard.from_json(wrong), "dashboard"))) == 2


def test_every_unit_is_one_of_grafana(grafana: Any) -> None:
    from grafana_foundation_sdk.models import units

    known = {value for name, value in vars(units).items() if name[0] != "_" and isinstance(value, str)}
    fields = [panel["fieldConfig"] for panel in panels()]
    changed = [one for field in fields for override in field["overrides"] for one in override["properties"]]
    used = {field["defaults"].get("unit", "none") for field in fields}
    used |= {one["value"] for one in changed if one["id"] == "unit"}
    assert len(used) > 4
    assert used <= known


def test_panels_have_ids_of_their_own_and_lie_side_by_side() -> None:
    every = load()["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    boxes = [panel["gridPos"] for panel in every]
    assert list(overlaps(boxes)) == []
    assert all(box["x"] + box["w"] <= 24 for box in boxes)
    assert boxes == sorted(boxes, key=lambda box: (box["y"], box["x"]))


@PANELS
def test_a_panel_says_what_it_shows_and_asks_by_letters(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert len(panel["description"]) > 20
    assert panel["fieldConfig"]["defaults"].get("unit") or panel["type"] == "table"
    assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"][0]["value"] is None
    letters = [target["refId"] for target in panel["targets"]]
    assert letters == [chr(ord("A") + number) for number in range(len(letters))]
    sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
    assert all(source == {"type": "prometheus", "uid": "${DS_PROMETHEUS}"} for source in sources)


def test_only_variables_that_are_there_are_used() -> None:
    there = {variable["name"] for variable in load()["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(load()))) - {"__all"} == there


def test_what_is_recorded_is_shown() -> None:
    """A figure that alerts watch is on the dashboard, so that whoever is woken by it sees it."""
    shown = {name for panel in panels() for target in panel["targets"] for name in METRIC.findall(target["expr"])}
    assert {rule["record"] for rule in RULES if "record" in rule} <= shown


def test_only_alerts_that_are_there_are_named() -> None:
    named = set(re.findall(r"Tilefleet\w+", json.dumps([panel["description"] for panel in panels()])))
    assert named <= {rule.get("alert") for rule in RULES}


def test_the_dashboards_of_ray_that_it_links_to_are_there() -> None:
    spec = importlib.util.find_spec("ray")
    assert spec
    assert spec.origin
    theirs = Path(spec.origin).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    written = "".join(file.read_text() for file in theirs.glob("*.json"))
    linked = [link["url"] for link in load()["links"] if link["url"].startswith("/d/")]
    assert linked
    for url in linked:
        assert f'"{url.removeprefix("/d/")}"' in written


def test_what_provisions_grafana_fits_the_dashboard() -> None:
    folder = MONITORING / "provisioning"
    sources = yaml.safe_load((folder / "datasources" / "tilefleet.yml").read_text())
    assert [(source["type"], source["access"]) for source in sources["datasources"]] == [("prometheus", "proxy")]
    providers = yaml.safe_load((folder / "dashboards" / "tilefleet.yml").read_text())["providers"]
    assert [provider["type"] for provider in providers] == ["file", "file"]
    assert len({provider["name"] for provider in providers}) == len(providers)
