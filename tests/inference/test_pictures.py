"""Pictures of classified tiles: of any archive, of the right row, and within limits."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inference import pictures
from inference.readers import read_chunk
from inference.report import report
from inference.tally import Example
from tests.archives import write_tar
from tests.page import Page
from tests.predictions import make_archive, plan_of, png, predictions, write_part


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.zst", "folder", "list", "images"])
def test_pictures_come_from_any_kind_of_archive(tmp_path: Path, kind: str) -> None:
    files = {f"d/{number % 4}.{ending}": png(number) for number, ending in enumerate(["png", "PNG", "jpg", "bmp"] * 2)}
    out, archives = str(tmp_path / "out"), make_archive(tmp_path / "in", kind, files)
    for chunk in plan_of(out, [archives], 3):
        ids = [tile.tile_id for tile in read_chunk(chunk)]
        write_part(out, chunk, ids, [(row % 3, 0.5, False) for row in range(len(ids))])

    page = Page(report(out))

    page.assert_self_contained()
    assert len(page.alts) == 3 * len(files)  # of all, and the most and the least confident of each class
    assert "are left out" not in page.text


def test_a_picture_is_that_of_its_row_where_ids_are_the_same(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"same.{ending}", png(n)) for n, ending in enumerate(["png", "jpg", "png"])])
    plan = plan_of(str(tmp_path / "out"), [str(tmp_path / "a.tar")])
    tiles = [Example(0.5, "same", "Field", chunk=0, row=row) for row in (2, 1)]

    found, missing = pictures.from_archives([tiles], plan)

    assert missing == []
    for tile in tiles:
        shown = Image.open(io.BytesIO(base64.b64decode(found[tile].partition(",")[2])))
        far = [difference(shown, Image.open(io.BytesIO(png(number)))) for number in range(3)]
        assert far.index(min(far)) == tile.row


def test_pictures_that_take_too_long_are_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = predictions(tmp_path, finished=True)
    monkeypatch.setattr(pictures, "READ_SECONDS", 0.0)

    page = Page(report(out))

    assert page.alts == []
    assert "pictures are left out" in page.text
    assert "a/tile-0 (0.0%)" in page.text


def test_a_large_compressed_tar_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = make_archive(tmp_path / "in", "tar.gz", {"a.png": png(1)})
    plan = plan_of(str(tmp_path / "out"), [archive])
    monkeypatch.setattr(pictures, "STREAM_BYTES", 10)

    assert pictures.from_archives([[Example(0.5, "a", "Field")]], plan) == (
        {},
        [f"{archive}: too large a compressed tar to be read again for pictures of its tiles"],
    )


def test_a_file_that_is_gone_from_a_folder_is_named(tmp_path: Path) -> None:
    folder = make_archive(tmp_path / "in", "folder", {"a.png": png(1), "b.png": png(2)})
    plan = plan_of(str(tmp_path / "out"), [folder])
    Path(folder, "a.png").unlink()
    tiles = [Example(0.5, name, "Field", row=row) for row, name in enumerate("ab")]

    found, missing = pictures.from_archives([tiles[1:], tiles[:1]], plan)

    assert list(found) == [tiles[1]]
    assert missing == [f"{folder}: a is gone or changed since it was classified"]


def difference(one: Image.Image, other: Image.Image) -> float:
    """How far apart the pixels of two images are, on average."""
    return float(np.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32)).mean())
