"""CIFAR-10 and CIFAR-100 as published for Python: a folder of batches, or the ``.tar.gz`` of one.

In goes the location, out comes a :class:`training.raw.Source` of 32x32 tiles as PNG, with the published splits. The
format is that of Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. The batches are pickles of
Python 2, which :mod:`training.pickled` reads without running them.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cluster import storage
from configs.errors import TilefleetError
from training.pickled import Call, Name, read_pickle
from training.raw import Found, Source, label, source_name
from training.tars import Member, scan_tar

MAX_BATCH_BYTES = 256 << 20
"""Largest batch file that is read; CIFAR-100's train batch, the largest published, has 155 million bytes."""

MAX_ARCHIVE_BYTES = 512 << 20
"""Largest archive that is read, before and after it is decompressed; the published ones have 186 million bytes."""

SIDE = 32
"""Height and width of a tile in pixels."""

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Edition:
    """The files and keys of one of the two sets."""

    meta: str
    batches: dict[str, str]  # file -> split, in the order of the tiles
    names: str
    labels: str


_CIFAR10 = _Edition(
    "batches.meta",
    {f"data_batch_{number}": "train" for number in range(1, 6)} | {"test_batch": "test"},
    "label_names",
    "labels",
)
_CIFAR100 = _Edition("meta", {"train": "train", "test": "test"}, "fine_label_names", "fine_labels")

_NAMES = frozenset({"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"})


def is_cifar(location: str | Path) -> bool:
    """Whether ``location`` is an archive that is named as the published ones are, or a folder of batches."""
    if not storage.is_dir(location):
        return str(location).lower().endswith((".tar.gz", ".tgz"))
    return any(_is_file(location, name) for name in (_CIFAR10.meta, "data_batch_1")) or all(
        _is_file(location, name) for name in (_CIFAR100.meta, "train")
    )


def open_cifar(location: str | Path) -> Source:
    """The tiles of all batches, which are read into memory (184 MB of pixels).

    The id of a tile is ``SPLIT/CLASS/NUMBER``, with five digits for its place in the batches of the split; CIFAR-100
    has its fine labels. Raises :class:`TilefleetError` where a batch is missing, damaged, over the limit or no CIFAR
    batch.
    """
    files = _folder_files(location) if storage.is_dir(location) else _archive_files(location)
    edition = _CIFAR10 if files.keys() & {_CIFAR10.meta, "data_batch_1"} else _CIFAR100
    if missing := [name for name in (edition.meta, *edition.batches) if name not in files]:
        raise TilefleetError(
            f"{location}: not a whole set of CIFAR batches, it lacks {', '.join(missing)}; download it again"
        )
    classes = _class_names(location, edition, _read_entries(location, edition.meta, files[edition.meta]()))
    pixels: dict[str, Pixels] = {}
    found: list[Found] = []
    counts = dict.fromkeys(edition.batches.values(), 0)
    for name, split in edition.batches.items():
        entries = _read_entries(location, name, files[name]())
        pixels[name], labels = _tiles(location, name, entries, edition.labels, len(classes))
        for place, number in enumerate(labels):
            tile_id = f"{split}/{classes[number]}/{counts[split] + place:05}"
            found.append(Found(tile_id, classes[number], split, f"{name}/{place}"))
        counts[split] += len(labels)
    return Source(source_name(location), *label(location, found), {}, "", _Batches(pixels))


class _Batches:
    """The tiles of all batches, as PNG files named ``BATCH/PLACE``."""

    def __init__(self, pixels: dict[str, Pixels]) -> None:
        self._pixels = pixels  # batch -> uint8 [tiles, 3, SIDE, SIDE]

    def read(self, path: str) -> bytes:
        """One tile as PNG: lossless, and the same bytes each time."""
        batch, _, place = path.rpartition("/")
        buffer = io.BytesIO()
        Image.fromarray(self._pixels[batch][int(place)].transpose(1, 2, 0)).save(buffer, "PNG", compress_level=6)
        return buffer.getvalue()

    def close(self) -> None:
        """Let go of the memory."""
        self._pixels = {}


def _is_file(folder: str | Path, name: str) -> bool:
    location = storage.join(folder, name)
    return storage.exists(location) and not storage.is_dir(location)


def _folder_files(folder: str | Path) -> dict[str, Callable[[], bytes]]:
    """Name -> reader of each file of a folder."""

    def read(location: str) -> bytes:
        _check_size(location, storage.size(location), MAX_BATCH_BYTES)
        return storage.read_bytes(location)

    return {PurePosixPath(location).name: partial(read, location) for location in storage.list_files(folder)}


def _archive_files(location: str | Path) -> dict[str, Callable[[], bytes]]:
    """Base name -> reader of each file of a compressed tar, which is held in memory."""
    _check_size(location, storage.size(location), MAX_ARCHIVE_BYTES)
    try:
        with storage.open_input(location) as stream, gzip.GzipFile(fileobj=stream) as plain:
            data = plain.read(MAX_ARCHIVE_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TilefleetError(f"{location}: cut short, damaged or not a .tar.gz; download it again") from error
    _check_size(location, len(data), MAX_ARCHIVE_BYTES)
    scan = scan_tar(io.BytesIO(data))
    if scan.damage:
        raise TilefleetError(f"{location}: {scan.damage}; download it again")

    def read(member: Member) -> bytes:
        _check_size(f"{location}: {member.name}", member.size, MAX_BATCH_BYTES)
        return data[member.offset : member.offset + member.size]

    return {PurePosixPath(member.name).name: partial(read, member) for member in scan.members if not member.refused}


def _check_size(location: str | Path, size: int, limit: int) -> None:
    if size > limit:
        raise TilefleetError(f"{location}: over the limit of {limit >> 20} MiB for CIFAR files; use the published ones")


def _read_entries(location: str | Path, name: str, data: bytes) -> dict[Any, Any]:
    try:
        entries = read_pickle(data, _NAMES)
    except ValueError as error:
        raise TilefleetError(f"{location}: {name} is not a CIFAR batch ({error}); download it again") from error
    if not isinstance(entries, dict):
        raise TilefleetError(f"{location}: {name} is not a CIFAR batch (it holds no dict); download it again")
    return entries


def _class_names(location: str | Path, edition: _Edition, entries: dict[Any, Any]) -> list[str]:
    names = entries.get(edition.names)
    texts = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    usable = all(text.isprintable() and text and "/" not in text for text in texts) and len(set(texts)) == len(texts)
    if not isinstance(names, list) or not usable or not texts or len(texts) != len(names):
        raise TilefleetError(f"{location}: {edition.meta} is not a CIFAR batch (no {edition.names}); download it again")
    return texts


def _tiles(
    location: str | Path, name: str, entries: dict[Any, Any], labels_key: str, classes: int
) -> tuple[Pixels, list[int]]:
    """Pixels, uint8 ``[tiles, 3, SIDE, SIDE]``, and labels of a batch."""
    pixels = _array(entries.get("data"))
    labels = entries.get(labels_key)
    if pixels is None:
        problem = f"no uint8 data of {3 * SIDE * SIDE} bytes a tile"
    elif not isinstance(labels, list) or len(labels) != len(pixels):
        problem = f"no {labels_key}, one for each tile"
    elif not all(type(number) is int and 0 <= number < classes for number in labels):
        problem = f"{labels_key} other than 0 to {classes - 1}"
    else:
        return pixels.reshape(-1, 3, SIDE, SIDE), labels
    raise TilefleetError(f"{location}: {name} is not a CIFAR batch ({problem}); download it again")


def _array(value: object) -> Pixels | None:
    """The rows of a pickled uint8 array, ``[tiles, 3072]``; None for anything else."""
    match value:
        case Call(
            Name("numpy.core.multiarray _reconstruct"),
            (Name("numpy ndarray"), (0,), "b"),
            (1, (int(tiles), int(width)), Call(Name("numpy dtype"), ("u1", *_), _), bool(by_column), str(text)),
        ) if width == 3 * SIDE * SIDE and tiles * width == len(text):
            samples = np.frombuffer(text.encode("latin-1"), np.uint8)
            return samples.reshape(tiles, width, order="F" if by_column else "C")
    return None
