"""Packing loses nothing silently, is the same to the byte on every run, and leaves nothing half done."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from configs.errors import TilefleetError, UsageError
from training.decode import decode_image
from training.pack import pack
from training.shards import MARKER, SPLITS, TileReader, load_index, load_tiles, verify

ROOT = Path(__file__).parents[2]


def picture(number: int, side: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8))


def save(path: Path, image: Image.Image, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    """60 tiles of two classes, as JPEG and PNG."""
    for number in range(60):
        name = ("Crop", "Water")[number % 2]
        save(tmp_path / "tiles" / name / f"{name}_{number}.{'png' if number % 5 == 0 else 'jpg'}", picture(number))
    return tmp_path / "tiles"


def digests(root: Path) -> dict[str, str]:
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_packed_set_holds_every_tile_with_its_bytes_label_and_id(tiles: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    index = pack(str(tiles), str(out), tiles_per_shard=7)
    assert load_index(out) == index
    assert verify(out) == []
    assert index.classes == ["Crop", "Water"]
    assert {split: index.tiles(split) for split in SPLITS} == {"train": 48, "val": 6, "test": 6}
    found = {}
    for split in SPLITS:
        reader = TileReader(out, split)
        images = reader.read(range(len(reader)))
        for tile_id, label, data in zip(reader.tile_ids, reader.labels, images, strict=True):
            assert tile_id.startswith(index.classes[label])
            found[tile_id] = data
    expected = {p.relative_to(tiles).with_suffix("").as_posix(): p.read_bytes() for p in tiles.rglob("*.*")}
    assert found == expected


def test_the_table_has_one_row_group_a_shard_in_the_order_of_the_index(tiles: Path, tmp_path: Path) -> None:
    index = pack(str(tiles), str(tmp_path / "out"), tiles_per_shard=7)
    shards = [shard for split in SPLITS for shard in index.splits[split]]
    table = pq.ParquetFile(tmp_path / "out" / "tiles.parquet")
    for group, shard in enumerate(shards):
        assert set(table.read_row_group(group)["shard"].to_pylist()) == {shard.name}
    assert table.num_row_groups == len(shards)
    assert load_tiles(tmp_path / "out")["source"].to_pylist()[0].endswith((".jpg", ".png"))


def test_the_result_is_the_same_for_any_workers_and_for_a_folder_and_its_zip(tiles: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "zip" / "tiles"), "zip", tmp_path, "tiles")
    for path in tiles.rglob("*.jpg"):
        os.utime(path, (0, 1e9))
    pack(str(tiles), str(tmp_path / "one"), workers=1, tiles_per_shard=7)
    pack(str(tiles), str(tmp_path / "two"), workers=2, tiles_per_shard=7)
    pack(archive, str(tmp_path / "zipped"), workers=5, tiles_per_shard=7)
    assert digests(tmp_path / "one") == digests(tmp_path / "two") == digests(tmp_path / "zipped")
    pack(str(tiles), str(tmp_path / "seed"), seed=1, tiles_per_shard=7)
    assert digests(tmp_path / "one") != digests(tmp_path / "seed")


def test_nothing_of_the_place_or_the_day_is_written(tiles: Path, tmp_path: Path) -> None:
    pack(str(tiles), str(tmp_path / "out"))
    text = (tmp_path / "out" / "index.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["packed"]["source"] == "tiles"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "index.json",
        "test",
        "tiles.parquet",
        "train",
        "val",
    ]


def test_mean_and_std_are_those_of_the_pixels_of_the_train_split(tiles: Path, tmp_path: Path) -> None:
    index = pack(str(tiles), str(tmp_path / "out"))
    reader = TileReader(tmp_path / "out", "train")
    pixels = np.stack([decode_image(data).numpy() for data in reader.read(range(len(reader)))]) / 255
    assert index.mean == pytest.approx(pixels.mean((0, 2, 3)))
    assert index.std == pytest.approx(pixels.std((0, 2, 3)))


def test_a_channel_that_never_varies_can_still_be_normalised(tmp_path: Path) -> None:
    for number in range(8):
        flat = np.full((8, 8, 3), (number * 9, 0, 255), np.uint8)
        save(tmp_path / "tiles" / "ab"[number % 2] / f"{number}.png", Image.fromarray(flat))
    index = pack(str(tmp_path / "tiles"), str(tmp_path / "out"))
    assert index.mean[1:] == [0.0, 1.0]
    assert index.std[1:] == [1.0, 1.0]


def test_equal_pixels_stay_in_one_split_even_in_other_files_and_classes(tmp_path: Path) -> None:
    for number in range(40):
        save(tmp_path / "tiles" / "Crop" / f"{number}.png", picture(number))
        save(tmp_path / "tiles" / "Crop" / f"copy{number}.bmp", picture(number))
        save(tmp_path / "tiles" / "Water" / f"{number}.png", picture(number if number < 3 else number + 100))
    index = pack(str(tmp_path / "tiles"), str(tmp_path / "out"), split=(50, 25, 25))
    splits: dict[bytes, set[str]] = {}
    for split in SPLITS:
        reader = TileReader(tmp_path / "out", split)
        for data in reader.read(range(len(reader))):
            splits.setdefault(decode_image(data).numpy().tobytes(), set()).add(split)
    assert all(len(where) == 1 for where in splits.values())
    assert index.packed["equal_pixels_other_label"] == 9
    assert sum(index.tiles(split) for split in SPLITS) == 120


def test_tiles_of_another_size_are_counted_or_resized(tmp_path: Path) -> None:
    for number in range(12):
        side = 16 if number < 8 else 24
        form = "jpg" if number % 2 else "png"
        save(tmp_path / "tiles" / "ab"[number % 2] / f"{number}.{form}", picture(number, side))
    kept = pack(str(tmp_path / "tiles"), str(tmp_path / "kept"))
    assert (kept.tile_size, kept.packed["other_size"], kept.packed["resized"]) == (16, 4, 0)
    resized = pack(str(tmp_path / "tiles"), str(tmp_path / "resized"), size=24)
    assert (resized.tile_size, resized.packed["other_size"], resized.packed["resized"]) == (24, 0, 8)
    for split in SPLITS:
        reader = TileReader(tmp_path / "resized", split)
        for tile_id, data in zip(reader.tile_ids, reader.read(range(len(reader))), strict=True):
            assert decode_image(data).shape == (3, 24, 24)
            assert data[:2] == (b"\xff\xd8" if tile_id.startswith("b") else b"\x89P")
            if int(tile_id[2:]) >= 8:
                assert data == next((tmp_path / "tiles").rglob(f"{tile_id[2:]}.*")).read_bytes()


def test_every_kind_of_image_keeps_its_bytes_and_gets_the_ending_of_its_content(tmp_path: Path) -> None:
    base = picture(1)
    kinds = {
        "grey.jpg": (base.convert("L"), {}),
        "cmyk.jpg": (base.convert("CMYK"), {}),
        "alpha.png": (base.convert("RGBA"), {}),
        "palette.png": (base.convert("P"), {}),
        "deep.png": (Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257), {}),
        "web.webp": (base, {}),
        "really_png.jpg": (base, {"format": "PNG"}),
    }
    for name, (image, options) in kinds.items():
        for folder in ("a", "b"):
            save(tmp_path / "tiles" / folder / name, image, **options)
    pack(str(tmp_path / "tiles"), str(tmp_path / "out"), split=(1, 0, 0))
    assert verify(tmp_path / "out") == []
    tar = next((tmp_path / "out" / "train").glob("*.tar"))
    listed = subprocess.run(["tar", "tf", tar], capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in listed if name.startswith("a/") and not name.endswith(".cls")} == {
        *("a/grey.jpg", "a/cmyk.jpg", "a/alpha.png", "a/palette.png", "a/deep.png", "a/web.webp", "a/really_png.png")
    }


def damage(tiles: Path) -> dict[str, str]:
    """Spoil some tiles in every way; returns path -> cause."""
    whole = (tiles / "Crop/Crop_2.jpg").read_bytes()
    (tiles / "Crop/Crop_2.jpg").write_bytes(whole[: len(whole) // 2])
    (tiles / "Crop/Crop_4.jpg").write_bytes(b"")
    (tiles / "Water/Water_1.jpg").write_text("this is text")
    picture(0).save(tiles / "Water/moving.gif", save_all=True, append_images=[picture(1)])
    return {
        "Crop/Crop_2.jpg": "image is cut short or damaged",
        "Crop/Crop_4.jpg": "empty file",
        "Water/Water_1.jpg": "not an image",
        "Water/moving.gif": "animated or multi-page image: 2 frames",
    }


def test_damaged_images_stop_the_pack_before_anything_is_written(tiles: Path, tmp_path: Path) -> None:
    bad = damage(tiles)
    with pytest.raises(TilefleetError) as caught:
        pack(str(tiles), str(tmp_path / "out"))
    line = str(caught.value)
    assert "4 of 61 images" in line
    assert "--skip-damaged" in line
    assert "and 1 more" in line
    assert "\n" not in line
    assert all(f"{name} ({reason})" in line for name, reason in list(bad.items())[:3])
    assert not (tmp_path / "out").exists()


def test_damaged_images_can_be_left_out_and_are_listed(tiles: Path, tmp_path: Path) -> None:
    bad = damage(tiles)
    index = pack(str(tiles), str(tmp_path / "out"), skip_damaged=True)
    assert {entry["source"]: entry["reason"] for entry in index.packed["damaged"]} == bad
    assert sum(index.tiles(split) for split in SPLITS) == 61 - len(bad)
    assert verify(tmp_path / "out") == []


def test_a_class_of_which_nothing_is_left_is_refused(tiles: Path, tmp_path: Path) -> None:
    for path in (tiles / "Water").iterdir():
        path.write_bytes(b"")
    with pytest.raises(TilefleetError, match="all images of Water are damaged"):
        pack(str(tiles), str(tmp_path / "out"), skip_damaged=True)


def test_a_split_that_stays_empty_is_said(tmp_path: Path) -> None:
    for number in range(4):
        save(tmp_path / "tiles" / "ab"[number % 2] / f"{number}.png", picture(number))
    index = pack(str(tmp_path / "tiles"), str(tmp_path / "out"), split=(90, 5, 5))
    assert index.tiles("train") == 4
    assert [line.split(":")[0] for line in index.packed["warnings"]] == ["split val is empty", "split test is empty"]
    assert index.splits["val"] == []
    assert len(TileReader(tmp_path / "out", "val")) == 0


def test_what_is_left_out_is_in_the_index(tiles: Path, tmp_path: Path) -> None:
    (tiles / "Crop/notes.txt").write_text("notes")
    (tiles / "Empty").mkdir()
    index = pack(str(tiles), str(tmp_path / "out"))
    assert index.packed["left_out"] == {"folder without images: Empty": 1, "not an image": 1}
    assert index.packed["tiles_by_class"]["Crop"] == {"train": 24, "val": 3, "test": 3}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """90 train and 10 test tiles of two classes, in folders of given splits."""
    for number in range(100):
        split, name = ("train", "test")[number >= 90], ("Crop", "Water")[number % 2]
        save(tmp_path / "published" / split / name / f"{number:03}.png", picture(number))
    return tmp_path / "published"


def ids(out: Path, split: str) -> set[str]:
    return set(TileReader(out, split).tile_ids)


def test_a_given_test_split_is_kept_and_val_is_a_ninth_of_the_given_train(published: Path, tmp_path: Path) -> None:
    index = pack(str(published), str(tmp_path / "out"))
    assert {split: index.tiles(split) for split in SPLITS} == {"train": 80, "val": 10, "test": 10}
    assert ids(tmp_path / "out", "test") == {
        f"test/{('Crop', 'Water')[number % 2]}/{number:03}" for number in range(90, 100)
    }
    assert all(name.startswith("train/") for name in ids(tmp_path / "out", "train") | ids(tmp_path / "out", "val"))
    assert index.packed["given_splits"] == ["train", "test"]
    assert index.packed["tiles_by_class"]["Crop"] == {"train": 40, "val": 5, "test": 5}
    assert (index.packed["left_out"], index.packed["warnings"]) == ({}, [])
    assert verify(tmp_path / "out") == []


def test_given_splits_are_the_same_for_any_workers_and_for_a_folder_and_its_zip(
    published: Path, tmp_path: Path
) -> None:
    archive = shutil.make_archive(str(tmp_path / "zip" / "published"), "zip", tmp_path, "published")
    pack(str(published), str(tmp_path / "one"), workers=1, tiles_per_shard=7)
    pack(archive, str(tmp_path / "two"), workers=4, tiles_per_shard=7)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_three_given_splits_are_kept_whatever_the_shares_and_no_test_split_is_made(
    published: Path, tmp_path: Path
) -> None:
    (published / "test").rename(published / "Validation")
    two = pack(str(published), str(tmp_path / "two"), split=(50, 25, 25))
    assert {split: two.tiles(split) for split in SPLITS} == {"train": 90, "val": 10, "test": 0}
    assert two.packed["warnings"] == ["split test is empty: the source gives splits, but no test split"]
    for number in range(200, 206):
        save(published / "testing" / ("Crop", "Water")[number % 2] / "1" / f"{number}.png", picture(number))
    three = pack(str(published), str(tmp_path / "three"), split=(1, 0, 0))
    assert {split: three.tiles(split) for split in SPLITS} == {"train": 90, "val": 10, "test": 6}
    assert three.packed["warnings"] == []


def test_a_tile_equal_to_one_of_a_more_protected_split_is_left_out_and_counted(published: Path, tmp_path: Path) -> None:
    for number in range(300, 310):
        save(published / "val" / ("Crop", "Water")[number % 2] / f"{number}.png", picture(number))
    before = pack(str(published), str(tmp_path / "before"))
    save(published / "train" / "Crop" / "of_test.bmp", picture(90))
    save(published / "train" / "Water" / "of_test_too.bmp", picture(90))  # under another label
    save(published / "val" / "Crop" / "of_test.bmp", picture(91))
    save(published / "train" / "Crop" / "of_val.bmp", picture(300))
    save(published / "train" / "Crop" / "again.bmp", picture(0))  # of its own split: stays
    save(published / "test" / "Crop" / "again.bmp", picture(92))
    after = pack(str(published), str(tmp_path / "after"))
    assert after.packed["left_out"] == {"equal pixels in the test split": 3, "equal pixels in the val split": 1}
    assert ids(tmp_path / "after", "train") == ids(tmp_path / "before", "train") | {"train/Crop/again"}
    assert ids(tmp_path / "after", "val") == ids(tmp_path / "before", "val")
    assert ids(tmp_path / "after", "test") == ids(tmp_path / "before", "test") | {"test/Crop/again"}
    assert before.packed["left_out"] == {}
    assert verify(tmp_path / "after") == []


def test_a_class_that_a_given_split_lacks_is_a_warning_and_one_without_train_tiles_an_error(
    published: Path, tmp_path: Path
) -> None:
    for path in (published / "test" / "Water").iterdir():
        path.unlink()
    index = pack(str(published), str(tmp_path / "out"))
    assert index.packed["warnings"] == ["split test has no tile of Water"]
    assert index.packed["left_out"] == {"folder without images: test/Water": 1}
    save(published / "test" / "Swamp" / "1.png", picture(400))
    with pytest.raises(TilefleetError, match="Swamp has tiles in another split but none in train"):
        pack(str(published), str(tmp_path / "swamp"))
    save(published / "train" / "Swamp" / "copy.png", picture(400))
    with pytest.raises(TilefleetError, match="no train tile of Swamp is left"):
        pack(str(published), str(tmp_path / "swamp"))
    assert not (tmp_path / "swamp").exists()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"split": (0, 50, 50)}, "--split 0,50,50"),
        ({"split": (80, -1, 10)}, "--split"),
        ({"split": (80, 20)}, "--split 80,20"),
        ({"tiles_per_shard": 0}, "--tiles-per-shard"),
        ({"size": 0}, "--size"),
        ({"size": 100_000}, "--size"),
        ({"workers": 0}, "--workers"),
    ],
)
def test_a_wrong_option_is_named(tiles: Path, tmp_path: Path, options: dict[str, Any], key: str) -> None:
    with pytest.raises(UsageError, match=key):
        pack(str(tiles), str(tmp_path / "out"), **options)


def test_places_that_hold_something_are_left_alone(tiles: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "work.txt").write_text("keep")
    pack(str(tiles), str(tmp_path / "done"))
    before = digests(tmp_path)
    for out, message in [
        (mine, "holds something else"),
        (mine / "work.txt", "is a file"),
        (tmp_path / "done", "already holds a shard set"),
        (tiles, "inside the source"),
        (tiles / "Crop" / "out", "inside the source"),
        (tmp_path, "holds something else"),
    ]:
        with pytest.raises(UsageError, match=message):
            pack(str(tiles), str(out))
    assert digests(tmp_path) == before


def test_an_empty_folder_and_a_new_path_below_others_can_be_packed_into(tiles: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    pack(str(tiles), str(tmp_path / "empty"))
    pack(str(tiles), str(tmp_path / "a" / "b" / "c"))
    assert digests(tmp_path / "empty") == digests(tmp_path / "a" / "b" / "c")


def test_an_error_while_writing_leaves_nothing_behind(tiles: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "write":
            raise KeyboardInterrupt

    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            pack(str(tiles), str(out), tiles_per_shard=5, progress=stop)
    assert list((tmp_path / "empty").iterdir()) == []
    assert not (tmp_path / "new").exists()


def test_a_tile_that_changes_between_the_passes_is_noticed(tiles: Path, tmp_path: Path) -> None:
    def change(stage: str, done: int, total: int) -> None:
        save(tiles / "Crop" / "Crop_2.jpg", picture(999))

    with pytest.raises(TilefleetError, match=r"Crop_2\.jpg changed while it was packed"):
        pack(str(tiles), str(tmp_path / "out"), progress=change)
    assert not (tmp_path / "out").exists()


def test_progress_is_told_to_the_end_of_both_passes(tiles: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    pack(str(tiles), str(tmp_path / "out"), tiles_per_shard=7, progress=lambda *step: told.append(step))
    for stage in ("read", "write"):
        counts = [done for name, done, total in told if name == stage and total == 60]
        assert counts == sorted(counts)
        assert counts[-1] == 60


@pytest.mark.process
def test_a_killed_pack_looks_unfinished_and_the_next_one_works(tiles: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = (
        "import sys, time; from training.pack import pack\n"
        "pack(*sys.argv[1:], tiles_per_shard=5, progress=lambda stage, *_: stage == 'write' and time.sleep(60))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tiles), str(out)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not list(out.glob("train/*.tar")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (out / MARKER).exists()
    with pytest.raises(TilefleetError, match="stopped before its end"):
        load_index(out)
    assert "stopped before its end" in str(verify(out)[0])
    pack(str(tiles), str(out))
    pack(str(tiles), str(tmp_path / "fresh"))
    assert digests(out) == digests(tmp_path / "fresh")


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(small_disk: Callable[[int], Path], tmp_path: Path) -> None:
    for number in range(200):
        save(tmp_path / "tiles" / "ab"[number % 2] / f"{number}.png", picture(number, 32))
    disk = small_disk(256)
    with pytest.raises(TilefleetError, match="disk is full") as caught:
        pack(str(tmp_path / "tiles"), str(disk / "out"), tiles_per_shard=20)
    assert "\n" not in str(caught.value)
    assert list(disk.iterdir()) == []


def test_stock_webdataset_reads_every_tile(tiles: Path, tmp_path: Path) -> None:
    import webdataset

    pack(str(tiles), str(tmp_path / "out"), tiles_per_shard=7)
    shards = sorted(str(path) for path in (tmp_path / "out").rglob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert {sample["__key__"]: sample["cls"] for sample in samples} == {
        path.relative_to(tiles).with_suffix("").as_posix(): int(path.parent.name == "Water")
        for path in tiles.rglob("*.*")
    }
    assert all(sample.get("jpg", sample.get("png")).size == (16, 16) for sample in samples)


@pytest.mark.ray
def test_ray_data_reads_every_tile(ray_session: None, tiles: Path, tmp_path: Path) -> None:
    """Its decoder wants one kind of image in a shard; without it, mixed shards are read as well."""
    import ray

    pack(str(tiles), str(tmp_path / "mixed"), tiles_per_shard=20)
    rows = ray.data.read_webdataset(str(tmp_path / "mixed" / "train"), decoder=None).take_all()
    assert {row["__key__"] for row in rows} == set(TileReader(tmp_path / "mixed", "train").tile_ids)
    for path in tiles.rglob("*.png"):
        path.unlink()
    pack(str(tiles), str(tmp_path / "jpeg"), tiles_per_shard=20)
    rows = ray.data.read_webdataset(str(tmp_path / "jpeg" / "train")).take_all()
    assert {row["__key__"] for row in rows} == set(TileReader(tmp_path / "jpeg", "train").tile_ids)
    assert {(row["cls"], row["jpg"].shape) for row in rows} == {(0, (16, 16, 3)), (1, (16, 16, 3))}


def test_names_in_any_alphabet_survive(tmp_path: Path) -> None:
    for number, name in enumerate(["été/façade", "été/森林", "Wälder/" + "x" * 110, "Wälder/a b"]):
        save(tmp_path / "tiles" / f"{name}.png", picture(number))
    pack(str(tmp_path / "tiles"), str(tmp_path / "out"), split=(1, 0, 0))
    assert verify(tmp_path / "out") == []
    assert sorted(TileReader(tmp_path / "out", "train").tile_ids) == sorted(
        ["été/façade", "été/森林", "Wälder/" + "x" * 110, "Wälder/a b"]
    )


@pytest.mark.data
def test_real_tiles_pack_and_verify(eurosat_zip: Path, tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(eurosat_zip) as archive:
        for name in [n for n in archive.namelist() if n.endswith("7.jpg")][:400]:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(name))
    index = pack(str(tmp_path / "EuroSAT_RGB"), str(tmp_path / "out"))
    assert index.tile_size == 64
    assert verify(tmp_path / "out") == []
    first = TileReader(tmp_path / "out", "train").read([0])[0]
    assert Image.open(io.BytesIO(first)).size == (64, 64)
