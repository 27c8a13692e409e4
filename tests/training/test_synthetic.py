"""Synthetic tiles are always the same, differ from one another, and can be told apart by class."""

from __future__ import annotations

import hashlib
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.errors import UsageError
from training.sources import open_source
from training.synthetic import CLASSES, tile, write_tiles


def test_classes_are_sorted_so_that_labels_stay_when_packed() -> None:
    assert list(CLASSES) == sorted(CLASSES)
    assert len(CLASSES) >= 6


@pytest.mark.parametrize("size", [8, 32, 64, 100])
@pytest.mark.parametrize("label", range(len(CLASSES)), ids=CLASSES)
def test_a_tile_has_the_size_that_was_asked_for(label: int, size: int) -> None:
    image = tile(label, 0, size)
    assert (image.shape, image.dtype) == ((size, size, 3), np.uint8)
    assert image.std() > 1


def test_a_tile_is_the_same_on_every_machine() -> None:
    digest = hashlib.sha256()
    for label in range(len(CLASSES)):
        for number in range(4):
            digest.update(tile(label, number).tobytes())
    assert digest.hexdigest() == "9f5ddf61bb05e7e5e4d34d87be34e2099132a0b91248dbdbaeef0f3be3b04b0e"


def test_every_number_class_and_seed_is_another_image() -> None:
    images = [
        tile(label, number, seed=seed) for label in range(len(CLASSES)) for number in range(20) for seed in (0, 1)
    ]
    assert len({image.tobytes() for image in images}) == len(images)


def test_colours_alone_tell_many_tiles_apart_but_not_all() -> None:
    """A nearest-mean rule on colour must do far better than chance, and leave work for a network."""
    means = np.array([[tile(label, n).mean((0, 1)) for n in range(60)] for label in range(len(CLASSES))])
    centres = means[:, :30].mean(1)
    distances = ((means[:, 30:, None] - centres) ** 2).sum(-1)
    right = (distances.argmin(-1) == np.arange(len(CLASSES))[:, None]).mean()
    assert 0.3 < right < 0.9


def test_written_tiles_are_class_folders_of_jpeg_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    write_tiles(str(tmp_path / "a"), 3, size=32, workers=1, progress=lambda *told: seen.append(told))
    write_tiles(str(tmp_path / "b"), 3, size=32, workers=4)
    for path in sorted((tmp_path / "a").rglob("*.jpg")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
        with Image.open(path) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (32, 32), "RGB")
    with closing(open_source(tmp_path / "a")) as source:
        assert source.classes == list(CLASSES)
        assert len(source.tiles) == 3 * len(CLASSES)
    assert seen[-1] == ("draw", 3 * len(CLASSES), 3 * len(CLASSES))


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.txt").write_text("keep")
    with pytest.raises(UsageError, match="holds something already"):
        write_tiles(str(tmp_path), 1)
