"""CIFAR batches become tiles with their published splits; a file that only looks like a batch is refused unrun."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tarfile
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import TilefleetError
from training import cifar
from training.decode import decode_image
from training.pack import pack
from training.shards import TileReader
from training.sources import Source, open_source

NAMES = ["airplane", "automobile", "bird"]
TEN = {"data_batch_1": 6, "data_batch_2": 5, "data_batch_3": 4, "data_batch_4": 3, "data_batch_5": 3, "test_batch": 6}


def pickled(value: object) -> bytes:
    """``value`` as Python 2 pickles it (protocol 2)."""
    return b"\x80\x02" + _steps(value) + b"."


def _steps(value: object) -> bytes:
    match value:
        case str():
            data = value.encode("latin-1")
            return b"U%c" % len(data) + data if len(data) < 256 else b"T" + len(data).to_bytes(4, "little") + data
        case int():
            return b"J" + value.to_bytes(4, "little", signed=True)
        case list():
            return b"](" + b"".join(map(_steps, value)) + b"e"
        case dict():
            return b"}(" + b"".join(_steps(part) for item in value.items() for part in item) + b"u"
        case np.ndarray():
            array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
            kind = b"cnumpy\ndtype\n" + _steps(value.dtype.str[1:]) + b"K\x00K\x01\x87R"
            state = b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
            by_column = np.isfortran(value)
            text = value.tobytes("A").decode("latin-1")
            shape = b"(" + b"".join(map(_steps, value.shape)) + b"t"
            return array + b"(K\x01" + shape + kind + state + (b"\x88" if by_column else b"\x89") + _steps(text) + b"tb"
    raise TypeError(type(value))


def pixels(name: str, tiles: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(len(name) + ord(name[-1])).integers(0, 256, (tiles, 3072), dtype=np.uint8)


def batch(name: str, tiles: int, key: str = "labels") -> dict[str, Any]:
    labels = [number % 3 for number in range(tiles)]
    return {"batch_label": name, key: labels, "data": pixels(name, tiles), "filenames": [f"{n}.png" for n in labels]}


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    """A small CIFAR-10."""
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    for name, tiles in TEN.items():
        (root / name).write_bytes(pickled(batch(name, tiles)))
    meta = "(dp1\nS'num_cases_per_batch'\nI10\nsS'label_names'\n(lp2\n" + "".join(f"S'{n}'\na" for n in NAMES) + "s."
    (root / "batches.meta").write_bytes(meta.encode())  # published in protocol 0
    return root


def archive(root: Path) -> Path:
    path = root.parent / "cifar-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(root, root.name)
    return path


def find(location: Path) -> Source:
    with closing(open_source(location)) as source:
        return source


def test_the_batches_of_these_tests_are_pickles_that_numpy_reads(ten: Path) -> None:
    with warnings.catch_warnings(action="ignore"):  # numpy moved its module since
        entries = pickle.loads((ten / "data_batch_1").read_bytes(), encoding="latin1")
    assert np.array_equal(entries["data"], pixels("data_batch_1", 6))
    assert entries["labels"] == [0, 1, 2, 0, 1, 2]


def test_ids_hold_split_class_and_place_in_the_order_of_the_batches(ten: Path) -> None:
    source = find(ten)
    assert source.classes == NAMES
    assert len(source.tiles) == sum(TEN.values())
    by_id = {tile.tile_id: tile for tile in source.tiles}
    second = by_id["train/automobile/00007"]  # six in the first batch, so the second of the second
    assert (second.source, second.label, second.split) == ("data_batch_2/1", 1, "train")
    assert by_id["test/bird/00005"].split == "test"
    assert source.left_out == {}


@pytest.mark.parametrize("order", ["C", "F"])
def test_tiles_keep_every_pixel_in_a_folder_and_an_archive(ten: Path, order: Any) -> None:
    first = batch("data_batch_1", 6)
    first["data"] = np.asarray(first["data"], order=order)
    (ten / "data_batch_1").write_bytes(pickled(first))
    for location in (ten, archive(ten)):
        with closing(open_source(location)) as source:
            for tile in source.tiles:
                name, _, place = tile.source.partition("/")
                data = source.read(tile)
                expected = pixels(name, TEN[name])[int(place)].reshape(3, 32, 32)
                assert data.startswith(b"\x89PNG")
                assert data == source.read(tile)
                assert np.array_equal(decode_image(data).numpy(), expected)


def test_cifar_100_has_its_fine_labels(tmp_path: Path) -> None:
    for name, tiles in {"train": 9, "test": 3}.items():
        entries = batch(name, tiles, "fine_labels") | {"coarse_labels": [0] * tiles}
        (tmp_path / name).write_bytes(pickled(entries))
    (tmp_path / "meta").write_bytes(pickled({"fine_label_names": NAMES, "coarse_label_names": ["thing"]}))
    source = find(tmp_path)
    assert source.classes == NAMES
    assert [tile.split for tile in source.tiles].count("train") == 9
    assert source.tiles[-1].tile_id == "train/bird/00008"


def test_a_packed_cifar_keeps_its_test_split_and_takes_val_from_train(ten: Path, tmp_path: Path) -> None:
    index = pack(str(ten), str(tmp_path / "one"), split=(60, 40, 0), workers=1)
    assert {split: index.tiles(split) for split in ("train", "val", "test")} == {"train": 13, "val": 8, "test": 6}
    assert (index.tile_size, index.packed["given_splits"]) == (32, ["train", "test"])
    assert TileReader(tmp_path / "one", "val").tile_ids[0].startswith("train/")
    pack(str(ten), str(tmp_path / "two"), split=(60, 40, 0), workers=3)
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


@pytest.mark.parametrize("name", ["batches.meta", "data_batch_3"])
def test_a_batch_that_tries_to_run_code_is_refused_and_does_not_run(ten: Path, tmp_path: Path, name: str) -> None:
    place = tmp_path / "made"
    call = f"c{os.mkdir.__module__}\nmkdir\n(".encode() + _steps(str(place)) + b"tR"
    attack = b"\x80\x02}U\x04data" + call + b"s."
    pickle.loads(attack)
    place.rmdir()  # it was made, so this is a real attack
    (ten / name).write_bytes(attack)
    for location in (ten, archive(ten)):
        with pytest.raises(TilefleetError, match=f"{name} is not a CIFAR batch .it names '.* mkdir'"):
            find(location)
        assert not place.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "text"}, "no uint8 data"),
        ({"data": np.zeros((6, 3071), np.uint8)}, "no uint8 data"),
        ({"data": np.zeros((6, 3072), np.uint16)}, "no uint8 data"),
        ({"labels": [0, 1]}, "no labels, one for each tile"),
        ({"labels": "labels"}, "no labels, one for each tile"),
        ({"labels": [0, 1, 2, 3, 0, 0]}, "labels other than 0 to 2"),
        ({"labels": [0, 1, 2, -1, 0, 0]}, "labels other than 0 to 2"),
        ({"labels": ["0"] * 6}, "labels other than 0 to 2"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_in_clear_words(ten: Path, change: dict[str, Any], message: str) -> None:
    (ten / "data_batch_1").write_bytes(pickled(batch("data_batch_1", 6) | change))
    with pytest.raises(TilefleetError, match=f"data_batch_1 is not a CIFAR batch .*{message}"):
        find(ten)


def test_an_array_that_lies_about_its_shape_is_refused(ten: Path) -> None:
    data = (ten / "data_batch_1").read_bytes()
    shape = b"J" + (6).to_bytes(4, "little") + b"J" + (3072).to_bytes(4, "little")
    assert shape in data
    (ten / "data_batch_1").write_bytes(data.replace(shape, b"J" + (1 << 30).to_bytes(4, "little") + shape[5:]))
    with pytest.raises(TilefleetError, match="no uint8 data"):
        find(ten)


@pytest.mark.parametrize("names", ["text", [], ["a", "a", "b"], ["a", "b/../c", "d"], ["a", "", "b"], ["a", 1, "b"]])
def test_class_names_that_cannot_be_used_are_refused(ten: Path, names: object) -> None:
    (ten / "batches.meta").write_bytes(pickled({"label_names": names}))
    with pytest.raises(TilefleetError, match=r"batches\.meta is not a CIFAR batch .no label_names"):
        find(ten)


def test_a_missing_or_cut_batch_is_named(ten: Path) -> None:
    whole = (ten / "data_batch_4").read_bytes()
    for length in (0, 10, len(whole) - 1):
        (ten / "data_batch_4").write_bytes(whole[:length])
        with pytest.raises(TilefleetError, match="data_batch_4 is not a CIFAR batch"):
            find(ten)
    (ten / "data_batch_4").unlink()
    for location in (ten, archive(ten)):
        with pytest.raises(TilefleetError, match="lacks data_batch_4; download it again") as caught:
            find(location)
        assert caught.value.exit_code == 1


def test_an_archive_that_is_cut_or_no_archive_is_one_clear_line(ten: Path) -> None:
    path = archive(ten)
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(TilefleetError, match=path.name) as caught:
            find(path)
        assert "\n" not in str(caught.value)
    path.write_text("not compressed")
    with pytest.raises(TilefleetError, match="cut short, damaged or not a"):
        find(path)


def test_other_archives_are_not_taken_for_cifar(tmp_path: Path) -> None:
    (tmp_path / "tiles").mkdir()
    shutil.make_archive(str(tmp_path / "tiles"), "gztar", tmp_path, "tiles")
    with pytest.raises(TilefleetError, match="not a whole set of CIFAR batches, it lacks meta, train, test"):
        find(tmp_path / "tiles.tar.gz")


def test_links_in_an_archive_are_no_batches(ten: Path, tmp_path: Path) -> None:
    path = archive(ten)
    with tarfile.open(path) as old, tarfile.open(tmp_path / "b.tar.gz", "w:gz") as new:
        for member in old:
            if member.name.endswith("test_batch"):
                member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/passwd", 0
                new.addfile(member)
            else:
                new.addfile(member, old.extractfile(member))
    with pytest.raises(TilefleetError, match="lacks test_batch"):
        find(tmp_path / "b.tar.gz")


def test_limits_hold_before_anything_is_read(ten: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "MAX_BATCH_BYTES", 10_000)
    for location in (ten, archive(ten)):
        with pytest.raises(TilefleetError, match=r"data_batch_1: over the limit"):
            find(location)
    bomb = io.BytesIO()
    with tarfile.open(fileobj=bomb, mode="w:gz") as tar:
        info = tarfile.TarInfo("batches.meta")
        info.size = 1 << 20
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    (ten.parent / "bomb.tar.gz").write_bytes(bomb.getvalue())
    monkeypatch.setattr(cifar, "MAX_ARCHIVE_BYTES", 100_000)
    with pytest.raises(TilefleetError, match=r"bomb\.tar\.gz: over the limit"):
        find(ten.parent / "bomb.tar.gz")
