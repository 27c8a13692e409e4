"""The front door: each kind of bad input gets one clear line and the right exit code, and nothing is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import tilefleet

Run = Callable[..., tuple[int, str, str]]
"""Arguments of the command line -> exit code, stdout, stderr."""

SmallDisk = Callable[[int], Path]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tilefleet", *map(str, arguments)])
        capsys.readouterr()
        try:
            tilefleet.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def raw(shards: Path, tmp_path: Path) -> Path:
    """A copy of a few raw tiles in class folders."""
    target = tmp_path / "raw"
    for folder in sorted((shards.parent / "raw").iterdir())[:3]:
        (target / folder.name).mkdir(parents=True)
        for tile in sorted(folder.iterdir())[:8]:
            shutil.copy(tile, target / folder.name)
    return target


@pytest.fixture
def recipe(shards: Path, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"name: r\nshards: {shards}\nruns: {tmp_path}/runs\nmodel: {{name: cnn}}\nepochs: 1\nbatch_size: 8\n"
    )
    return file


def one_line(text: str, *words: object) -> None:
    """The last line names everything in ``words``; there is no stack trace."""
    assert "Traceback" not in text
    last = text.strip().splitlines()[-1]
    for word in words:
        assert str(word) in last, f"{word!r} not in {last!r}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["pack", "MISSING", "out"],
        ["verify", "MISSING"],
        ["show", "MISSING"],
        ["train", "MISSING"],
        ["evaluate", "MISSING", "MISSING"],
        ["predict", "MISSING", "MISSING"],
        ["classify", "BUNDLE", "MISSING", "--out", "out"],
        ["predict", "BUNDLE", "MISSING"],
        ["evaluate", "BUNDLE", "MISSING"],
        ["report", "MISSING"],
    ],
    ids=" ".join,
)
def test_no_such_path(run: Run, tmp_path: Path, bundle: Path, arguments: list[str]) -> None:
    places = {"MISSING": tmp_path / "no-such-thing", "BUNDLE": bundle, "out": tmp_path / "out"}
    code, _, err = run(*[places.get(argument, argument) for argument in arguments])
    assert code == 2
    one_line(err, "no-such-thing")
    assert not (tmp_path / "out").exists()


def test_pack_of_an_empty_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, _, err = run("pack", tmp_path / "empty", tmp_path / "out")
    assert code == 1
    one_line(err, tmp_path / "empty")
    assert not (tmp_path / "out").exists()


def test_pack_of_one_class(run: Run, raw: Path, tmp_path: Path) -> None:
    for folder in sorted(raw.iterdir())[1:]:
        shutil.rmtree(folder)
    code, _, err = run("pack", raw, tmp_path / "out")
    assert code == 1
    one_line(err, sorted(raw.iterdir())[0].name)


def test_pack_of_a_zip_cut_short(run: Run, raw: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiles.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for tile in raw.rglob("*.jpg"):
            archive.write(tile, tile.relative_to(raw))
    file.write_bytes(file.read_bytes()[:-200])
    code, _, err = run("pack", file, tmp_path / "out")
    assert code == 1
    one_line(err, file)


@pytest.mark.parametrize("kind", ["cut", "empty", "text"])
def test_pack_names_damaged_images_and_leaves_them_out_on_request(
    run: Run, raw: Path, tmp_path: Path, kind: str
) -> None:
    victim = sorted(raw.rglob("*.jpg"))[3]
    data = victim.read_bytes()
    victim.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"not an image at all"}[kind])
    code, _, err = run("pack", raw, tmp_path / "out")
    assert code == 1
    one_line(err, victim.name, "--skip-damaged")
    assert not (tmp_path / "out").exists()
    code, out, err = run("pack", raw, tmp_path / "out", "--skip-damaged")
    assert code == 0
    assert victim.name in err
    assert "23 tiles of 3 classes" in out


def test_pack_of_two_files_with_one_tile_id(run: Run, raw: Path, tmp_path: Path) -> None:
    tile = sorted(raw.rglob("*.jpg"))[0]
    shutil.copy(tile, tile.with_suffix(".jpeg"))
    code, _, err = run("pack", raw, tmp_path / "out")
    assert code == 1
    one_line(err, tile.name, tile.with_suffix(".jpeg").name)


def test_pack_into_a_folder_that_holds_a_set(run: Run, raw: Path, shards: Path) -> None:
    before = (shards / "index.json").read_bytes()
    code, _, err = run("pack", raw, shards)
    assert code == 2
    one_line(err, shards)
    assert (shards / "index.json").read_bytes() == before


@pytest.mark.parametrize("split", ["80,20", "a,b,c", "0,50,50", "80,10,-10"])
def test_pack_with_a_wrong_split(run: Run, raw: Path, tmp_path: Path, split: str) -> None:
    code, _, err = run("pack", raw, tmp_path / "out", "--split", split)
    assert code == 2
    one_line(err, "--split", split)


def test_pack_and_verify_report_what_they_found(run: Run, raw: Path, tmp_path: Path) -> None:
    (raw / ".hidden.jpg").write_text("x")
    (raw / sorted(raw.iterdir())[1].name / "notes.txt").write_text("x")
    code, out, _ = run("pack", raw, tmp_path / "out", "--split", "50,25,25")
    assert (code, "24 tiles of 3 classes (train 12, val 6, test 6)" in out) == (0, True)
    assert run("verify", tmp_path / "out")[0] == 0
    shard = tmp_path / "out" / "test" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    code, out, _ = run("verify", tmp_path / "out")
    assert code == 1
    assert str(shard) in out


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("epoch=3", ["epoch: unknown key", "epochs"]),
        ("epochs=three", ["epochs:", "integer"]),
        ("batch_size=100000", ["batch_size", "training tiles"]),
        ("model.name=alexnet", ["model.name", "cnn", "vgg16"]),
    ],
)
def test_train_with_a_wrong_recipe(run: Run, recipe: Path, tmp_path: Path, override: str, words: list[str]) -> None:
    code, _, err = run("train", recipe, override)
    assert code == 2
    one_line(err, *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.ray
def test_train_with_more_workers_than_cpus(run: Run, recipe: Path, ray_session: None) -> None:
    code, _, err = run("train", recipe, "workers=8")
    assert code == 2
    one_line(err, "workers: 8", "4 CPUs")


def test_train_into_a_folder_that_holds_another_run(run: Run, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "r").mkdir(parents=True)
    (tmp_path / "runs" / "r" / "config.yaml").write_text(recipe.read_text())
    code, _, err = run("train", recipe)
    assert code == 2
    one_line(err, tmp_path / "runs" / "r", "--resume", "name=")


@pytest.mark.ray
def test_train_on_a_full_disk(run: Run, small_disk: SmallDisk, recipe: Path, ray_session: None) -> None:
    code, _, err = run("train", recipe, f"runs={small_disk(256)}/runs")
    assert code == 1
    one_line(err, "disk is full")


@pytest.mark.parametrize("command", ["evaluate", "predict", "classify"])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_bundle_that_is_changed_or_incomplete(
    run: Run, bundle: Path, shards: Path, tmp_path: Path, command: str, damage: str
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    weights = copy / "model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    if damage == "changed":
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    tile = next((shards.parent / "raw").rglob("*.jpg"))
    rest = {
        "evaluate": [shards, "-o", tmp_path / "out"],
        "predict": [tile],
        "classify": [shards / "test", "--out", tmp_path / "out"],
    }
    code, _, err = run(command, copy, *rest[command])
    assert code == 1
    one_line(err, "model.safetensors")


def test_a_bundle_made_for_other_classes(run: Run, bundle: Path, raw: Path, tmp_path: Path) -> None:
    run("pack", raw, tmp_path / "shards")
    code, _, err = run("evaluate", bundle, tmp_path / "shards", "-o", tmp_path / "out")
    assert code == 1
    one_line(err, "other classes")


def test_evaluate_says_how_well_unknown_works(
    run: Run, calibrated: str, bundle: Path, shards: Path, raw: Path, tmp_path: Path
) -> None:
    code, _, err = run("evaluate", bundle, shards, "--foreign", raw, "-o", tmp_path / "out")
    assert code == 2
    one_line(err, "was not calibrated")
    code, out, _ = run("evaluate", calibrated, shards, "--foreign", raw, "-o", tmp_path / "out")
    assert code == 0
    one_line(out, "unknown: AUROC 0.", "of 24 foreign images")
    code, _, err = run("evaluate", calibrated, shards, "--foreign", tmp_path / "none", "-o", tmp_path / "out")
    assert code == 2
    one_line(err, tmp_path / "none")


def test_runs_and_predictions_are_not_compared(run: Run, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.parquet").touch()
    code, _, err = run("report", tmp_path / "out", tmp_path / "missing")
    assert code == 2
    one_line(err, tmp_path / "out", "predictions", "only runs")


def test_predict_classifies_the_good_and_names_the_bad(run: Run, bundle: Path, shards: Path, tmp_path: Path) -> None:
    good = next((shards.parent / "raw").rglob("*.jpg"))
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(good.read_bytes()[:100])
    code, out, err = run("predict", bundle, good, bad)
    assert code == 1
    assert str(good) in out
    assert f"{bad}: image is cut short" in err


@pytest.mark.parametrize("kind", ["empty", "no images", "garbage"])
def test_an_archive_of_no_use(run: Run, bundle: Path, tmp_path: Path, kind: str) -> None:
    archive = tmp_path / "tiles.tar"
    archive.write_bytes(b"" if kind == "empty" else b"x" * 5000)
    if kind == "no images":
        with tarfile.open(archive, "w") as tar:
            tar.add(__file__, "readme.txt")
    code, _, err = run("classify", bundle, archive, "--out", tmp_path / "out")
    assert code == 1
    one_line(err, archive)


def test_a_folder_that_holds_something_else_is_not_classified_into(
    run: Run, bundle: Path, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    code, _, err = run("classify", bundle, shards / "test", "--out", tmp_path / "out")
    assert code == 2
    one_line(err, tmp_path / "out")


def test_a_wrong_classify_setting(run: Run, bundle: Path, shards: Path, tmp_path: Path) -> None:
    code, _, err = run("classify", bundle, shards / "test", "batchsize=4", "--out", tmp_path / "out")
    assert code == 2
    one_line(err, "batchsize: unknown key; did you mean batch_size?")


@pytest.mark.ray
def test_archives_cut_short_or_with_unsafe_names_lose_nothing(
    run: Run, bundle: Path, shards: Path, tmp_path: Path, ray_session: None
) -> None:
    from inference.sink import read_predictions

    whole = shards / "test" / "shard-000000.tar"
    cut, unsafe = tmp_path / "cut.tar", tmp_path / "unsafe.tar"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    tile = next((shards.parent / "raw").rglob("*.jpg"))
    with tarfile.open(unsafe, "w") as tar:
        for name in ("good.jpg", "../escape.jpg", "/absolute.jpg"):
            info = tar.gettarinfo(tile)
            info.name = name
            with tile.open("rb") as file:
                tar.addfile(info, file)
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    code, _, err = run("classify", bundle, cut, unsafe, "--out", tmp_path / "out")
    assert code == 1
    assert f"{cut}: cut short" in err
    rows = {row["tile_id"]: row["error"] for row in read_predictions(str(tmp_path / "out")).to_pylist()}
    assert rows["good"] is None
    assert "leaves the archive" in rows["../escape"]
    assert "absolute" in rows["/absolute"]
    assert "link" in rows["link"]
    assert sum(error is None for error in rows.values()) > 5
    assert not (tmp_path / "escape.jpg").exists()
    assert run("verify", unsafe)[0] == 1


def test_a_stack_trace_only_with_debug(run: Run, tmp_path: Path) -> None:
    from configs.errors import UsageError

    with pytest.raises(UsageError):
        run("--debug", "verify", tmp_path / "none")


def test_every_command_has_help_that_fits_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run("--help")
    assert code == 0
    alone = [
        "pack",
        "verify",
        "show",
        "train",
        "evaluate",
        "predict",
        "classify",
        "report",
        "demo",
        "bench",
        "exporter",
    ]
    groups = {
        "cluster": ["up", "status", "down"],
        "submit": ["train", "classify"],
        "jobs": ["list", "status", "logs", "stop"],
    }
    assert all(f"  {name} " in out for name in [*alone, *groups])
    commands = [[name] for name in [*alone, *groups]] + [[name, sub] for name in groups for sub in groups[name]]
    for command in commands:
        code, text, _ = run(*command, "--help")
        assert code == 0
        assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_complete_commands(shell: str) -> None:
    """As the shell asks it: for the words so far, or for the line."""
    asked = {"_TILEFLEET_COMPLETE": f"complete_{shell}", "COMP_WORDS": "tilefleet jobs s", "COMP_CWORD": "2"}
    asked["_TYPER_COMPLETE_ARGS"] = "tilefleet jobs s"
    program = Path(sys.executable).parent / "tilefleet"
    said = subprocess.run([program], env=os.environ | asked, capture_output=True, text=True, check=False).stdout
    assert "status" in said
    assert "stop" in said
    assert "logs" not in said
