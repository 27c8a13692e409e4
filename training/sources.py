"""Readers of raw tiles: a folder of class folders, or a zip of one.

In goes a location, out comes a :class:`Source`: the classes, the tiles with their labels, what was left out and why. A
zip is never extracted: tiles are read one at a time, with limits before anything is decompressed.
"""

from __future__ import annotations

import os
import stat
import struct
import threading
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from cluster import storage
from configs.errors import TilefleetError, UsageError
from training.decode import MAX_ENCODED_BYTES, TileError, is_image_name

MAX_ID_LENGTH = 128
"""Longest tile id in characters; stock webdataset readers cut longer ones."""

_SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


@dataclass(frozen=True, slots=True)
class RawTile:
    """One image of a source. ``source`` is its path below the folder that holds the class folders."""

    tile_id: str
    label: int
    source: str


@dataclass(frozen=True)
class Source:
    """Labelled raw tiles that were found, not yet read.

    ``classes`` are sorted, ``tiles`` are sorted by id, ``left_out`` counts by reason what is not a tile. ``name`` is
    the base name of the location without ``.zip``. Close it after use (``contextlib.closing``).
    """

    name: str
    classes: list[str]
    tiles: list[RawTile]
    left_out: dict[str, int]
    wrapper: str
    files: _Files

    def read(self, tile: RawTile) -> bytes:
        """The encoded image of ``tile``, from any thread; raises :class:`TileError` where it cannot be read whole."""
        return self.files.read(self.wrapper + tile.source)

    def close(self) -> None:
        """Let go of the files."""
        self.files.close()


def open_source(location: str | Path) -> Source:
    """Find the tiles of a folder of class folders, or of a zip of one.

    Folders that only wrap the class folders are passed over. Raises :class:`UsageError` where ``location`` is no folder
    or zip and :class:`TilefleetError` where it does not hold two classes of uniquely named images.
    """
    if not storage.exists(location):
        raise UsageError(f"{location}: no such folder or zip")
    files: _Files = _Folder(location) if storage.is_dir(location) else _Zip(location)
    try:
        listing = files.list()
        wrapper = _wrapper(listing.images)
        classes, tiles = _label(location, wrapper, listing)
    except BaseException:
        files.close()
        raise
    name = PurePosixPath(storage.absolute(location)).name
    return Source(name.removesuffix(".zip"), classes, tiles, dict(sorted(listing.left_out.items())), wrapper, files)


class _Listing:
    """Paths of the images and folders of a source, and how many other files there are, by reason."""

    def __init__(self) -> None:
        self.images: list[str] = []
        self.folders: set[str] = set()
        self.left_out: Counter[str] = Counter()

    def add(self, path: str) -> None:
        """Take in a file, or count why it is left out."""
        parts = path.split("/")
        if "__MACOSX" in parts:
            self.left_out["in __MACOSX"] += 1
        elif any(part.startswith(".") and part != "." for part in parts):
            self.left_out["hidden"] += 1
        elif not is_image_name(path):
            self.left_out["not an image"] += 1
        elif not path.isprintable():
            self.left_out["name with unprintable characters"] += 1
        else:
            self.images.append(path)


class _Files(Protocol):
    """Where the files of a source lie."""

    def list(self) -> _Listing: ...
    def read(self, path: str) -> bytes: ...
    def close(self) -> None: ...


class _Folder:
    def __init__(self, location: str | Path) -> None:
        self._root = storage.absolute(location).rstrip("/")

    def list(self) -> _Listing:
        listing = _Listing()
        if storage.is_uri(self._root):
            for found in storage.list_files(self._root, recursive=True):
                listing.add(found[len(self._root) + 1 :])
            return listing
        root = Path(self._root)
        for folder, folders, names in os.walk(root, onerror=_raise_unreadable):
            for path in (Path(folder, name) for name in folders):
                if path.is_symlink():
                    listing.left_out["link to a folder"] += 1
                else:
                    listing.folders.add(path.relative_to(root).as_posix())
            for path in (Path(folder, name) for name in names):
                if not path.is_file():
                    listing.left_out["broken link or special file"] += 1
                elif path.is_symlink() and not path.resolve().is_relative_to(root):
                    listing.left_out["link that leaves the folder"] += 1
                else:
                    listing.add(path.relative_to(root).as_posix())
        return listing

    def read(self, path: str) -> bytes:
        try:
            return storage.read_bytes(storage.join(self._root, path), 0, MAX_ENCODED_BYTES + 1)
        except OSError as error:
            raise TileError(f"cannot be read: {error.strerror}") from error

    def close(self) -> None:
        pass


class _Zip:
    def __init__(self, location: str | Path) -> None:
        self._location = location
        self._lock = threading.Lock()
        self._stream = storage.open_input(location)
        try:
            self._zip = zipfile.ZipFile(self._stream)
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OSError) as error:
            self._stream.seek(0)
            meant_as_zip = self._stream.read(2) == b"PK" or str(location).lower().endswith(".zip")
            self._stream.close()
            if meant_as_zip:
                raise TilefleetError(f"{location}: the zip is cut short or damaged; use another copy") from error
            raise UsageError(f"{location}: neither a folder nor a zip") from error

    def list(self) -> _Listing:
        """Raises for entries that an honest archive of tiles does not hold: they make all of it doubtful."""
        listing = _Listing()
        for info in self._zip.infolist():
            path = PurePosixPath(info.filename)
            if path.is_absolute() or ".." in path.parts:
                raise TilefleetError(f"{self._location}: entry {info.filename!r} points outside the zip; pack it anew")
            if info.is_dir():
                listing.folders.add(path.as_posix())
            elif stat.S_ISLNK(info.external_attr >> 16):
                listing.left_out["link"] += 1
            elif info.flag_bits & 0x1:
                raise TilefleetError(f"{self._location}: entry {info.filename!r} is encrypted; decrypt the zip first")
            elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others have no size limit
                raise TilefleetError(f"{self._location}: entry {info.filename!r} is neither stored nor deflated")
            else:
                listing.add(info.filename)
        return listing

    def read(self, path: str) -> bytes:
        info = self._zip.getinfo(path)
        if info.file_size > MAX_ENCODED_BYTES:
            raise TileError(f"image file over the limit: {info.file_size} bytes, {MAX_ENCODED_BYTES} allowed")
        try:
            with self._lock, self._zip.open(info) as member:  # ZipFile counts its readers without a lock of its own
                data = member.read(info.file_size + 1)
        except (
            zipfile.BadZipFile,
            zlib.error,
            struct.error,
            NotImplementedError,
            EOFError,
            OSError,
            ValueError,
        ) as error:
            raise TileError("damaged in the zip") from error
        if len(data) != info.file_size:
            raise TileError("damaged in the zip")
        return data

    def close(self) -> None:
        self._zip.close()
        self._stream.close()


def _wrapper(images: list[str]) -> str:
    """The folders that only wrap the class folders, as a prefix of paths such as ``EuroSAT_RGB/``, or an empty text."""
    prefix = ""
    while True:
        inner = [path[len(prefix) :] for path in images]
        children = {path.split("/", 1)[0] for path in inner}
        if len(children) != 1 or not any(path.count("/") >= 2 for path in inner):
            return prefix
        prefix += children.pop() + "/"


def _label(location: str | Path, wrapper: str, listing: _Listing) -> tuple[list[str], list[RawTile]]:
    """Classes and tiles by the first folder below ``wrapper``; adds to what is left out."""
    paths = [path[len(wrapper) :] for path in listing.images]
    classes = sorted({path.split("/", 1)[0] for path in paths if "/" in path})
    if stray := sum("/" not in path for path in paths):
        listing.left_out["outside any class folder"] += stray
    for folder in listing.folders:
        name = folder.removeprefix(wrapper)
        if folder == wrapper + name and "/" not in name and name not in (*classes, "__MACOSX") and name[0] != ".":
            listing.left_out[f"folder without images: {name}"] += 1
    _check_classes(location, classes, listing.left_out)
    labels = {name: label for label, name in enumerate(classes)}
    found: dict[str, RawTile] = {}
    for path in sorted(path for path in paths if "/" in path):
        tile_id = _tile_id(path)
        if len(tile_id) > MAX_ID_LENGTH:
            raise TilefleetError(
                f"{location}: tile id {tile_id!r} is over {MAX_ID_LENGTH} characters; shorten its names"
            )
        if tile_id in found:
            raise TilefleetError(f"{location}: {found[tile_id].source} and {path} have one tile id; rename one of them")
        found[tile_id] = RawTile(tile_id, labels[path.split("/", 1)[0]], path)
    return classes, [found[tile_id] for tile_id in sorted(found)]


def _check_classes(location: str | Path, classes: list[str], left_out: Counter[str]) -> None:
    if not classes:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items())) or "it is empty"
        raise TilefleetError(f"{location}: no images in class folders ({reasons}); expected CLASS/IMAGE files")
    if {name.lower() for name in classes} <= _SPLIT_NAMES:
        raise TilefleetError(
            f"{location}: holds splits ({', '.join(classes)}), not classes; give the folder of one split"
        )
    if len(classes) == 1:
        raise TilefleetError(f"{location}: holds only one class ({classes[0]}); a model needs two or more")


def _tile_id(path: str) -> str:
    """``path`` without its ending; dots of the base name become ``_``, as tar readers end a key at the first dot."""
    pure = PurePosixPath(path)
    return str(pure.with_name(pure.stem.replace(".", "_")))


def _raise_unreadable(error: OSError) -> None:
    raise TilefleetError(f"{error.filename}: cannot be read ({error.strerror})") from error
