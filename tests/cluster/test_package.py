"""What leaves this machine with a job."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster import package
from configs.errors import UsageError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_code_is_shipped_and_nothing_else(tmp_path: Path) -> None:
    size = package.stage(tmp_path, {"recipe.yaml": "name: a"})
    names = contents(tmp_path)
    assert {"tilefleet.py", "training/loop.py", "inference/page.html", "configs/demo.yaml", "recipe.yaml"} <= set(names)
    assert {Path(name).suffix for name in names} == {".py", ".yaml", ".html"}
    assert {name.partition("/")[0] for name in names} == {
        *("cluster", "configs", "inference", "training"),
        *("tilefleet.py", "recipe.yaml"),
    }
    assert size == sum(map(len, names.values())) < package.LIMIT / 4


def test_the_same_files_make_the_same_package(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        package.stage(tmp_path / name, {"recipe.yaml": "name: a"})
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_package_runs_by_itself(tmp_path: Path) -> None:
    package.stage(tmp_path, {})
    program = "import tilefleet, cluster.storage; print(tilefleet.__file__, cluster.storage.__file__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "tilefleet.py"), str(tmp_path / "cluster" / "storage.py")]


def test_a_package_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "LIMIT", 100_000)
    with pytest.raises(UsageError, match=r"big\.yaml: makes the package"):
        package.stage(tmp_path, {"big.yaml": "x" * 90_000})
