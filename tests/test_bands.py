"""Tiles of 13 bands in 16 bit from raw files to predictions: two classes that only an infrared band tells apart."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tilefleet
from configs.errors import TilefleetError, UsageError
from configs.schema import Recipe
from inference import bench, engines, pictures
from inference.check import find_problems
from inference.forward import ENGINES, Engine, missing
from inference.plan import open_plan
from inference.predictor import Predictor, on_gpu
from inference.report import report
from inference.sink import read_predictions
from inference.tally import Example
from tests.archives import write_tar
from tests.geotiff import geotiff, scene, write_classes
from tests.page import Page
from training.bundle import load_bundle, read_info
from training.encoded import Bands
from training.evaluate import evaluate
from training.foreign import foreign_distances
from training.grids import prediction_grids
from training.images import list_images
from training.loop import Trainer
from training.pack import pack
from training.shards import TileReader, load_index, load_tiles, verify
from training.show import FRAME, augmented_sheet, contact_sheet
from training.train import check

SENTINEL = Bands(numbers=(4, 3, 2, 8), highest=3000)
RGB = Bands(numbers=(4, 3, 2), highest=3000)
RECIPE = {
    "name": "bands",
    "model": {"name": "cnn"},
    "augment": {"symmetries": True, "brightness": 0.1, "contrast": 0.1, "rotation": 10, "erasing": 0.1, "mixup": 0.1},
    "optimizer": {"learning_rate": 0.002},
    "epochs": 5,
    "batch_size": 16,
}


def run(command: str, *arguments: object) -> None:
    """Run a command as the front door does, without leaving the process."""
    tilefleet.app([command, *map(str, arguments)], standalone_mode=False)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("tiles") / "raw", 60)


@pytest.fixture(scope="module")
def shards(raw: Path) -> str:
    run("pack", raw, raw.parent / "shards", "--bands", "4,3,2,8", "--range", "0,3000", "--split", "60,20,20")
    return str(raw.parent / "shards")


def trained(shards: str, folder: Path) -> Recipe:
    recipe = Recipe.model_validate(RECIPE | {"shards": shards, "runs": str(folder)})
    Trainer(recipe, torch.device("cpu")).fit()
    return recipe


@pytest.fixture(scope="module")
def recipe(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """That of a finished run on ``shards``."""
    return trained(shards, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def bundle(recipe: Recipe) -> str:
    return f"{recipe.run}/bundle"


def test_the_index_says_which_bands_count_and_has_a_mean_for_each(raw: Path, shards: str) -> None:
    index = load_index(shards)
    assert (index.version, index.bands, index.channels) == (2, SENTINEL, 4)
    assert index.mean == pytest.approx([0.5, 0.5, 0.5, 0.5], abs=0.02)
    assert len(index.std) == 4
    assert verify(shards) == []
    assert list(find_problems(f"{shards}/test")) == []  # tars of any origin, where nothing says what bands count
    reader = TileReader(shards, "train")
    assert reader.read([0])[0] in {file.read_bytes() for file in raw.rglob("*.tif")}  # with all bands and bits


def test_a_zip_and_a_table_give_the_same_tiles(raw: Path, shards: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as file:
        for tile in sorted(raw.rglob("*.tif")):
            file.write(tile, tile.relative_to(raw))
    rows = [f"{tile.relative_to(raw.parent)},{tile.parent.name}" for tile in sorted(raw.rglob("*.tif"))]
    (raw.parent / "tiles.csv").write_text("\n".join(["path,label", *rows]))
    for source in (tmp_path / "raw.zip", raw.parent / "tiles.csv"):
        index = pack(str(source), str(tmp_path / "out" / source.name), split=(60, 20, 20), bands=SENTINEL)
        expected = load_index(shards)
        assert (index.classes, index.splits.keys()) == (expected.classes, expected.splits.keys())
        assert sorted(map(index.tiles, index.splits)) == sorted(map(expected.tiles, expected.splits))


def test_tiles_that_only_differ_in_bands_that_do_not_count_stay_in_one_split(tmp_path: Path) -> None:
    for label, name in enumerate(("Bare", "Vegetation")):
        (tmp_path / "raw" / name).mkdir(parents=True)
        for number in range(30):
            samples = scene(label, number // 3 + 100 * label)
            samples[12] = number
            (tmp_path / "raw" / name / f"tile-{number}.tif").write_bytes(geotiff(samples))
    pack(str(tmp_path / "raw"), str(tmp_path / "out"), split=(60, 20, 20), bands=SENTINEL)
    rows = load_tiles(tmp_path / "out").select(["split", "label", "tile_id"]).to_pylist()
    seen = {(row["split"], row["label"], int(row["tile_id"].partition("-")[2]) // 3) for row in rows}
    assert (len(rows), len(seen)) == (60, 20)


def test_a_model_tells_classes_apart_that_rgb_cannot(raw: Path, bundle: str, shards: str, tmp_path: Path) -> None:
    info = read_info(bundle)
    assert (info.version, info.bands, info.channels) == (3, SENTINEL, 4)
    result = evaluate(bundle, shards, out=str(tmp_path / "evaluation"))
    assert result["accuracy"] > 0.95
    assert result["undecodable"] == 0
    pack(str(raw), str(tmp_path / "rgb"), split=(60, 20, 20), bands=RGB)
    colours = trained(str(tmp_path / "rgb"), tmp_path)
    assert evaluate(f"{colours.run}/bundle", colours.shards, out=str(tmp_path / "other"))["accuracy"] < 0.8


def test_images_are_predicted_and_those_that_lack_a_band_are_named(
    bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "bare": geotiff(scene(0, 999)),
        "green": geotiff(scene(1, 998), interleave="band"),
        "rgb": geotiff(scene(1, 997)[:3]),
    }
    for name, data in files.items():
        (tmp_path / f"{name}.tif").write_bytes(data)
    with pytest.raises(TilefleetError, match="1 of 3 images"):
        run("predict", bundle, *(tmp_path / f"{name}.tif" for name in files))
    output = capsys.readouterr()
    bare, green = output.out.splitlines()
    assert "bare.tif: Bare" in bare.replace("unknown, nearest to ", "")
    assert "green.tif: Vegetation" in green.replace("unknown, nearest to ", "")
    assert "rgb.tif: band 8 asked for, the image has 3" in output.err


def test_every_engine_takes_four_channels(bundle: str, shards: str) -> None:
    encoded = TileReader(shards, "test").read(range(20))
    choice = engines.choose(bundle, encoded, device="cpu", threads=1)
    judge, info = load_bundle(bundle)
    reference = Engine("torch", judge, info)
    assert choice.trials.keys() == set(ENGINES["cpu"])
    for name, trial in choice.trials.items():
        assert missing(name, "cpu") or name == "torch" or (trial.agreement and trial.agreement.accepted), name
    predictor = Predictor(bundle, choice.engine, device="cpu", decode=on_gpu(info, "cpu"))
    assert predictor.predict(encoded).errors == [None] * 20
    assert reference(torch.zeros(2, 4, 16, 16, dtype=torch.uint8))[0].shape == (2, 2)


def test_sheets_and_grids_show_the_first_three_bands(shards: str, recipe: Recipe, tmp_path: Path) -> None:
    assert contact_sheet(shards, str(tmp_path / "sheet.png"), tiles=1) == 1
    shown = np.asarray(Image.open(tmp_path / "sheet.png"))[10 : 10 + FRAME, 10 : 10 + FRAME].reshape(-1, 3)
    assert len(np.unique(shown, axis=0)) > 100  # colours, not the notice of a tile that cannot be decoded
    assert augmented_sheet(recipe, str(tmp_path / "augmented.png"), tiles=2, variants=2) == 2
    assert prediction_grids(recipe, str(tmp_path / "grid.png")) is None


def test_foreign_images_are_judged_by_their_bands(bundle: str, tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(geotiff(scene(0, 5)[::-1]))
    Image.new("RGB", (16, 16)).save(tmp_path / "b.png")
    judge, info = load_bundle(bundle)
    assert foreign_distances(judge, info, list_images(str(tmp_path))).shape == (1,)
    Path(tmp_path / "a.tif").unlink()
    with pytest.raises(TilefleetError, match="not one of 1 foreign images can be decoded"):
        foreign_distances(judge, info, list_images(str(tmp_path)))


def test_the_page_of_a_run_shows_its_tiles(recipe: Recipe, bundle: str, shards: str) -> None:
    evaluate(bundle, shards, out=f"{recipe.run}/evaluation")
    (Path(recipe.run) / "config.yaml").write_text(recipe.model_dump_json())
    page = Page(report(recipe.run))
    page.assert_self_contained()
    assert "4 bands" in page.text
    tile = TileReader(shards, "test").tile_ids[0]
    result = {"shards": shards, "data_fingerprint": read_info(bundle).data_fingerprint, "split": "test"}
    assert len(pictures.from_shards([Example(0.5, tile, "Bare", "Bare")], result)[0]) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"augment": {"hue": 0.1}}, "augment.hue: needs red, green and blue, and tiles have 4 channels"),
        ({"augment": {"saturation": 0.1}}, "augment.saturation: needs red"),
        ({"model": {"name": "vgg16", "weights": "IMAGENET1K_V1"}}, "model.weights: IMAGENET1K_V1 is for RGB tiles"),
    ],
)
def test_what_needs_colours_is_refused_at_the_start(recipe: Recipe, changes: dict[str, Any], says: str) -> None:
    wanted = Recipe.model_validate(recipe.model_dump() | changes)
    with pytest.raises(UsageError, match=says):
        check(wanted, load_index(recipe.shards))
    if "augment" in changes:
        with pytest.raises(UsageError, match=says):
            augmented_sheet(wanted, "unused.png")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--bands", "4,3"], "--range"),
        (["--range", "0,1"], "--bands"),
        (["--bands", "0", "--range", "0,1"], "counted from 1"),
        (["--bands", "4,3,2", "--range", "3000,0"], "the lower one first"),
        (["--bands", "4,3,2", "--range", "0,3000", "--size", "32"], "--size: tiles with --bands"),
    ],
)
def test_wrong_bands_are_refused_and_nothing_is_written(
    raw: Path, tmp_path: Path, options: list[str], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        run("pack", raw, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_packing_without_bands_says_that_they_are_needed(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(TilefleetError, match=r"not an RGB image: 13 bands; choose some with `tilefleet pack --bands`"):
        pack(str(raw), str(tmp_path / "out"))


def test_a_benchmark_with_a_model_for_bands_needs_tiles_that_have_them(bundle: str, shards: str) -> None:
    config = bench.ClassifyConfig(workers=1)
    with (
        pytest.raises(UsageError, match="name SHARDS that do"),
        bench.prepare(bundle, None, 20, None, config, _no, _no),
    ):
        pass
    with bench.prepare("cnn", shards, 20, None, config, _no, _no) as prepared:
        assert (prepared.info.bands, prepared.info.channels) == (SENTINEL, 4)


def _no(*_: object) -> None: ...


@pytest.mark.ray
def test_the_whole_flow_by_its_commands(
    ray_session: None, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, runs, out = tmp_path / "shards", tmp_path / "runs", tmp_path / "out"
    run("pack", raw, shards, "--bands", "4,3,2,8", "--range", "0,3000", "--split", "60,20,20")
    settings = ["name=flow", f"shards={shards}", f"runs={runs}", "epochs=5", "batch_size=16", "workers=1"]
    run("train", Path(tilefleet.__file__).parent / "configs" / "demo.yaml", *settings, "schedule.warmup=5")
    bundle = runs / "flow" / "bundle"
    run("evaluate", bundle, shards)
    assert "accuracy on test: 100.00%" in capsys.readouterr().out

    (tmp_path / "in").mkdir()
    files = [(f"t/{number}.tif", geotiff(scene(number % 2, 5000 + number))) for number in range(40)]
    lacking = [(f"t/few-{number}.tif", geotiff(scene(0, number)[:4])) for number in range(3)]
    write_tar(tmp_path / "in" / "a.tar", [*files[:20], *lacking, *files[20:], ("t/cut.tif", files[0][1][:3000])])
    run("classify", bundle, tmp_path / "in", "--out", out)
    rows = {row["tile_id"]: row for row in read_predictions(str(out)).to_pylist()}
    assert len(rows) == 44
    assert [rows[f"t/{number}"]["class_id"] for number in range(40)] == [number % 2 for number in range(40)]
    assert {row["error"] for row in rows.values() if row["class_id"] is None} == {
        "band 8 asked for, the image has 4",
        "image is cut short or damaged",
    }
    plan = open_plan(str(out))
    assert plan
    assert plan.terms.bands == SENTINEL
    for name, trial in plan.terms.trials.items():
        assert name == "torch" or missing(name, "cpu") or trial["agreement"]["other_class"] == 0
    page = Page(report(str(out)))
    page.assert_self_contained()
    assert len(page.alts) > 10
    shutil.rmtree(out)
