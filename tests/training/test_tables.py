"""A table names tiles, labels and splits; a row that cannot be used is an error that says which and why."""

from __future__ import annotations

from contextlib import closing
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from configs.errors import TilefleetError
from training import tables
from training.pack import pack
from training.shards import TileReader
from training.sources import RawTile, Source, open_source


def image(number: int) -> bytes:
    buffer = BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with six images, a.png to c.png and deep/a.png to deep/c.png."""
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for number, name in enumerate(["a", "b", "c", "deep/a", "deep/b", "deep/c"]):
        (tmp_path / "data" / f"{name}.png").write_bytes(image(number))
    return tmp_path / "data"


def find(location: Path) -> Source:
    with closing(open_source(location)) as source:
        return source


def write(root: Path, text: str) -> Path:
    (root / "tiles.csv").write_text(text)
    return root / "tiles.csv"


def write_parquet(root: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), root / "tiles.parquet")
    return root / "tiles.parquet"


def test_rows_are_tiles_with_their_path_as_id(root: Path) -> None:
    source = find(write(root, "label,path,cloud\nWater,deep/b.png,0.5\nCrop,a.png,\nWater,./c.png,1\n"))
    assert source.name == "tiles"
    assert source.classes == ["Crop", "Water"]
    assert source.tiles == [
        RawTile("a", 0, "a.png"),
        RawTile("c", 1, "c.png"),
        RawTile("deep/b", 1, "deep/b.png"),
    ]
    assert source.left_out == {"image that the table does not name": 3}


def test_a_csv_may_have_a_mark_blanks_quotes_and_empty_lines(root: Path) -> None:
    (root / "b,1.png").write_bytes(image(9))
    text = '\ufeffpath , label\r\n a.png , Crop \r\n\r\n"b,1.png","Wet ""land"""\r\n'
    source = find(write(root, text))
    assert source.classes == ["Crop", 'Wet "land"']
    assert [tile.source for tile in source.tiles] == ["a.png", "b,1.png"]


def test_parquet_may_hold_numbers_and_dictionaries(root: Path) -> None:
    labels = pa.array([10, 2, 10])
    source = find(write_parquet(root, path=["a.png", "b.png", "c.png"], label=labels, area=[0.1, 0.2, 0.3]))
    assert (source.classes, [tile.label for tile in source.tiles]) == (["10", "2"], [0, 1, 0])
    names = pa.array(["Water", "Crop", "Crop"]).dictionary_encode()
    assert find(write_parquet(root, path=["a.png", "b.png", "c.png"], label=names)).classes == ["Crop", "Water"]


def test_a_split_column_gives_the_splits(root: Path, tmp_path: Path) -> None:
    rows = ["a.png,x,train", "b.png,y,Train", "c.png,x,validation", "deep/a.png,y,TEST", "deep/b.png,x,test"]
    table = write(root, "\n".join(["path,label,split", *rows]))
    assert [tile.split for tile in find(table).tiles] == ["train", "train", "val", "test", "test"]
    index = pack(str(table), str(tmp_path / "out"))
    assert TileReader(tmp_path / "out", "test").tile_ids in (["deep/a", "deep/b"], ["deep/b", "deep/a"])
    assert index.packed["given_splits"] == ["train", "val", "test"]
    assert index.packed["left_out"] == {"image that the table does not name": 1}
    assert index.packed["warnings"] == ["split val has no tile of y"]


def test_the_same_rows_pack_to_the_same_bytes_for_any_order_and_workers(root: Path, tmp_path: Path) -> None:
    rows = [f"{path.relative_to(root)},{path.stem}" for path in root.rglob("*.png")]
    pack(str(write(root, "\n".join(["path,label", *rows]))), str(tmp_path / "one"), workers=1)
    pack(str(write(root, "\n".join(["path,label", *rows[::-1]]))), str(tmp_path / "two"), workers=3)
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("missing.png,x", "row 3 names no image below the table's folder: 'missing.png'"),
        ("deep,x", "names no image"),
        ("tiles.csv,x", "names no image"),
        (",x", "row 3 has no path"),
        ("c.png,", "row 3 has no label that can be printed: 'c.png'"),
        ("c.png,  ", "has no label"),
        ("../secret.png,x", "leaves the table's folder: '../secret.png'"),
        ("deep/../../secret.png,x", "leaves the table's folder"),
        ("/etc/secret.png,x", "leaves the table's folder"),
        ("s3://bucket/secret.png,x", "leaves the table's folder"),
        ("link.png,x", "names no image"),
        ("./a.png,x", "row 1 names an image that another row names as well: 'a.png', row 3 names"),
    ],
)
def test_a_bad_row_is_named_with_its_reason(root: Path, row: str, reason: str) -> None:
    (root.parent / "secret.png").write_bytes(image(0))
    (root / "link.png").symlink_to(root.parent / "secret.png")
    table = write(root, f"path,label\na.png,x\nb.png,y\n{row}\n")
    with pytest.raises(TilefleetError) as caught:
        find(table)
    assert reason in str(caught.value)
    assert str(table) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_many_bad_rows_are_one_line_with_the_first_few_and_their_number(root: Path) -> None:
    rows = ["a.png,x,train", *(f"missing{number}.png,x,train" for number in range(9)), "b.png,y,later", "c.png,y,"]
    with pytest.raises(TilefleetError, match="11 of 12 rows cannot be used") as caught:
        find(write(root, "\n".join(["path,label,split", *rows])))
    assert "missing2.png' and 8 more; correct the table" in str(caught.value)
    with pytest.raises(TilefleetError, match="row 1 has a split that is neither train, val nor test: 'later'"):
        find(write(root, "path,label,split\nb.png,y,later\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column path and no column label"),
        ("path,class\na.png,x\n", "no column label"),
        ("path,label,label\na.png,x,y\n", "two columns label"),
        ("path,label\n", "has no rows"),
        ("path,label\na.png,x\nb.png\n", "1 rows have not 2 cells as the header has: row 2"),
        ('path,label\n"a.png,x\n', "not a CSV table"),
        ("path,label\na.png,x\nb.png,x\n", r"only one class \(x\)"),
        ("path,label,split\na.png,x,train\nb.png,y,test\n", "y has tiles in another split but none in train"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_in_clear_words(root: Path, text: str, message: str) -> None:
    with pytest.raises(TilefleetError, match=message):
        find(write(root, text))


def test_files_that_are_no_tables_are_refused(root: Path) -> None:
    (root / "a.csv").write_bytes(b"path,label\n\xff\xfe,x\n")
    with pytest.raises(TilefleetError, match="not a CSV table in UTF-8"):
        find(root / "a.csv")
    whole = write_parquet(root, path=["a.png", "b.png"], label=["x", "y"]).read_bytes()
    for length in (0, 4, len(whole) // 2, len(whole) - 1):
        (root / "cut.parquet").write_bytes(whole[:length])
        with pytest.raises(TilefleetError, match="not a Parquet table") as caught:
            find(root / "cut.parquet")
        assert "\n" not in str(caught.value)
    with pytest.raises(TilefleetError, match="not a Parquet table"):
        find(write_parquet(root, path=["a.png"], label=[["x"]]))
    with pytest.raises(TilefleetError, match="row 2 has no label"):
        find(write_parquet(root, path=["a.png", "b.png"], label=["x", None]))


def test_a_table_over_the_limit_is_not_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_TABLE_BYTES", 10)
    with pytest.raises(TilefleetError, match="over the limit"):
        find(write(root, "path,label\na.png,x\n"))
