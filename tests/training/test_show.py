"""Which tiles a contact sheet shows, and what it draws for each kind of source."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from configs.errors import TilefleetError, UsageError
from configs.schema import Recipe
from training import show
from training.augment import augment
from training.loader import RankLoader
from training.pack import pack
from training.sampler import Sampler
from training.shards import TileReader
from training.show import augmented_sheet, choose, contact_sheet

GREEN, BLUE, ALARM = (40, 160, 60), (30, 60, 170), (179, 38, 30)


@given(st.lists(st.sampled_from("ABC"), max_size=60), st.integers(1, 70))
def test_tiles_are_chosen_once_and_in_equal_parts(groups: list[str], wanted: int) -> None:
    chosen = choose(groups, wanted)

    assert len(chosen) == len(set(chosen)) == min(wanted, len(groups))
    shown, held = Counter(groups[i] for i in chosen), Counter(groups)
    most = max(shown.values(), default=0)
    assert all(shown[group] >= min(held[group], most - 1) for group in held)
    assert [groups[i] for i in chosen] == sorted(groups[i] for i in chosen)


def test_the_choice_is_spread_over_the_whole_set() -> None:
    assert choose(["A"] * 100, 4) == [0, 25, 50, 75]


def test_a_folder_of_classes_is_drawn_with_damaged_tiles_marked(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "raw", per_class=3)
    (folder / "Lake" / "torn.jpg").write_bytes(image(BLUE)[:300])
    (folder / "Lake" / "notes.txt").write_text("not a tile")

    assert contact_sheet(str(folder), str(tmp_path / "grid.png")) == 7

    colours = frame_colours(tmp_path / "grid.png", 7)
    assert [nearest(colour) for colour in colours[:6]] == [GREEN] * 3 + [BLUE] * 3
    assert ALARM in {tuple(pixel) for pixel in np.asarray(Image.open(tmp_path / "grid.png")).reshape(-1, 3)}


def test_the_same_source_gives_the_same_picture(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "raw", per_class=9)

    for name in ("one.png", "two.png"):
        contact_sheet(str(folder), str(tmp_path / name), tiles=4)

    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_a_shard_set_is_drawn_whole_or_one_split_of_it(tmp_path: Path) -> None:
    shards = str(tmp_path / "shards")
    index = pack(str(class_folders(tmp_path / "raw", per_class=10, vary=True)), shards, split=(50, 50, 0))

    assert contact_sheet(shards, str(tmp_path / "all.png")) == 20
    assert contact_sheet(shards, str(tmp_path / "val.png"), split="val") == index.tiles("val")
    assert contact_sheet(shards, str(tmp_path / "few.png"), tiles=2) == 2
    assert [nearest(colour) for colour in frame_colours(tmp_path / "few.png", 2)] == [GREEN, BLUE]
    with pytest.raises(UsageError, match="no tiles in split 'test'; splits with tiles: train, val"):
        contact_sheet(shards, str(tmp_path / "test.png"), split="test")


def test_a_shard_that_is_gone_leaves_marked_frames(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    pack(str(class_folders(tmp_path / "raw", per_class=4, vary=True)), str(shards), split=(100, 0, 0))
    (shards / "train" / "shard-000000.tar").unlink()

    assert contact_sheet(str(shards), str(tmp_path / "grid.png")) == 8

    assert ALARM in {tuple(pixel) for pixel in np.asarray(Image.open(tmp_path / "grid.png")).reshape(-1, 3)}


def test_a_tar_and_a_single_image_are_drawn(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "tiles.tar", "w") as tar:
        for name in ("a.jpg", "b.PNG", "readme.txt", "../outside.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(image(GREEN))
            tar.addfile(member, io.BytesIO(image(GREEN)))
    (tmp_path / "a long name that does not fit below its tile.jpg").write_bytes(image(BLUE, (200, 50)))

    assert contact_sheet(str(tmp_path / "tiles.tar"), str(tmp_path / "tar.png")) == 2
    single = next(tmp_path.glob("a long*"))
    assert contact_sheet(str(single), str(tmp_path / "one.png")) == 1
    assert nearest(frame_colours(tmp_path / "one.png", 1)[0]) == BLUE


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("missing", UsageError, "no such file or folder"),
        ("empty", TilefleetError, "holds no images"),
        ("notes.txt", TilefleetError, "neither an image nor a tar"),
    ],
)
def test_what_cannot_be_shown_is_named(tmp_path: Path, name: str, error: type[TilefleetError], words: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("words " * 200)

    with pytest.raises(error, match=f"{name}: .*{words}"):
        contact_sheet(str(tmp_path / name), str(tmp_path / "grid.png"))


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    folder = str(class_folders(tmp_path / "raw", per_class=1))

    with pytest.raises(UsageError, match="tiles: at least 1"):
        contact_sheet(folder, str(tmp_path / "grid.png"), tiles=0)
    with pytest.raises(UsageError, match="--split needs a shard set"):
        contact_sheet(folder, str(tmp_path / "grid.png"), split="test")
    with pytest.raises(UsageError, match="is a folder"):
        contact_sheet(folder, str(tmp_path))


@pytest.mark.data
def test_real_tiles_are_drawn(tmp_path: Path, eurosat_zip: Path) -> None:
    with zipfile.ZipFile(eurosat_zip) as archive:
        names = [name for name in archive.namelist() if name.endswith("_11.jpg")]
        archive.extractall(tmp_path, names)

    assert contact_sheet(str(tmp_path / "EuroSAT_RGB"), str(tmp_path / "grid.png")) == len(names)


def test_a_recipe_is_drawn_as_rows_of_a_tile_and_its_variants(
    tmp_path: Path, shards: Path, small_recipe: dict[str, object]
) -> None:
    recipe = Recipe.model_validate(small_recipe)
    assert augmented_sheet(recipe, str(tmp_path / "sheet.png"), tiles=3, variants=4) == 3

    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (10 + 5 * (show.FRAME + 10), 10 + 3 * (show.FRAME + 26))
    frames = [frame(sheet, row=1, column=column) for column in range(5)]
    levels = [np.sort(np.asarray(picture).astype(int), axis=None) for picture in frames]
    assert all(abs(levels[0] - other).max() <= 2 for other in levels)  # the eight positions hold the same pixels
    assert len({picture.tobytes() for picture in frames}) > 1


def test_variants_are_what_the_model_is_shown_in_training(
    tmp_path: Path, shards: Path, small_recipe: dict[str, object]
) -> None:
    small_recipe |= {"augment": {"rotation": 90, "brightness": 0.5}}
    recipe = Recipe.model_validate(small_recipe)
    augmented_sheet(recipe, str(tmp_path / "sheet.png"), tiles=2, variants=2)
    sheet = Image.open(tmp_path / "sheet.png")

    reader = TileReader(str(shards), "train")
    first, second = choose([str(label) for label in reader.labels], 2)
    for epoch in range(2):
        order = Sampler(len(reader), recipe.batch_size, recipe.seed).epoch(epoch)
        shown = {}
        for batch in RankLoader(reader, 32).epoch(order):
            pixels = augment(batch.pixels, batch.keys, recipe.augment)
            shown |= dict(zip(batch.positions.tolist(), pixels, strict=True))
        for row, position in enumerate((first, second)):
            expected = Image.fromarray(shown[position].permute(1, 2, 0).numpy())
            expected = ImageOps.pad(expected, (show.FRAME, show.FRAME), Image.Resampling.BICUBIC)
            assert frame(sheet, row, epoch + 1).tobytes() == expected.tobytes()


def test_a_sheet_of_a_recipe_without_shards_is_refused(tmp_path: Path, small_recipe: dict[str, object]) -> None:
    recipe = Recipe.model_validate(small_recipe | {"shards": str(tmp_path / "none")})

    with pytest.raises(UsageError, match="none: no such shard set"):
        augmented_sheet(recipe, str(tmp_path / "sheet.png"))
    with pytest.raises(UsageError, match="variants: at least 1"):
        augmented_sheet(recipe, str(tmp_path / "sheet.png"), variants=0)


def frame(sheet: Image.Image, row: int, column: int) -> Image.Image:
    left, top = 10 + column * (show.FRAME + 10), 10 + row * (show.FRAME + 26)
    return sheet.crop((left, top, left + show.FRAME, top + show.FRAME))


def class_folders(root: Path, per_class: int, vary: bool = False) -> Path:
    for name, colour in (("Field", GREEN), ("Lake", BLUE)):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            shade = tuple(channel + number if vary else channel for channel in colour)
            (root / name / f"{number}.jpg").write_bytes(image(shade))
    return root


def image(colour: tuple[int, ...], size: tuple[int, int] = (64, 64)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "JPEG")
    return stream.getvalue()


def frame_colours(path: Path, tiles: int) -> list[tuple[int, ...]]:
    """The colour in the middle of each frame, in reading order."""
    sheet = Image.open(path)
    columns = round((sheet.width - 10) / (show.FRAME + 10))
    step = (show.FRAME + 10, show.FRAME + 26)
    middle = 10 + show.FRAME // 2
    places = [(middle + n % columns * step[0], middle + n // columns * step[1]) for n in range(tiles)]
    return [sheet.getpixel(place) for place in places]


def nearest(colour: tuple[int, ...]) -> tuple[int, ...]:
    return min((GREEN, BLUE), key=lambda other: sum(abs(a - b) for a, b in zip(colour, other, strict=True)))
