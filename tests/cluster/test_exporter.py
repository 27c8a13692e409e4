"""The exporter over real statuses and a real server: what a scrape says, and that nothing breaks or slows one."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import need
from prometheus_client.parser import text_string_to_metric_families

from cluster.exporter import serving
from cluster.metrics import MOST_CLASSES
from cluster.records import StatusWriter, mark_failed
from configs.errors import TilefleetError, UsageError
from tests.runs import ROOT
from tests.scrapes import CLASSIFIED, TOKEN, TRAINED, job_api, of, scrape, status, text

DRIVER = """
import sys, time
from cluster.records import StatusWriter
status = StatusWriter(sys.argv[1], "classify", planned_tiles=50)
status.update(force=True, done_tiles=20)
print("working", flush=True)
time.sleep(600)
"""

SERVE = "import sys; from cluster.exporter import serve; serve([sys.argv[1]], port=0)"


def test_a_classification_shows_all_that_is_known_of_it(tmp_path: Path) -> None:
    began = time.time()
    status(tmp_path / "harbour", "classify", **CLASSIFIED)
    with serving([str(tmp_path)], port=0) as url:
        found = of(scrape(url), "harbour")
    for name in ("started", "updated", "progress"):
        assert began <= found.pop(f"run_{name}_timestamp_seconds") <= time.time()
    buckets = {f"prediction_confidence_bucket {n / 10}": 0 if n < 3 else 5 for n in range(1, 9)}
    assert found == buckets | {
        "run_state running": 1,
        "tiles_planned": 1000,
        "tiles_done_total": 300,
        "tiles_failed_total read": 2,
        "tiles_failed_total decode": 3,
        "error_ratio_limit": 0.05,
        "stage_seconds_total read": 1.5,
        "stage_seconds_total forward": 20,
        "workers": 2,
        "workers_wanted": 3,
        "predictions_total Crop": 200,
        "predictions_total Town": 95,
        "predictions_unknown_total": 7,
        "prediction_confidence_bucket 0.9": 95,
        "prediction_confidence_bucket 1.0": 295,
        "prediction_confidence_bucket +Inf": 295,
        "prediction_confidence_count": 295,
        "prediction_confidence_sum": 280.5,
        "expected_confidence": 0.97,
        "expected_unknown_ratio": 0.01,
    }


def test_a_training_shows_all_that_is_known_of_it(tmp_path: Path) -> None:
    status(tmp_path / "eurosat", "train", **TRAINED)
    with serving([str(tmp_path)], port=0) as url:
        found = of(scrape(url), "eurosat")
    assert {name: value for name, value in found.items() if "timestamp" not in name} == {
        "run_state running": 1,
        "tiles_planned": 500,
        "tiles_done_total": 100,
        "stage_seconds_total wait": 1,
        "stage_seconds_total train": 9,
        "stage_seconds_total validate": 0.5,
        "workers": 2,
        "workers_wanted": 2,
        "training_loss": 0.25,
        "training_accuracy": 0.9,
        "training_epoch": 2,
        "training_epochs": 10,
        "training_step": 8,
    }


def test_a_loss_that_is_not_finite_is_shown_as_it_is(tmp_path: Path) -> None:
    status(tmp_path / "wild", "train", loss=float("nan"))
    mark_failed(tmp_path / "wild", "loss is not finite")
    with serving([str(tmp_path)], port=0) as url:
        found = of(scrape(url), "wild")
    assert found["training_loss"] != found["training_loss"]
    assert found["run_state failed"] == 1


def test_a_run_whose_driver_was_killed_still_shows_how_far_it_came(tmp_path: Path) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "killed")], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert driver.stdout
    assert driver.stdout.readline() == b"working\n"
    driver.kill()
    driver.wait()
    silent = time.time()
    with serving([str(tmp_path)], port=0) as url:
        found = of(scrape(url), "killed")
    assert (found["run_state running"], found["tiles_done_total"], found["tiles_planned"]) == (1, 20, 50)
    assert found["run_updated_timestamp_seconds"] <= silent


def test_counters_do_not_fall_when_a_run_is_resumed(tmp_path: Path) -> None:
    status(tmp_path / "run", "classify", "failed", **CLASSIFIED)
    with serving([str(tmp_path)], port=0) as url:
        before = of(scrape(url), "run")
        again = StatusWriter(tmp_path / "run", "classify")
        started = of(scrape(url), "run")
        again.update(force=True, **CLASSIFIED | {"done_tiles": 310, "tiles_by_class": {"Crop": 210, "Town": 95}})
        after = of(scrape(url), "run")
    grows = [name for name in before if "_total" in name or name.startswith("prediction_confidence")]
    assert len(grows) > 15
    assert all(before[name] <= started[name] <= after[name] for name in grows)
    assert after["tiles_done_total"] == 310


def test_more_classes_than_labels_are_other_and_other_only_grows(tmp_path: Path) -> None:
    counts = {f"class {number}": number for number in range(3 * MOST_CLASSES)}
    writer = status(tmp_path / "many", "classify", tiles_by_class=counts)
    with serving([str(tmp_path)], port=0) as url:
        first = {name: n for name, n in of(scrape(url), "many").items() if name.startswith("predictions_total")}
        assert len(first) == MOST_CLASSES + 1
        assert sum(first.values()) == sum(counts.values())
        writer.update(force=True, tiles_by_class=counts | {"class 1": 10_000})
        second = of(scrape(url), "many")
        assert all(second[name] >= count for name, count in first.items())
        assert second["predictions_total other"] == first["predictions_total other"] + 9_999


def test_runs_that_ended_long_ago_have_few_metrics(tmp_path: Path) -> None:
    status(tmp_path / "ended", "classify", "done", **CLASSIFIED)
    with serving([str(tmp_path)], port=0, keep_hours=24) as url:
        kept = of(scrape(url), "ended")
        assert kept["predictions_total Crop"] == 200
        assert "workers" not in kept
    with serving([str(tmp_path)], port=0, keep_hours=0) as url:
        assert of(scrape(url), "ended").keys() == {
            "run_state done",
            "run_started_timestamp_seconds",
            "run_updated_timestamp_seconds",
        }


def test_it_listens_on_loopback_says_where_and_ends_on_an_interrupt(tmp_path: Path) -> None:
    status(tmp_path / "run", "train")
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stdout
    url = server.stdout.readline().strip()
    try:
        assert url.startswith("http://127.0.0.1:")
        assert ("tiles_planned", ("train", "run")) in scrape(url)
        port = int(url.rpartition(":")[2].partition("/")[0])
        with pytest.raises(UsageError, match=rf"127\.0\.0\.1:{port}: cannot be listened on"), serving([], port=port):
            pass
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(10) == 0
    assert server.communicate() == ("", "")


def test_promtool_finds_nothing_to_say_of_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need(shutil.which("promtool"), "promtool is not installed; it comes with prometheus")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    status(tmp_path / "harbour", "classify", **CLASSIFIED)
    status(tmp_path / "eurosat", "train", **TRAINED)
    with job_api([]) as (address, _), serving([str(tmp_path)], port=0, address=address) as url:
        scraped = text(url)
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=scraped, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    families = {family.name: family for family in text_string_to_metric_families(scraped)}
    assert all(family.documentation.endswith(".") and family.samples for family in families.values())
    info = families["tilefleet_build_info"].samples[0]
    assert info.labels.keys() == {"version", "python", "ray", "torch"}


def test_a_training_by_the_loop_tells_where_its_time_goes(small_recipe: dict[str, Any]) -> None:
    import torch

    from configs.schema import Recipe
    from training.loop import Trainer

    run = Recipe.model_validate(small_recipe)
    Trainer(run, torch.device("cpu")).fit()
    wild = Recipe.model_validate(
        small_recipe | {"name": "wild", "optimizer": {"name": "sgd", "learning_rate": 1e20}, "schedule": {"warmup": 0}}
    )
    with pytest.raises(TilefleetError, match="loss is not finite"):
        Trainer(wild, torch.device("cpu")).fit()
    with serving([run.runs], port=0) as url:
        samples = scrape(url)
    found, broken = of(samples, "small"), of(samples, "wild")
    seconds = {stage: found[f"stage_seconds_total {stage}"] for stage in ("wait", "train", "validate")}
    assert all(value > 0 for value in seconds.values())
    assert sum(seconds.values()) < found["run_updated_timestamp_seconds"] - found["run_started_timestamp_seconds"]
    assert found["run_state done"] == 1
    assert found["tiles_done_total"] == found["tiles_planned"]
    assert (found["training_epoch"], found["training_epochs"]) == (2, 2)
    assert 0 < found["training_accuracy"] <= 1
    assert not abs(broken["training_loss"]) < float("inf")


@pytest.mark.ray
def test_a_classification_tells_what_the_model_says_and_what_it_said_in_validation(
    ray_session: None, calibrated: str, shards: Path, tmp_path: Path
) -> None:
    from inference.classify import ClassifyConfig, classify
    from training.bundle import read_info

    out, config = tmp_path / "runs" / "fields", ClassifyConfig(engine="torch", workers=1, max_error_share=0.5)
    totals = classify(calibrated, [str(shards / "test"), str(shards / "val")], str(out), config)
    with serving([str(tmp_path / "runs")], port=0) as url:
        found = of(scrape(url), "fields")
        (out / "_SUCCESS.json").unlink()
        next(iter(sorted((out / "predictions").iterdir()))).unlink()
        classify(calibrated, [str(shards / "test"), str(shards / "val")], str(out), config)
        again = of(scrape(url), "fields")
    names = [name for name in found if "total" in name or "confidence" in name]
    assert {name: again[name] for name in names if "seconds" not in name} == pytest.approx(
        {name: found[name] for name in names if "seconds" not in name}
    )
    assert found["tiles_done_total"] == found["tiles_planned"] == totals.tiles
    said = {
        name.removeprefix("predictions_total "): count for name, count in found.items() if "predictions_total" in name
    }
    assert said == totals.tiles_by_class
    assert found["predictions_unknown_total"] == totals.unknown
    assert found["prediction_confidence_count"] == totals.classified
    assert 0 < found["prediction_confidence_sum"] <= totals.classified
    metrics = read_info(calibrated).metrics
    assert found["expected_confidence"] == pytest.approx(metrics["val_confidence"])
    assert found["expected_unknown_ratio"] == pytest.approx(metrics["val_unknown"])
    assert found["error_ratio_limit"] == 0.5
