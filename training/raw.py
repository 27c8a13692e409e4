"""What a source of raw tiles is, whatever it lies in: its classes, its tiles with their labels, a way to read them.

In go the tiles that a reader found, out comes a :class:`Source` whose ids, classes and splits are fit to be packed.
The readers are :mod:`training.sources` (class folders), :mod:`training.cifar` and :mod:`training.tables`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

from cluster import storage
from configs.errors import TilefleetError

MAX_ID_LENGTH = 128
"""Longest tile id in characters; stock webdataset readers cut longer ones."""

NAMED = 3
"""Bad entries that an error names before it only counts them."""

_SPLITS_BY_NAME = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_ENDINGS = (".zip", ".tar.gz", ".tgz", ".csv", ".parquet")


class Files(Protocol):
    """Where the encoded images of a source lie."""

    def read(self, path: str) -> bytes:
        """A file, from any thread; raises ``TileError`` where it cannot be read whole."""
        ...

    def close(self) -> None:
        """Let go of the files."""
        ...


class Found(NamedTuple):
    """An image that a reader found; ``split`` is empty where the source gives none."""

    tile_id: str
    class_name: str
    split: str
    source: str


@dataclass(frozen=True, slots=True)
class RawTile:
    """One image of a source.

    ``source`` is where it lies, relative to the source; ``split`` is the one that the source gives it, or empty.
    """

    tile_id: str
    label: int
    source: str
    split: str = ""


@dataclass(frozen=True)
class Source:
    """Labelled raw tiles that were found, not yet read.

    ``classes`` are sorted, ``tiles`` are sorted by id, ``left_out`` counts by reason what is not a tile. ``name`` is
    the base name of the location without its ending. Either all tiles have a split or none has. Close it after use
    (``contextlib.closing``).
    """

    name: str
    classes: list[str]
    tiles: list[RawTile]
    left_out: dict[str, int]
    wrapper: str
    files: Files

    def read(self, tile: RawTile) -> bytes:
        """The encoded image of ``tile``, from any thread; raises :class:`TileError` where it cannot be read whole."""
        return self.files.read(self.wrapper + tile.source)

    def close(self) -> None:
        """Let go of the files."""
        self.files.close()


def label(location: str | Path, found: Iterable[Found]) -> tuple[list[str], list[RawTile]]:
    """Classes in order, and the tiles that were found with their labels, in the order of their ids.

    Raises :class:`TilefleetError` where an id is too long or stands for two files, where there is only one class, and
    where a class has tiles in other splits but none to train on.
    """
    found = sorted(found)
    classes = sorted({entry.class_name for entry in found})
    if len(classes) == 1:
        raise TilefleetError(f"{location}: holds only one class ({classes[0]}); a model needs two or more")
    trained = {entry.class_name for entry in found if entry.split in ("", "train")}
    if untrained := [name for name in classes if name not in trained]:
        raise TilefleetError(
            f"{location}: {', '.join(untrained)} has tiles in another split but none in train; "
            "give every class the same name in all splits, or take it out"
        )
    labels = {name: number for number, name in enumerate(classes)}
    tiles: dict[str, RawTile] = {}
    for tile_id, class_name, split, source in found:
        if len(tile_id) > MAX_ID_LENGTH:
            raise TilefleetError(
                f"{location}: tile id {tile_id!r} is over {MAX_ID_LENGTH} characters; shorten its names"
            )
        if tile_id in tiles:
            raise TilefleetError(
                f"{location}: {tiles[tile_id].source} and {source} have one tile id; rename one of them"
            )
        tiles[tile_id] = RawTile(tile_id, labels[class_name], source, split)
    return classes, list(tiles.values())


def tile_id(path: str) -> str:
    """``path`` without its ending; dots of the base name become ``_``, as tar readers end a key at the first dot."""
    pure = PurePosixPath(path)
    return str(pure.with_name(pure.stem.replace(".", "_")))


def split_named(name: str) -> str | None:
    """train, val or test for any usual spelling and case of its name (such as ``Validation``); None for other names."""
    return _SPLITS_BY_NAME.get(name.lower())


def source_name(location: str | Path) -> str:
    """The base name of ``location`` without the ending of an archive or a table."""
    name = PurePosixPath(storage.absolute(location)).name
    ending = next((ending for ending in _ENDINGS if name.lower().endswith(ending)), "")
    return name[: len(name) - len(ending)]


def first_few(entries: Sequence[str]) -> str:
    """The first :data:`NAMED` of ``entries`` and the count of the others, in words."""
    more = f" and {len(entries) - NAMED} more" if len(entries) > NAMED else ""
    return ", ".join(entries[:NAMED]) + more
