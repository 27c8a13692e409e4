"""Class folders and zips are found as they are; what is not a tile is counted, never lost; hostile zips are refused."""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
from collections.abc import Callable
from contextlib import closing
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.errors import TilefleetError, UsageError
from training.encoded import MAX_ENCODED_BYTES, TileError
from training.sources import RawTile, Source, open_source


def image(value: int = 0, form: str = "JPEG") -> bytes:
    buffer = BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(buffer, form)
    return buffer.getvalue()


def folder(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(number))
    return root


def zipped(root: Path, target: Path) -> Path:
    return Path(shutil.make_archive(str(target), "zip", root))


def find(location: Path) -> Source:
    with closing(open_source(str(location))) as source:
        return source


def ids(source: Source) -> list[str]:
    return [tile.tile_id for tile in source.tiles]


def test_class_folders_are_classes_in_order_and_tiles_are_sorted_by_id(tmp_path: Path) -> None:
    source = find(folder(tmp_path / "tiles", "Water/b.jpg", "Crop/2.png", "Crop/10.jpg"))
    assert source.name == "tiles"
    assert source.classes == ["Crop", "Water"]
    assert source.tiles == [
        RawTile("Crop/10", 0, "Crop/10.jpg"),
        RawTile("Crop/2", 0, "Crop/2.png"),
        RawTile("Water/b", 1, "Water/b.jpg"),
    ]
    assert source.left_out == {}


@pytest.mark.parametrize("wrapper", ["", "EuroSAT/", "a/b/EuroSAT/", "v1.0/"])
def test_folders_around_the_class_folders_do_not_show(tmp_path: Path, wrapper: str) -> None:
    root = folder(tmp_path / "tiles", f"{wrapper}Crop/1.jpg", f"{wrapper}Water/1.jpg")
    for source in (find(root), find(zipped(root, tmp_path / "other"))):
        assert ids(source) == ["Crop/1", "Water/1"]
        assert [tile.source for tile in source.tiles] == ["Crop/1.jpg", "Water/1.jpg"]


def test_images_in_folders_below_a_class_belong_to_it(tmp_path: Path) -> None:
    source = find(folder(tmp_path / "tiles", "Crop/north/1.jpg", "Crop/1.jpg", "Water/1.jpg"))
    assert [(tile.tile_id, tile.label) for tile in source.tiles] == [("Crop/1", 0), ("Crop/north/1", 0), ("Water/1", 1)]


def test_dots_in_a_base_name_become_underscores_as_tar_readers_cut_there(tmp_path: Path) -> None:
    assert ids(find(folder(tmp_path / "t", "Crop/v1.2/a.b.c.jpg", "Water/1.jpg"))) == ["Crop/v1.2/a_b_c", "Water/1"]


def test_what_is_not_a_tile_is_left_out_and_counted(tmp_path: Path) -> None:
    root = folder(
        tmp_path / "tiles",
        "Crop/1.jpg",
        "Water/1.jpg",
        "stray.jpg",
        "Crop/.hidden.jpg",
        ".thumbs/1.jpg",
        "__MACOSX/Crop/._1.jpg",
        "Crop/notes.txt",
        "Crop/bad\nname.jpg",
    )
    (root / "Bare").mkdir()
    expected = {
        "folder without images: Bare": 1,
        "hidden": 2,
        "in __MACOSX": 1,
        "name with unprintable characters": 1,
        "not an image": 1,
        "outside any class folder": 1,
    }
    for source in (find(root), find(zipped(root, tmp_path / "tiles"))):
        assert ids(source) == ["Crop/1", "Water/1"]
        assert source.left_out == expected


def test_links_count_only_where_they_stay_inside_the_folder(tmp_path: Path) -> None:
    root = folder(tmp_path / "tiles", "Crop/1.jpg", "Water/1.jpg")
    folder(tmp_path / "secret", "2.jpg")
    (root / "Crop/inside.jpg").symlink_to(root / "Water/1.jpg")
    (root / "Crop/outside.jpg").symlink_to(tmp_path / "secret/2.jpg")
    (root / "Crop/broken.jpg").symlink_to(root / "nothing.jpg")
    (root / "Crop/folder").symlink_to(tmp_path / "secret")
    os.mkfifo(root / "Crop/pipe.jpg")
    source = find(root)
    assert ids(source) == ["Crop/1", "Crop/inside", "Water/1"]
    assert source.left_out == {
        "broken link or special file": 2,
        "link that leaves the folder": 1,
        "link to a folder": 1,
    }


def test_tiles_read_back_as_they_are_from_a_folder_and_a_zip(tmp_path: Path) -> None:
    root = folder(tmp_path / "tiles", "Crop/1.jpg", "Water/1.jpg")
    for location in (root, zipped(root, tmp_path / "tiles")):
        with closing(open_source(location)) as source:
            assert [source.read(tile) for tile in source.tiles] == [image(0), image(1)]


@pytest.mark.parametrize("names", [("Crop/x.jpg", "Crop/x.png"), ("Crop/a.b.jpg", "Crop/a_b.jpg")])
def test_one_id_for_two_files_is_refused_and_names_both(tmp_path: Path, names: tuple[str, str]) -> None:
    with pytest.raises(TilefleetError) as caught:
        find(folder(tmp_path / "tiles", *names, "Water/1.jpg"))
    assert all(name in str(caught.value) for name in names)


def test_an_id_that_readers_would_cut_is_refused(tmp_path: Path) -> None:
    allowed = "x" * (128 - len("Crop/"))
    assert find(folder(tmp_path / "a", f"Crop/{allowed}.jpg", "Water/1.jpg")).tiles
    with pytest.raises(TilefleetError, match=f"{allowed}y.*128 characters"):
        find(folder(tmp_path / "b", f"Crop/{allowed}y.jpg", "Water/1.jpg"))


def test_a_place_that_is_no_source_is_a_wrong_command_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder, zip"):
        find(tmp_path / "nothing")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UsageError, match="neither a folder nor a zip"):
        find(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no images in class folders .it is empty"),
        (["Crop/a.txt"], "no images in class folders .*1 not an image"),
        (["a.jpg", "b.jpg"], "2 outside any class folder"),
        (["Crop/a.jpg", "Crop/b.jpg"], r"only one class \(Crop\)"),
        (["set/Crop/a.jpg"], r"only one class \(Crop\)"),
        (["train/Crop/a.jpg", "test/Crop/a.jpg"], r"only one class \(Crop\)"),
        (["train/a.jpg", "test/b.jpg"], "2 outside any class folder"),
        (["val/Crop/a.jpg", "test/Crop/a.jpg"], r"splits \(test, val\), not classes, and not train"),
        (
            ["train/Crop/a.jpg", "train/Water/a.jpg", "test/Crop/b.jpg", "test/Swamp/b.jpg"],
            "Swamp has tiles in another",
        ),
        (["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "validation/a/1.jpg"], "val/a/1.jpg and validation/a/1.jpg"),
    ],
)
def test_a_source_without_two_classes_is_refused_in_clear_words(tmp_path: Path, names: list[str], message: str) -> None:
    root = folder(tmp_path / "tiles", *names)
    root.mkdir(exist_ok=True)
    for location in (root, zipped(root, tmp_path / "tiles")):
        with pytest.raises(TilefleetError, match=message):
            find(location)


def make_zip(path: Path, add: Callable[[zipfile.ZipFile], None]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("Crop/1.jpg", "Water/1.jpg"):
            archive.writestr(name, image())
        add(archive)
    return path


@pytest.mark.parametrize("name", ["/etc/1.jpg", "../1.jpg", "Crop/../../1.jpg"])
def test_a_zip_whose_entries_point_outside_is_refused(tmp_path: Path, name: str) -> None:
    path = make_zip(tmp_path / "a.zip", lambda archive: archive.writestr(name, image()))
    with pytest.raises(TilefleetError, match="points outside"):
        find(path)


def test_links_in_a_zip_are_left_out(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("Crop/link.jpg")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    source = find(make_zip(tmp_path / "a.zip", lambda archive: archive.writestr(info, "/etc/passwd")))
    assert ids(source) == ["Crop/1", "Water/1"]
    assert source.left_out == {"link": 1}


def test_an_encrypted_zip_and_one_without_a_size_limit_are_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", lambda archive: None)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(TilefleetError, match=r"Crop/1\.jpg.*encrypted"):
        find(path)
    packed = make_zip(tmp_path / "b.zip", lambda z: z.writestr("Crop/2.jpg", image(), zipfile.ZIP_BZIP2))
    with pytest.raises(TilefleetError, match="neither stored nor deflated"):
        find(packed)


def test_a_zip_cut_anywhere_is_bad_data_not_a_crash(tmp_path: Path) -> None:
    whole = make_zip(tmp_path / "a.zip", lambda archive: None).read_bytes()
    cut = tmp_path / "cut.zip"
    for length in [*range(0, len(whole), 13), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(TilefleetError, match="cut short or damaged") as caught:
            find(cut)
        assert caught.value.exit_code == 1


def test_a_changed_byte_in_a_zip_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", lambda archive: None)
    data = bytearray(path.read_bytes())
    data[data.index(b"Crop/1.jpg") + 100] ^= 1
    path.write_bytes(data)
    with closing(open_source(path)) as source:
        with pytest.raises(TileError, match="damaged in the zip"):
            source.read(source.tiles[0])
        assert source.read(source.tiles[1]) == image()


def test_limits_hold_before_anything_is_decompressed(tmp_path: Path) -> None:
    size = MAX_ENCODED_BYTES + 1
    path = make_zip(tmp_path / "a.zip", lambda z: z.writestr("Crop/bomb.jpg", bytes(size), zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 1 << 20
    with closing(open_source(path)) as source, pytest.raises(TileError, match="over the limit"):
        source.read(next(tile for tile in source.tiles if tile.tile_id == "Crop/bomb"))


def test_a_zip_that_lies_about_a_size_is_not_believed(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", lambda z: z.writestr("Crop/lie.jpg", bytes(1 << 20), zipfile.ZIP_DEFLATED))
    true, lie = (1 << 20).to_bytes(4, "little"), (100).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(true, lie))
    with closing(open_source(path)) as source, pytest.raises(TileError, match="damaged in the zip"):
        source.read(next(tile for tile in source.tiles if tile.tile_id == "Crop/lie"))


def test_given_splits_are_kept_and_come_first_in_the_ids(tmp_path: Path) -> None:
    root = folder(tmp_path / "t", "train/Crop/1.jpg", "train/Water/1.jpg", "test/Crop/1.jpg", "val/Water/north/1.jpg")
    for source in (find(root), find(zipped(root, tmp_path / "t"))):
        assert source.classes == ["Crop", "Water"]
        assert source.tiles == [
            RawTile("test/Crop/1", 0, "test/Crop/1.jpg", "test"),
            RawTile("train/Crop/1", 0, "train/Crop/1.jpg", "train"),
            RawTile("train/Water/1", 1, "train/Water/1.jpg", "train"),
            RawTile("val/Water/north/1", 1, "val/Water/north/1.jpg", "val"),
        ]
        assert source.left_out == {}


@pytest.mark.parametrize("wrapper", ["", "CIFAR10/", "a/b/"])
@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Training", "Validation", "Testing"),
        ("TRAIN", "valid", "Test"),
        ("train", "validate", "TEST"),
    ],
)
def test_splits_are_known_in_any_usual_spelling_and_below_other_folders(
    tmp_path: Path, wrapper: str, train: str, val: str, test: str
) -> None:
    names = [f"{split}/{name}/1.jpg" for split in (train, val, test) for name in ("a", "b")]
    source = find(folder(tmp_path / "tiles", *(wrapper + name for name in names)))
    assert ids(source) == [f"{split}/{name}/1" for split in ("test", "train", "val") for name in "ab"]
    assert all(tile.split == tile.tile_id.split("/")[0] for tile in source.tiles)
    assert sorted(tile.source for tile in source.tiles) == sorted(names)


def test_a_train_folder_by_itself_only_wraps_its_classes_and_beside_other_classes_is_one(tmp_path: Path) -> None:
    alone = find(folder(tmp_path / "alone", "train/Crop/1.jpg", "train/Water/1.jpg"))
    assert [(tile.tile_id, tile.split) for tile in alone.tiles] == [("Crop/1", ""), ("Water/1", "")]
    assert find(folder(tmp_path / "rail", "train/1.jpg", "tram/1.jpg")).classes == ["train", "tram"]


def test_what_stands_beside_the_splits_or_lacks_images_in_one_is_left_out_and_counted(tmp_path: Path) -> None:
    root = folder(
        tmp_path / "tiles",
        *("train/a/1.jpg", "train/b/1.jpg", "test/a/1.jpg", "test/1.jpg"),
        *("unlabelled/c/1.jpg", "unlabelled/2.jpg", "stray.jpg"),
    )
    (root / "test" / "b").mkdir()
    (root / "unlabelled" / "d").mkdir()
    for source in (find(root), find(zipped(root, tmp_path / "tiles"))):
        assert ids(source) == ["test/a/1", "train/a/1", "train/b/1"]
        assert source.left_out == {
            "folder without images: test/b": 1,
            "outside any class folder": 2,
            "outside the folders of the splits: unlabelled": 2,
        }


@pytest.mark.data
def test_the_real_eurosat_zip_is_read_as_it_was_published(eurosat_zip: Path) -> None:
    source = find(eurosat_zip)
    assert (len(source.classes), len(source.tiles), source.left_out) == (10, 24_300, {})
    assert source.tiles[0] == RawTile("AnnualCrop/AnnualCrop_1", 0, "AnnualCrop/AnnualCrop_1.jpg")
