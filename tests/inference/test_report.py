"""The pages about runs and predictions: complete, self-contained, and safe with any names in the data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from cluster import storage
from cluster.records import StatusWriter, append_metrics
from configs.errors import TilefleetError, UsageError
from configs.schema import Recipe
from inference.engines import Agreement, Trial
from inference.report import report
from tests.archives import TERMS
from tests.page import Page
from tests.predictions import CLASSES, finish, make_archive, plan_of, png, predictions, write_part
from training import models
from training.bundle import BundleInfo, load_bundle, save_bundle, save_calibration
from training.evaluate import evaluate
from training.judge import Reference
from training.pack import pack
from training.plots import plot_curves


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_run(folder)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> str:
    """A copy of the trained run and its shards, free to be damaged."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    evaluation = tmp_path / "runs" / "first" / "evaluation" / "evaluation.json"
    evaluation.write_text(evaluation.read_text().replace(str(trained), str(tmp_path)))
    return str(tmp_path / "runs" / "first")


def test_a_page_about_predictions_counts_shows_and_names(tmp_path: Path) -> None:
    out = predictions(tmp_path, finished=True)

    page = Page(report(out))

    assert (tmp_path / "out" / "report.html").exists()
    page.assert_self_contained()
    for words in (
        "out done",
        "tiles 42 classified 40",
        "unknown 5 12.5%",
        "errors 2 4.76%",
        "tiles a second 1,234",
        "Lake <i> 14 35.0%",
        "engine torch-f32",
        "not an image 1 tile",
        "image file over the limit 1 tile",
        "image file over the limit: 99 bytes, 9 allowed",
        "torn.tar archive is empty",
        "forward 3.0 s",
        "Most of it, 66.7%, is forward",
    ):
        assert words in page.text
    assert "Not finished" not in page.text
    assert len(page.alts) == 24 + 5 + 3 * (6 + 6)
    assert page.alts[0] == "Tile a/tile-0: Field"


def test_an_unfinished_run_says_how_far_it_is_and_how_to_go_on(tmp_path: Path) -> None:
    out = predictions(tmp_path, finished=False)

    page = Page(report(out, str(tmp_path / "page.html")))

    page.assert_self_contained()
    assert "out failed" in page.text
    assert "Not finished: 20 of 42 tiles are done (47.6%), in 1 of 3 chunks" in page.text
    assert "the disk is full" in page.text
    assert not (tmp_path / "out" / "report.html").exists()


def test_a_run_that_has_only_a_plan_has_a_page(tmp_path: Path) -> None:
    out = predictions(tmp_path, finished=False)
    (tmp_path / "out" / "predictions" / "part-00000000.parquet").unlink()
    (tmp_path / "out" / "status.json").unlink()

    page = Page(report(out))

    assert "Not finished: 0 of 42 tiles are done" in page.text
    assert "No tile is classified yet" in page.text


def test_archives_that_are_gone_are_named_instead_of_shown(tmp_path: Path) -> None:
    out = predictions(tmp_path, finished=True)
    (tmp_path / "archives" / "a.tar").unlink()

    page = Page(report(out))

    assert page.alts == []
    assert "a.tar: cannot be read" in page.text


def test_parts_that_were_taken_away_are_noticed(tmp_path: Path) -> None:
    out = predictions(tmp_path, finished=True)
    (tmp_path / "out" / "predictions" / "part-00000001.parquet").unlink()

    assert "The parts hold 22 tiles, but 42 were classified" in Page(report(out)).text


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    out = predictions(tmp_path, finished=True)
    part = tmp_path / "out" / "predictions" / "part-00000001.parquet"
    part.write_bytes(part.read_bytes()[:-20])

    with pytest.raises(TilefleetError, match=r"part-00000001\.parquet: damaged"):
        report(out)


def test_tiles_of_a_compressed_tar_are_planned_once_they_are_read(tmp_path: Path) -> None:
    archive = make_archive(tmp_path / "in", "tar.gz", {"a.png": png(1), "b.png": png(2)})
    out = str(tmp_path / "out")
    plan = plan_of(out, [archive])
    assert "0 of 0 tiles are done (0.0%), in 0 of 1 chunks" in (text := Page(report(out)).text)
    assert "the tiles of 1 compressed archive" in text
    [chunk] = plan
    write_part(out, chunk, ["a", "b"], [(0, 0.5, False), (1, 0.6, False)], damage="cut short")
    finish(out)

    page = Page(report(out))

    assert "Not finished" not in page.text
    assert "a.tar.gz cut short" in page.text
    assert len(page.alts) == 2 + 4


def test_what_was_measured_of_each_engine_is_shown(tmp_path: Path) -> None:
    agreement = Agreement(
        tiles=512, other_class=9, other_class_decided=3, other_unknown=0, largest_difference=0.5, finite=True
    )
    trials = {
        "torch-f32": Trial(tiles_per_second=1612.3),
        "openvino-f32": Trial(reason="OpenVINO is not installed"),
        "compiled-bf16": Trial(tiles_per_second=5610.0, agreement=agreement, reason="differs from <torch-f32>"),
    }
    terms = TERMS.model_copy(update={"trials": {name: trial.model_dump() for name, trial in trials.items()}})
    plan_of(str(tmp_path / "out"), [make_archive(tmp_path / "in", "zip", {"a.png": png(1)})], terms=terms)

    text = Page(report(str(tmp_path / "out"))).text

    for words in (
        "compiled-bf16 5,610 9 of 512 differs from <torch-f32>",
        "torch-f32 1,612 – taken",
        "openvino-f32 – – OpenVINO is not installed",
    ):
        assert words in text


def test_a_run_without_news_is_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = predictions(tmp_path, finished=False)
    status = Path(out, "status.json")
    running = json.loads(status.read_text()) | {"state": "running", "error": None}
    status.write_text(json.dumps(running))
    assert "out running" in Page(report(out)).text

    status.write_text(json.dumps(running | {"updated": running["updated"] - 600}))

    page = Page(report(out))
    assert "out stopped" in page.text
    assert "its driver is most likely dead" in page.text


def test_a_run_that_is_not_planned_says_so(tmp_path: Path) -> None:
    status = StatusWriter(tmp_path, "classify")
    with pytest.raises(TilefleetError, match="not planned yet; try again"):
        report(str(tmp_path))
    status.finish("failed", "a.tar: archive is empty")
    with pytest.raises(TilefleetError, match=r"not planned yet; failed: a\.tar: archive is empty"):
        report(str(tmp_path))


def test_a_page_about_a_run_shows_scores_curves_and_examples(run: str) -> None:
    page = Page(report(run))

    page.assert_self_contained()
    for words in (
        "first done",
        "test accuracy 33.33% 6 tiles",
        "best val accuracy 75.00% epoch 2",
        "model cnn 16 px, 3 classes",
        "epochs 2 of 3",
        "waited for data 18.8%",
        "1 1.0000 – 1.0000 50.00% – – 12.5% 4.0 s",
        "Lake <i> 33.3% 100.0% 50.0% 2",
        "Expected calibration error",
        "label_smoothing: 0.1",
    ):
        assert words in page.text
    assert sum(alt.endswith("taken for Lake <i>") for alt in page.alts) == 4
    for plot in ("Loss, accuracy, learning rate", "Confusion matrix", "Accuracy over confidence"):
        assert sum(alt.startswith(plot) for alt in page.alts) == 1
    assert len(page.alts) == 3 + 4 + 1
    assert "Unknown images" not in page.text


def test_a_page_shows_predictions_and_foreign_images_where_there_are_some(run: str) -> None:
    plot_curves([], f"{run}/predictions.png")
    shards = str(Path(run, "../../shards"))
    judge, info = load_bundle(f"{run}/bundle")
    width = judge.head.in_features
    same = Reference(torch.zeros(width), torch.zeros(width, width), torch.zeros(1, width))  # all at a distance of 0
    save_calibration(f"{run}/bundle", info, 1.0, same, 1.0)
    evaluate(f"{run}/bundle", shards, device="cpu", foreign=str(Path(run, "../../raw")))

    page = Page(report(run))

    page.assert_self_contained()
    assert sum(alt.startswith("The same tiles twice") for alt in page.alts) == 1
    assert sum(alt.startswith("Histogram of how far") for alt in page.alts) == 1
    assert "Of 12 images of" in page.text
    assert "0.0% are flagged as unknown, and of the test tiles 0.00%" in page.text
    assert "in 50.00% of all pairs (AUROC)" in page.text


def test_shards_that_are_gone_or_packed_anew_are_said_so(run: str) -> None:
    index = Path(run, "../../shards") / "index.json"

    index.write_text(index.read_text() + "\n")
    assert "packed anew since the evaluation" in Page(report(run)).text
    index.unlink()
    page = Page(report(run))
    assert "shards are gone or changed" in page.text
    assert len(page.alts) == 3


def test_a_run_that_has_just_started_has_a_page(tmp_path: Path) -> None:
    write_config(tmp_path / "run")

    page = Page(report(str(tmp_path / "run")))

    page.assert_self_contained()
    assert "not started" in page.text
    assert "No epoch is finished yet" in page.text
    assert "Not evaluated yet" in page.text


@pytest.mark.parametrize("name", ["status.json", "metrics.jsonl", "config.yaml", "evaluation/evaluation.json"])
def test_a_damaged_record_is_an_error_of_one_line(run: str, name: str) -> None:
    Path(run, name).write_text('{"half": [')

    with pytest.raises(TilefleetError, match="first: a record in it is damaged") as caught:
        report(run)
    assert "\n" not in str(caught.value)


@pytest.mark.process
def test_pages_on_object_storage_say_what_those_on_a_disk_say(run: str, bucket: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    out = predictions(made, finished=True)
    evaluation = Path(run, "evaluation", "evaluation.json")
    pages = [Page(report(out)), Page(report(run))]
    evaluation.write_text(evaluation.read_text().replace(str(tmp_path), bucket))
    for file in tmp_path.rglob("*"):
        if file.is_file():
            storage.write_bytes(f"{bucket}/{file.relative_to(tmp_path)}", file.read_bytes())
    far = [report(location.replace(str(tmp_path), bucket)) for location in (out, run)]
    assert far == [f"{bucket}/made/out/report.html", f"{bucket}/runs/first/report.html"]
    for there, here in zip(far, pages, strict=True):
        copy = tmp_path / "copy.html"
        copy.write_bytes(storage.read_bytes(there))
        page = Page(str(copy))
        assert page.text.replace(bucket, str(tmp_path)) == here.text
        assert page.alts == here.alts != []


def test_what_is_neither_run_nor_predictions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        report(str(tmp_path / "missing"))
    with pytest.raises(UsageError, match="neither a run"):
        report(str(tmp_path))
    write_config(tmp_path / "run")
    with pytest.raises(UsageError, match="is a folder; name the HTML file"):
        report(str(tmp_path / "run"), str(tmp_path))


def train_run(folder: Path) -> None:
    """A run whose model takes every tile for class 1, evaluated on two tiles of each of the three classes."""
    for number, name in enumerate(CLASSES):
        (folder / "raw" / name).mkdir(parents=True)
        for tile in range(4):
            (folder / "raw" / name / f"{tile}.png").write_bytes(png(10 * number + tile))
    pack(str(folder / "raw"), str(folder / "shards"), split=(50, 0, 50))
    run = write_config(folder / "runs" / "first")
    status = StatusWriter(run, "train", planned_tiles=12)
    for epoch, accuracy in ((1, 0.5), (2, 0.75)):
        times = {"seconds": 4.0, "seconds_waiting": 0.5 * epoch}
        append_metrics(run, {"epoch": epoch, "train_loss": 1.0, "val_loss": 1.0, "val_accuracy": accuracy} | times)
    plot_curves([], f"{run}/curves.png")
    model = models.build("cnn", 3, 16)
    head = list(model.children())[-1]
    assert isinstance(head, torch.nn.Linear)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.0, 2.0, 0.0]))
    info = BundleInfo(architecture="cnn", classes=CLASSES, tile_size=16, mean=[0.5] * 3, std=[0.2] * 3)
    save_bundle(f"{run}/bundle", model, info)
    evaluate(f"{run}/bundle", str(folder / "shards"), device="cpu")
    status.finish("done")


def write_config(run: Path) -> str:
    run.mkdir(parents=True)
    recipe = Recipe.model_validate(
        {
            "name": "first",
            "shards": "shards",
            "model": {"name": "cnn"},
            "epochs": 3,
            "batch_size": 4,
            "label_smoothing": 0.1,
        }
    )
    (run / "config.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return str(run)
