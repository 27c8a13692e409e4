"""What all pages are made of: a template beside this module, its filters, and files as data that a page can hold."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cluster import storage


def render(template: str, **values: Any) -> str:
    """A page from a template beside this module, with everything in ``values`` escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(count=_count, percent=_percent, duration=_duration, moment=_moment)
    return environment.get_template(template).render(**values)


def read_png(location: str) -> str | None:
    """A PNG as a data URI; None where there is none."""
    return png_uri(storage.read_bytes(location)) if storage.exists(location) else None


def png_uri(data: bytes) -> str:
    """The bytes of a PNG as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def read_json(location: str) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file."""
    return json.loads(storage.read_bytes(location)) if storage.exists(location) else None


def _count(number: float) -> str:
    return f"{number:,.0f}"


def _percent(share: float, digits: int = 1) -> str:
    return f"{share:.{digits}%}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _moment(unix_seconds: float) -> str:
    return datetime.fromtimestamp(unix_seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
