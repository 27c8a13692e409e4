"""The front door of tilefleet: one command line, a sub-command a verb.

Raw tiles become shards (pack), shards a model (train, evaluate), archives of tiles a table of classes (classify,
report); ``tilefleet demo`` runs all of it, ``tilefleet submit`` on a cluster. Exit codes: 0 done; 1 the work failed or
data is bad; 2 the command line or a config is wrong. Results go to stdout, progress and problems to stderr.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cluster import commands
from cluster.terminal import progress_line, warn
from configs.errors import TilefleetError, UsageError

if TYPE_CHECKING:
    from cluster.records import Status
    from configs.schema import Recipe

app = typer.Typer(
    help="Labelled satellite tiles become a model; archives of millions of tiles become a table of classes and a map.",
    epilog="Add --debug to any command for the stack trace of an error.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, as epochs=5.")]


@app.command()
def pack(
    source: Annotated[str, typer.Argument(help="Class folders (or a zip), CIFAR batches, or a table.")],
    out: Annotated[str, typer.Argument(help="Folder for the shards; new or empty.")],
    split: Annotated[str, typer.Option(help="Percent for train,val,test.")] = "80,10,10",
    seed: Annotated[int, typer.Option(min=0, help="Another seed is another split and order.")] = 0,
    tiles_per_shard: Annotated[int, typer.Option(min=1, help="Tiles in one tar.")] = 1000,
    size: Annotated[int | None, typer.Option(min=8, help="Resize tiles to SIZE x SIZE pixels.")] = None,
    bands: Annotated[str | None, typer.Option(help="Bands of a tile, as 4,3,2,8; RGB if not given.")] = None,
    span: Annotated[str | None, typer.Option("--range", help="Samples that become 0 and 255, as 0,3000.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; all cores if not given.")] = None,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Leave damaged images out, and list them in the index.")
    ] = False,
) -> None:
    """Turn raw labelled tiles into shards.

    Tiles with equal pixels never land in two splits.
    """
    from training.encoded import parse_bands
    from training.pack import pack

    try:
        shares = tuple(int(part) for part in split.split(","))
    except ValueError as error:
        raise UsageError(f"--split {split}: three numbers are needed, as 80,10,10") from error
    with progress_line() as show:
        index = pack(
            source,
            out,
            split=shares,
            seed=seed,
            tiles_per_shard=tiles_per_shard,
            size=size,
            bands=parse_bands(bands, span),
            workers=workers,
            skip_damaged=skip_damaged,
            progress=show,
        )
    for line in index.packed.get("warnings", []):
        warn(line)
    for reason, count in index.packed["left_out"].items():
        warn(f"left out: {count} x {reason}")
    for entry in index.packed.get("damaged", []):
        warn(f"left out: {entry['source']}: {entry['reason']}")
    counts = ", ".join(f"{name} {index.tiles(name)}" for name in index.splits)
    print(f"{out}: {sum(map(index.tiles, index.splits))} tiles of {len(index.classes)} classes ({counts})")


@app.command()
def verify(location: Annotated[str, typer.Argument(help="Shard set, or archives as classify takes them.")]) -> None:
    """Find every damaged shard, archive and image.

    Exit code 1, and a line for each problem, if there is one.
    """
    from inference.check import find_problems

    problems = 0
    with progress_line() as show:
        for problem in find_problems(location, show):
            print(problem)
            problems += 1
    if problems:
        raise TilefleetError(f"{location}: {problems} problems")
    print(f"{location}: whole")


@app.command()
def show(
    location: Annotated[str | None, typer.Argument(help="Shard set, tar or folder of images.")] = None,
    out: Annotated[str, typer.Option("--out", "-o", help="The picture to write.")] = "grid.png",
    tiles: Annotated[int, typer.Option(min=1, help="How many tiles to draw.")] = 64,
    split: Annotated[str | None, typer.Option(help="train, val or test; all if not given.")] = None,
    augment: Annotated[str | None, typer.Option(help="A recipe: draw what its model will see.")] = None,
) -> None:
    """Draw a contact sheet of labelled tiles."""
    from configs.schema import load_recipe
    from training.show import augmented_sheet, contact_sheet

    if augment:
        recipe = load_recipe(augment)
        recipe = recipe.model_copy(update={"shards": location or recipe.shards})
        print(f"{out}: {augmented_sheet(recipe, out)} tiles, the first column without augmentation")
        return
    if location is None:
        raise UsageError("show: nothing to draw; name shards or images, or a recipe with --augment")
    print(f"{out}: {contact_sheet(location, out, tiles=tiles, split=split)} tiles")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="YAML file, as configs/eurosat_cnn.yaml.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run where it stopped.")] = False,
) -> None:
    """Train a model with DDP workers.

    Leaves a run folder with checkpoints, curves and the model bundle.
    """
    from configs.schema import load_recipe

    _train(load_recipe(recipe, overrides or []), resume)


@app.command()
def evaluate(
    bundle: Annotated[str, typer.Argument(help="Bundle folder, as runs/NAME/bundle.")],
    shards: Annotated[str, typer.Argument(help="Shard set.")],
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    foreign: Annotated[str | None, typer.Option(help="Images of anything else, to judge `unknown` by.")] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder for figures and plots.")] = None,
    engines: Annotated[bool, typer.Option("--engines", help="Also say what each engine costs in accuracy.")] = False,
) -> None:
    """Measure a bundle on a labelled split.

    Accuracy, per-class scores, confusion and calibration, as numbers and plots.
    """
    _evaluate(bundle, shards, split, out, foreign)
    if engines:
        _compare_engines(bundle, shards, split)


@app.command()
def predict(
    bundle: Annotated[str, typer.Argument(help="Bundle folder, as runs/NAME/bundle.")],
    images: Annotated[list[str], typer.Argument(help="Image files.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to show for each image.")] = 3,
) -> None:
    """Classify a few images, without a cluster."""
    from cluster import storage
    from inference.predictor import Predictor

    predictor = Predictor(bundle)
    for image in images:
        if not storage.exists(image) or storage.is_dir(image):
            raise UsageError(f"{image}: no such image file")
    result = predictor.predict([storage.read_bytes(image) for image in images])
    for number, (image, error) in enumerate(zip(images, result.errors, strict=True)):
        if error is not None:
            warn(f"{image}: {error}")
            continue
        shares = result.probabilities[number]
        named = ", ".join(f"{predictor.info.classes[i]} {shares[i]:.1%}" for i in shares.argsort()[::-1][:top])
        print(f"{image}: {'unknown, nearest to ' if result.is_unknown[number] else ''}{named}")
    if any(result.errors):
        raise TilefleetError(f"{sum(map(bool, result.errors))} of {len(images)} images could not be classified")


@app.command()
def classify(
    bundle: Annotated[str, typer.Argument(help="Bundle folder, as runs/NAME/bundle.")],
    archives: Annotated[
        list[str],
        typer.Argument(
            metavar="ARCHIVE... [KEY=VALUE]...", help="Tars, zips, folders, lists of paths; settings, as workers=2."
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder for the predictions; the same one resumes.")],
) -> None:
    """Classify archives of tiles, each tile once.

    Stopped or killed, the same command goes on where it was.
    """
    from cluster import storage

    settings = [text for text in archives if "=" in text and not storage.exists(text)]
    _classify(bundle, [text for text in archives if text not in settings], out, settings)


@app.command()
def report(
    locations: Annotated[list[str], typer.Argument(help="Run folder or predictions folder; several runs.")],
    out: Annotated[str | None, typer.Option("--out", "-o", help="The page to write.")] = None,
) -> None:
    """Make the HTML page of a run or of predictions.

    Of several runs, it is a page that compares them.
    """
    from inference.compare import compare
    from inference.report import report

    print(report(locations[0], out) if len(locations) == 1 else compare(locations, out))


@app.command()
def demo(
    data: Annotated[str | None, typer.Option(help="Folder or zip of class folders; synthetic if not given.")] = None,
    out: Annotated[str, typer.Option(help="Folder for all that the demo makes; new or empty.")] = "demo",
) -> None:
    """Run the whole flow on one machine.

    Pack, train, evaluate, classify and report, over one Ray.
    """
    from cluster import storage
    from cluster.session import available_cpus, session
    from configs.schema import load_recipe
    from inference.report import report
    from training.shards import INDEX, load_index
    from training.synthetic import write_tiles

    source, shards, predictions = data or f"{out}/raw", f"{out}/shards", f"{out}/predictions"
    configs = Path(__file__).parent / "configs"
    recipe = load_recipe(
        configs / ("eurosat_cnn.yaml" if data else "demo.yaml"),
        [f"shards={shards}", f"runs={out}/runs", *(["epochs=12"] if data else [])],
    )
    if storage.exists(f"{shards}/{INDEX}"):  # an earlier demo that was stopped goes on
        if load_index(shards).packed["source"] != Path(source).name.removesuffix(".zip"):
            raise UsageError(f"{out}: holds a demo of other tiles; choose another folder with --out or remove it")
    else:
        if not data:
            with progress_line() as show:
                write_tiles(source, 300, progress=show)
        pack(source, shards)
    with session():
        recipe = recipe.model_copy(update={"workers": min(recipe.workers, available_cpus())})
        _train(recipe, resume=True)
        bundle = f"{recipe.run}/bundle"
        _evaluate(bundle, shards, "test", None)
        _classify(bundle, [f"{shards}/test"], predictions, [])
    print(f"run page:         {report(recipe.run, None)}")
    print(f"predictions page: {report(predictions, None)}")
    print(f"predictions:      {predictions}/predictions/*.parquet")


@app.command()
def bench(
    what: Annotated[Literal["ingest", "train", "classify"], typer.Argument(help="What to measure, and its parts.")],
    subject: Annotated[
        list[str] | None, typer.Argument(metavar="[SHARDS] [KEY=VALUE]...", help="Synthetic tiles if not given.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="What to train; configs/bench.yaml if not given.")] = None,
    model: Annotated[str, typer.Option(help="What classifies: a bundle, or cnn or vgg16 with random weights.")] = "cnn",
    peers: Annotated[Literal["f32", "bf16"] | None, typer.Option(help="Classify as others do too, in this.")] = None,
    tiles: Annotated[int | None, typer.Option(min=1, help="Tiles: 4096 at most to train, 20000 to classify.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; as in the recipe, or all cores.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each part is measured.")] = 3,
) -> None:
    """Measure how fast this machine trains or classifies.

    The last line of stdout is one JSON object.
    """
    settings = [text for text in subject or [] if "=" in text] + ([f"workers={workers}"] if workers else [])
    shards = [text for text in subject or [] if "=" not in text]
    if len(shards) > 1:
        raise UsageError(f"bench: one shard set at a time, not {', '.join(shards)}")
    if what == "classify":
        _bench_classify(model, shards[0] if shards else None, tiles or 20_000, peers, settings, rounds)
        return
    from configs.schema import load_recipe
    from training.bench import measure_ingest, measure_train, prepare, table

    chosen = load_recipe(recipe or Path(__file__).parent / "configs" / "bench.yaml", settings)
    with progress_line() as show, prepare(chosen, shards[0] if shards else None, tiles or 4096, show) as prepared:
        result = (measure_ingest if what == "ingest" else measure_train)(prepared, rounds, show)
    print(table(result))
    print(json.dumps(result))


commands.add_to(app)


def main() -> None:
    """Run the command line and leave with its exit code."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app(prog_name="tilefleet")
    except TilefleetError as error:
        if debug:
            raise
        warn(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        warn("stopped; what is finished is kept")
        sys.exit(130)


def _train(recipe: Recipe, resume: bool) -> None:
    from cluster.records import best_row, read_metrics
    from training.grids import prediction_grids
    from training.plots import plot_curves
    from training.train import train

    with progress_line() as show:

        def follow(status: Status) -> None:
            loss = "" if status.loss is None else f"loss {status.loss:.4f}"
            accuracy = "" if status.accuracy is None else f" val {status.accuracy:.1%}"
            epoch = f"epoch {status.epoch or 1}/{status.epochs}"
            show(f"train, {epoch}", status.done_tiles, status.planned_tiles, loss + accuracy)

        train(recipe, resume=resume, follow=follow)
    rows = read_metrics(recipe.run)
    plot_curves(rows, f"{recipe.run}/curves.png", recipe)
    if missing := prediction_grids(recipe, f"{recipe.run}/predictions.png"):
        warn(f"{recipe.run}/predictions.png: without predictions before training ({missing})")
    best = best_row(rows) or rows[-1]  # the bundle is of the last epoch where none is validated
    accuracy = f"{best['val_accuracy']:.2%}" if best["val_accuracy"] is not None else "not measured"
    print(f"{recipe.run}/bundle: validation accuracy {accuracy}, from epoch {best['epoch']} of {len(rows)}")


def _evaluate(bundle: str, shards: str, split: str, out: str | None, foreign: str | None = None) -> None:
    from training.evaluate import evaluate
    from training.foreign import describe

    with progress_line() as show:
        result = evaluate(bundle, shards, split=split, out=out, foreign=foreign, progress=partial(show, "evaluate"))
    width = max(len(name) for name in result["classes"])
    print(f"{'class':{width}}  precision  recall      f1   tiles")
    for name, row in result["per_class"].items():
        print(f"{name:{width}}  {row['precision']:9.4f} {row['recall']:7.4f} {row['f1']:7.4f} {row['support']:7d}")
    print(f"accuracy on {split}: {result['accuracy']:.2%} of {result['tiles']} tiles")
    if foreign:
        print(f"unknown: {describe(result['foreign'])}")


def _compare_engines(bundle: str, shards: str, split: str) -> None:
    from inference.engines import on_split

    with progress_line() as show:
        found = on_split(bundle, shards, split, show)
    print(f"{'engine':15}accuracy   torch's  other class  other unknown")
    for name, one in found.items():
        scores = f"{one.accuracy:9.2%} {one.reference_accuracy:9.2%}"
        print(f"{name:14}{scores} {one.other_class:12d} {one.other_unknown:14d}")


def _classify(bundle: str, archives: list[str], out: str, settings: list[str]) -> None:
    from configs.schema import parse_overrides, validate
    from inference.classify import ClassifyConfig, classify

    if not archives:
        raise UsageError("classify: no archive given; name tars, zips, folders or lists of paths")
    config = validate(ClassifyConfig, parse_overrides(settings), "classify")
    with progress_line() as show:
        totals = classify(bundle, archives, out, config, progress=show)
    print(f"{out}: {totals.tiles} tiles, {totals.classified} classified, {totals.errors} errors")
    for bad in totals.bad_archives:
        warn(f"{bad.archive}: {bad.reason}")
    if totals.bad_archives:
        raise TilefleetError(f"{out}: {len(totals.bad_archives)} archives are bad; what could be read is classified")
    if not totals.classified:
        raise TilefleetError(f"{out}: no tile could be classified; the error column says why")


def _bench_classify(
    model: str, shards: str | None, tiles: int, peers: str | None, settings: list[str], rounds: int
) -> None:
    from configs.schema import parse_overrides, validate
    from inference.bench import measure, prepare, table
    from inference.classify import ClassifyConfig
    from training.synthetic import write_tiles

    config = validate(ClassifyConfig, parse_overrides(settings), "bench classify")
    with progress_line() as show, prepare(model, shards, tiles, peers, config, write_tiles, show) as prepared:
        result = measure(prepared, rounds, show)
    print(table(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
