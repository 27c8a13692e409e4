"""The shape of the code that CONTRIBUTING.md promises."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ["configs", "cluster", "training", "inference", "tilefleet"]
FROM_TRAINING = {"shards", "augment", "models", "bundle", "decode", "encoded", "process", "randomness", "tars"}
WITH_RAY = {
    *("cluster/session.py", "cluster/jobs.py", "cluster/launch/spot.py"),
    *("training/train.py", "inference/classify.py", "inference/pool.py"),
}
SOURCES = sorted(p for layer in LAYERS for p in [*(ROOT / layer).rglob("*.py"), ROOT / f"{layer}.py"] if p.exists())


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_point_one_way(path: Path) -> None:
    own = LAYERS.index(path.relative_to(ROOT).parts[0].removesuffix(".py"))
    for module in imported(path):
        top = module.partition(".")[0]
        if top in LAYERS:
            assert LAYERS.index(top) <= own, f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", [p for p in SOURCES if "inference" in p.parts], ids=name)
def test_inference_takes_only_the_bundle_and_its_readers_from_training(path: Path) -> None:
    parts = {module.split(".")[1] for module in imported(path) if module.startswith("training.")}
    assert parts <= FROM_TRAINING


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_ray_is_imported_in_these_places_only(path: Path) -> None:
    if any(module.partition(".")[0] == "ray" for module in imported(path)):
        assert name(path) in WITH_RAY


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= (400 if path.name == "tilefleet.py" else 300)


def test_nothing_is_unpickled() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert not imported(path) & {"pickle", "cloudpickle", "dill", "joblib"}, name(path)
        assert "torch.load(" not in text or "weights_only=True" in text, name(path)
