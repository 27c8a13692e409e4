"""Archives become predictions, each tile exactly once, and a run that was begun is finished by the same command."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest

import tilefleet
from cluster.records import read_status
from configs.errors import TilefleetError, UsageError
from inference import classify as driver
from inference.classify import ClassifyConfig, classify
from inference.forward import ENGINES
from inference.ledger import SUCCESS, Totals
from inference.plan import open_plan
from inference.sink import read_predictions
from tests.archives import CLASSES, jpeg, parts, save_model, tar_bytes, tile_files, write_tar
from tests.runs import ROOT

CHUNKS = 34
SMALL = ClassifyConfig(tiles_per_chunk=10, workers=1, engine="torch")
FINISHED = """
import sys
from inference.classify import ClassifyConfig, classify
bundle, archives, out = sys.argv[1:]
print(classify(bundle, [archives], out, ClassifyConfig(tiles_per_chunk=10, engine="torch")).tiles)
print(*{"ray", "torch"} & sys.modules.keys())
"""
Run = tuple[Path, Totals, list[tuple[str, int, int]]]


def state(out: Path) -> str:
    status = read_status(out)
    assert status is not None
    return status.state


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model") / "bundle")


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars: a whole one, one with tiles that cannot be used, one that is cut inside its last tile."""
    folder = tmp_path_factory.mktemp("archives")
    write_tar(folder / "a.tar", tile_files(300))
    bad = [("bad/empty.jpg", b""), ("bad/text.jpg", b"no image"), ("../bad/up.jpg", jpeg(1))]
    good = tile_files(17, first=300)
    write_tar(folder / "b.tar", [*good[:8], *bad, *good[8:]])
    cut = write_tar(folder / "c.tar", tile_files(15, first=320))
    with tarfile.open(cut) as tar:
        last = tar.getmembers()[-1]
    os.truncate(cut, last.offset_data + 100)
    return folder


@pytest.fixture(scope="module")
def run(ray_session: None, model: str, archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One uninterrupted run over the three archives with two workers: its folder, totals and progress."""
    out = tmp_path_factory.mktemp("run") / "out"
    seen: list[tuple[str, int, int]] = []
    config = SMALL.model_copy(update={"workers": 2})
    totals = classify(model, [str(archives)], str(out), config, lambda *step: seen.append(step))
    return out, totals, seen


@pytest.fixture
def unfinished(run: Run, tmp_path: Path) -> Path:
    """A copy of the run in which the first chunk of ``a.tar`` and one of ``b.tar`` are not done."""
    out = shutil.copytree(run[0], tmp_path / "unfinished")
    for name in (SUCCESS, "predictions/part-00000000.parquet", "predictions/part-00000031.parquet"):
        (out / name).unlink()
    return out


@pytest.mark.ray
def test_every_tile_is_one_row(run: Run, archives: Path) -> None:
    out, totals, seen = run
    rows = read_predictions(str(out)).to_pylist()
    assert [row["tile_id"] for row in rows if row["archive"].endswith("a.tar")] == [f"t/{n}" for n in range(300)]
    assert len({(row["archive"], row["tile_id"]) for row in rows}) == len(rows) == 335
    failed = {row["tile_id"]: row["error"].split(":")[0] for row in rows if row["error"]}
    assert failed.keys() == {"bad/empty", "bad/text", "../bad/up", "t/334"}
    assert failed["t/334"].startswith("cut short")
    assert totals.tiles == 335
    assert (totals.classified, totals.errors, totals.errors_by_stage) == (331, 4, {"read": 2, "decode": 2})
    assert list(totals.tiles_by_class) == CLASSES
    assert sum(totals.tiles_by_class.values()) == 331
    assert [bad.archive for bad in totals.bad_archives] == [str(archives / "c.tar")]
    assert "cut short" in totals.bad_archives[0].reason
    assert (totals.chunks, totals.engine) == (CHUNKS, "torch")
    assert seen[:3] == [("plan", 1, 3), ("plan", 2, 3), ("plan", 3, 3)]
    assert seen[3] == ("classify", 0, 335)
    assert seen[-1] == ("classify", 335, 335)


@pytest.mark.ray
def test_the_records_of_a_run_tell_how_it_went(run: Run) -> None:
    out, totals, _ = run
    written = (out / SUCCESS).read_bytes()
    assert Totals.model_validate_json(written) == totals
    assert json.loads(written)["bad_archives"][0].keys() == {"archive", "reason"}
    status = read_status(out)
    assert status is not None
    assert (status.kind, status.state, status.workers) == ("classify", "done", 2)
    assert status.planned_tiles == status.done_tiles == 335
    assert status.failed_by_stage == {"read": 2, "decode": 2}
    assert status.seconds_by_stage.keys() == {"read", "decode", "forward", "write"}
    assert status.tiles_by_class == totals.tiles_by_class


@pytest.mark.ray
def test_a_finished_run_answers_at_once_and_opens_nothing(run: Run, model: str, archives: Path, tmp_path: Path) -> None:
    out, totals, _ = run
    hidden = archives.rename(tmp_path / "hidden")
    try:
        began = time.monotonic()
        assert classify(model, [str(archives)], str(out), SMALL) == totals
        assert time.monotonic() - began < 1
        command = [sys.executable, "-c", FINISHED, model, str(archives), str(out)]
        alone = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    finally:
        hidden.rename(archives)
    assert alone.stdout.splitlines() == ["335", ""]  # neither is imported


@pytest.mark.ray
def test_a_folder_with_another_run_is_refused(run: Run, model: str, archives: Path, tmp_path: Path) -> None:
    out, _, _ = run
    with pytest.raises(UsageError, match=r"another run \(other bundle_digest\)"):
        classify(save_model(tmp_path / "other", seed=1), [str(archives)], str(out), SMALL)
    with pytest.raises(UsageError, match=r"another run \(other archives\)"):
        classify(model, [str(archives / "a.tar")], str(out), SMALL)
    with pytest.raises(UsageError, match=r"another run \(other tiles_per_chunk, engine\)"):
        classify(model, [str(archives)], str(out), ClassifyConfig(engine="openvino"))


@pytest.mark.ray
def test_a_resumed_run_opens_only_archives_that_are_not_done(
    run: Run, model: str, archives: Path, unfinished: Path, tmp_path: Path
) -> None:
    whole, totals, _ = run
    kept = parts(unfinished)
    (archives / "c.tar").rename(tmp_path / "c.tar")
    try:
        again = classify(model, [str(archives)], str(unfinished), SMALL)
    finally:
        (tmp_path / "c.tar").rename(archives / "c.tar")
    changes = {"seconds": again.seconds, "tiles_per_second": again.tiles_per_second}
    assert again == totals.model_copy(update=changes)
    assert parts(unfinished).items() >= kept.items()
    assert read_predictions(str(unfinished)).equals(read_predictions(str(whole)))


@pytest.mark.ray
def test_an_archive_changed_since_the_plan_stops_the_run_in_one_line(
    unfinished: Path, model: str, archives: Path
) -> None:
    content = (archives / "a.tar").read_bytes()
    (archives / "a.tar").write_bytes(content + b"more")
    try:
        with pytest.raises(TilefleetError, match=r"a\.tar: changed since it was planned") as caught:
            classify(model, [str(archives)], str(unfinished), SMALL)
    finally:
        (archives / "a.tar").write_bytes(content)
    assert "\n" not in str(caught.value)
    status = read_status(unfinished)
    assert status is not None
    assert (status.state, status.error) == ("failed", str(caught.value))


@pytest.mark.ray
def test_archives_of_all_kinds_make_one_table(ray_session: None, model: str, tmp_path: Path) -> None:
    files = tile_files(12)
    source = tmp_path / "source"
    source.mkdir()
    write_tar(source / "plain.tar", files)
    (source / "gzip.tar.gz").write_bytes(gzip.compress(tar_bytes(files)))
    (source / "zstd.tar.zst").write_bytes(pa.compress(tar_bytes(files), "zstd", asbytes=True))
    with zipfile.ZipFile(source / "z.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in files:
            file.writestr(name, data)
    for name, data in files:
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    (tmp_path / "list.txt").write_text("".join(f"folder/{name}\n" for name, _ in files))
    config = SMALL.model_copy(update={"workers": 4, "probabilities": True})
    places = [str(tmp_path / name) for name in ("source/*", "folder", "list.txt")]
    totals = classify(model, places, str(tmp_path / "out"), config)
    rows = read_predictions(str(tmp_path / "out"))
    assert (totals.tiles, totals.classified, totals.bad_archives) == (72, 72, [])
    by_archive: dict[str, dict[str, object]] = {}
    for row in rows.to_pylist():
        by_archive.setdefault(row.pop("archive"), {})[row.pop("tile_id").removeprefix("folder/")] = row
    assert len(by_archive) == 6
    first, *others = by_archive.values()
    assert first.keys() == {name.removesuffix(".jpg") for name, _ in files}
    assert all(other == first for other in others)


@pytest.mark.ray
def test_damage_in_a_compressed_tar_is_found_by_reading_it_and_fails_the_command(
    ray_session: None, model: str, tmp_path: Path
) -> None:
    whole = gzip.compress(tar_bytes(tile_files(90)), 1)
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    command = (model, [str(tmp_path / "cut.tar.gz")], str(tmp_path / "out"), ["engine=torch"])
    for _ in range(2):  # a finished run says it again
        with pytest.raises(TilefleetError, match="1 archives are bad; what could be read is classified") as caught:
            tilefleet._classify(*command)
        assert caught.value.exit_code == 1
    totals = Totals.model_validate_json((tmp_path / "out" / SUCCESS).read_bytes())
    assert [bad.archive for bad in totals.bad_archives] == command[1]
    assert "cut short" in totals.bad_archives[0].reason
    rows = read_predictions(command[2])
    assert 20 < totals.classified < 50
    assert rows["tile_id"].to_pylist() == [f"t/{number}" for number in range(totals.tiles)]
    assert rows["error"].null_count == totals.classified >= totals.tiles - 1


@pytest.mark.ray
def test_too_many_bad_tiles_stop_the_run_and_a_higher_limit_finishes_it(
    run: Run, model: str, archives: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    strict = SMALL.model_copy(update={"max_error_share": 0.05})
    place = [str(archives / "b.tar")]
    with pytest.raises(TilefleetError, match=r"[23] of 20 tiles .*more than max_error_share=0\.05") as stop:
        classify(model, place, str(out), strict)
    assert (stop.value.exit_code, state(out)) == (1, "failed")
    kept = parts(out)
    assert kept
    with pytest.raises(TilefleetError, match="tiles are bad already"):
        classify(model, place, str(out), strict)
    totals = classify(model, place, str(out), strict.model_copy(update={"max_error_share": 0.5}))
    assert (totals.tiles, totals.errors, state(out)) == (20, 3, "done")
    assert parts(out).items() >= kept.items()


@pytest.mark.ray
def test_the_engine_is_chosen_once_and_kept(
    run: Run, model: str, archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, auto = tmp_path / "out", SMALL.model_copy(update={"engine": "auto"})
    place = [str(archives / "b.tar")]
    first = classify(model, place, str(out), auto)
    saved = open_plan(str(out))
    assert saved is not None
    assert saved.terms.engine == first.engine != "auto"
    assert {"torch", first.engine} <= saved.terms.trials.keys()
    rows = read_predictions(str(out))
    (out / SUCCESS).unlink()
    (out / "predictions" / "part-00000000.parquet").unlink()
    monkeypatch.setattr(driver, "_decide", None)
    assert classify(model, place, str(out), auto).engine == first.engine
    assert read_predictions(str(out)).equals(rows)


@pytest.mark.ray
def test_settings_that_the_machine_cannot_meet_are_one_line(
    ray_session: None, model: str, archives: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="workers=64: the cluster has 4 CPUs"):
        classify(model, [str(archives)], str(tmp_path / "many"), ClassifyConfig(workers=64, engine="torch"))
    with pytest.raises(UsageError, match=r"engine compiled-bf16: there is none on cpu; there are .*torch") as caught:
        classify(model, [str(archives)], str(tmp_path / "engine"), ClassifyConfig(engine="compiled-bf16"))
    assert "\n" not in str(caught.value)


def test_archives_without_any_tile_are_an_error_that_says_why(model: str, tmp_path: Path) -> None:
    (tmp_path / "empty.tar").write_bytes(b"")
    write_tar(tmp_path / "text.tar", [("readme.txt", b"no tile")])
    for _ in range(2):  # what the first try leaves does not stand in the way of the second
        with pytest.raises(TilefleetError, match=r"empty\.tar: archive is empty .* 1 more"):
            classify(model, [str(tmp_path)], str(tmp_path / "out"))
        assert state(tmp_path / "out") == "failed"


def test_a_folder_that_holds_something_else_is_refused(model: str, archives: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="holds something else"):
        classify(model, [str(archives)], str(tmp_path))
    with pytest.raises(UsageError, match="is a file"):
        classify(model, [str(archives)], str(tmp_path / "thesis.txt"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_wrong_input_is_named_before_anything_is_written(model: str, archives: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="nowhere: no such bundle"):
        classify(str(tmp_path / "nowhere"), [str(archives)], str(out))
    with pytest.raises(UsageError, match=r"nowhere\.tar: no such file"):
        classify(model, [str(tmp_path / "nowhere.tar")], str(out))
    for setting in ("speed=fast", "engine=nonsense"):
        with pytest.raises(UsageError, match=setting.partition("=")[0]) as caught:
            tilefleet._classify(model, [str(archives)], str(out), [setting])
        assert "\n" not in str(caught.value)
    assert not out.exists()


def test_every_engine_can_be_asked_for() -> None:
    known = ClassifyConfig.model_json_schema()["properties"]["engine"]["enum"]
    assert set(known) == {"auto", *(name for names in ENGINES.values() for name in names)}
