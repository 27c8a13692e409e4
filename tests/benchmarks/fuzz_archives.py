"""Damaged and hostile archives through ``verify``, the readers and the decoder, each case of them another.

    python -m tests.benchmarks.fuzz_archives [--cases 10000] [--seed 0]

A case is an archive of good, bad and hostile files, packed in one of many ways and then damaged, by its number alone:
``--first N --cases 1`` makes one again. Cases run in processes with little memory and little time each. Of each the
tiles found are held against those that Python's own readers find, and the folder it lies in against what lay there
before. Some of them go through the whole of ``classify`` too. The last line is one JSON object; what its ``wrong``
names is to be mended.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import lzma
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.errors import TilefleetError
from tests import hostile
from tests.runs import ROOT

CPU_SECONDS, WALL_SECONDS = 15, 300
"""A case that takes longer hangs; the slowest of the good ones inflate bombs of some 100 MB in two seconds."""

MEMORY = 1 << 30
"""Bytes of address space that a process may take for its cases, beyond what it has before the first."""

Counts = Counter[str]


def lenient(location: Path) -> int | None:
    """Tiles that Python's own readers find in a plain archive; None of one that they do not read."""
    from inference.scan import is_tile_name

    if location.is_dir():
        return len(list(location.iterdir()))
    try:
        if location.suffix == ".zip":
            with zipfile.ZipFile(location) as file:
                return sum(is_tile_name(one.filename) and not one.is_dir() for one in file.infolist())
        found = 0
        with tarfile.open(location, "r:*") as tar:
            try:
                for member in tar:
                    found += not member.isdir() and is_tile_name(member.name)
            except (tarfile.TarError, OSError, EOFError, ValueError, lzma.LZMAError, zlib.error):
                pass
        return found
    except Exception:  # they raise many types on damaged archives
        return None


def try_case(number: int, seed: int, base: Path) -> Counts:
    """Send one case through; what was found, and under ``wrong`` whether anything but that happened."""
    from inference.check import find_problems
    from inference.readers import read_chunk
    from tests.archives import planned
    from training.decode import decode_tiles
    from training.encoded import Bands

    (base / "in").mkdir(parents=True)
    location = hostile.write_case(number, seed, base / "in")
    chosen = Bands(numbers=(3, 1), highest=10_000) if number % 2 else None
    before, found = listing(base), Counter({"cases": 1})
    problems = list(find_problems(str(location)))
    found["verified_whole"] += not problems
    plan = planned([location], base / "out")
    damaged = {bad.archive for bad in plan.bad}
    for chunk in plan.chunks:
        tiles = read_chunk(chunk)
        rows = list(tiles)
        _, errors = decode_tiles([tile.data or b"" for tile in rows], 32, chosen)
        found["rows"] += len(rows)
        found["errors"] += sum(error is not None for error in errors)
        damaged |= {chunk.archive} if tiles.damage else set()
        found["uncounted"] += chunk.tiles not in (None, len(rows))
    found["named"] = len(damaged)
    expected = lenient(location)
    found["lost"] = not damaged and expected is not None and found["rows"] < expected
    found["invented"] = location.suffix == ".tar" and expected is not None and found["rows"] > expected
    outside = listing(base) - before - {base / "out", base / "out" / "plan.parquet"}
    found["outside"] = len(outside) + len(before - listing(base))
    return found


def listing(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def work(first: int, last: int, step: int, seed: int, base: Path) -> None:
    """Do every ``step``-th case and answer each with a line; ends with a stack trace at one that hangs or crashes."""
    from training import decode
    from training.encoded import Bands

    faulthandler.enable()
    base.mkdir()
    os.chdir(base)
    tempfile.tempdir = str(base)
    some = [hostile.picture(random.Random(n)) for n in range(40)]
    for bands in (None, Bands(numbers=(1,), highest=255)):
        decode.decode_tiles(some, 32, bands)  # loads what is loaded late
    hostile.bomb("zip"), hostile.bomb("tar.gz"), hostile.wide_png(4096)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    for number in range(first, last, step):
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # its signal ends the process
        faulthandler.dump_traceback_later(WALL_SECONDS, exit=True)
        folder = base / str(number)
        folder.mkdir()
        try:
            found = try_case(number, seed, folder / "case")
        except TilefleetError as error:
            found = Counter({"cases": 1, "refused": 1})
            print(f"case {number}: {error}", file=sys.stderr)
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        traps = Path(hostile.TRAP).parent.glob(f"{Path(hostile.TRAP).name}*")
        found["outside"] += len(listing(base) - listing(folder) - {folder}) + len(list(traps))
        shutil.rmtree(folder)
        print(json.dumps([number, found]), flush=True)


def run(cases: int, seed: int, folder: Path, first: int = 0, processes: int = 2) -> dict[str, Any]:
    """All cases from ``first`` on; the counts of all, and the numbers of those that went wrong."""
    total: Counts = Counter()
    wrong: dict[str, list[int]] = {}
    for number, found in answers(cases, seed, folder, first, processes):
        total.update(found)
        for what in ("crashed", "refused", "uncounted", "lost", "invented", "outside"):
            if found[what]:
                wrong.setdefault(what, []).append(number)
    counts = ("cases", "rows", "errors", "named", "verified_whole")
    zeros = ("crashed", "refused", "uncounted", "lost", "invented", "outside")
    return {what: total[what] for what in (*counts, *zeros)} | {"wrong": wrong}


def answers(cases: int, seed: int, folder: Path, first: int, processes: int) -> Iterator[tuple[int, Counts]]:
    """Number and counts of each case; a process that ends is followed by one that leaves out the case it ended at."""
    last = first + cases
    running: list[tuple[int, subprocess.Popen[str]]] = []

    def start(number: int) -> None:
        if number < last:
            base = folder / f"from-{number}"
            line = ["-m", "tests.benchmarks.fuzz_archives", "--work", str(number), str(last), str(processes)]
            command = [sys.executable, *line, "--seed", str(seed), "--folder", str(base)]
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            running.append((number, process))

    for process in range(processes):
        start(first + process)
    while running:
        number, process = running.pop(0)
        assert process.stdout
        if line := process.stdout.readline():
            done, found = json.loads(line)
            assert done == number
            yield number, Counter(found)
            running.append((number + processes, process))
        else:
            end = process.wait()
            if number < last:
                print(f"case {number}: its process ended with {end}", file=sys.stderr)
                yield number, Counter({"cases": 1, "crashed": 1})
                start(number + processes)


def through_classify(cases: int, seed: int, folder: Path) -> dict[str, int]:
    """Send archives through one run of ``classify``; how many rows are missing or other than the readers say."""
    from inference.archive import list_archives
    from inference.classify import ClassifyConfig, classify
    from inference.readers import read_chunk
    from inference.sink import read_predictions
    from tests.archives import planned, save_model
    from training.decode import decode_tiles

    for number in range(cases):
        (folder / "in" / str(number)).mkdir(parents=True)
        hostile.write_case(number, seed, folder / "in" / str(number))
    before = listing(folder)
    expected = []
    for chunk in planned(list_archives([str(folder / "in")]), folder / "plan", 50).chunks:
        tiles = list(read_chunk(chunk))
        _, errors = decode_tiles([tile.data or b"" for tile in tiles], 32)
        expected += [(chunk.archive, tile.tile_id, tile.error or why) for tile, why in zip(tiles, errors, strict=True)]
    model = save_model(folder / "bundle")
    config = ClassifyConfig(tiles_per_chunk=50, engine="torch")
    totals = classify(model, [str(folder / "in")], str(folder / "out"), config)
    rows = read_predictions(str(folder / "out")).select(["archive", "tile_id", "error"]).to_pylist()
    own = {folder / name for name in ("out", "plan", "bundle")}
    outside = [path for path in listing(folder) - before if not own & {path, *path.parents}]
    return {
        "cases": cases,
        "rows": totals.tiles,
        "bad_archives": len(totals.bad_archives),
        "different": sum(tuple(row.values()) != wanted for row, wanted in zip(rows, expected, strict=False)),
        "missing": len(expected) - len(rows),
        "outside": len(outside) + len(before - listing(folder)),
    }


def main() -> None:
    """Try all, and print what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work, options.seed, options.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = run(options.cases, options.seed, Path(folder), options.first)
        sample = through_classify(options.cases // 20, options.seed, Path(folder) / "classify")
        print(json.dumps(found | {"classify": sample}))


if __name__ == "__main__":
    main()
