"""Fixtures that every test may use."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REAL_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray for all tests that need it; starting it takes many seconds."""
    from cluster.session import session

    with session(cpus=4):
        yield


@pytest.fixture(scope="session")
def eurosat_zip() -> Path:
    """The real EuroSAT tiles, where they stand beside the project."""
    path = REAL_DATA / "EuroSAT_RGB.zip"
    if not path.exists():
        pytest.skip(f"real data set not found: {path}")
    return path


@pytest.fixture(scope="session")
def python() -> str:
    """The interpreter for tests that need a process of their own."""
    return sys.executable
