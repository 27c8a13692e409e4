"""Files of a source of raw tiles: those below a folder, local or on object storage, or in a zip.

In goes a location, out come a :class:`Listing` of images and the bytes of any of them. A zip is never extracted: images
are read one at a time, with limits before anything is decompressed.
"""

from __future__ import annotations

import os
import stat
import struct
import threading
import zipfile
import zlib
from collections import Counter
from pathlib import Path, PurePosixPath

from cluster import storage
from configs.errors import TilefleetError, UsageError
from training.encoded import MAX_ENCODED_BYTES, TileError, is_image_name


class Listing:
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


class Folder:
    """The files below a folder; links that leave it are not followed."""

    def __init__(self, location: str | Path) -> None:
        self._root = storage.absolute(location).rstrip("/")

    def list(self) -> Listing:
        """All files below the folder."""
        listing = Listing()
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
        """An image, as :class:`training.raw.Files` wants it; at most one byte over the limit of its size."""
        try:
            return storage.read_bytes(storage.join(self._root, path), 0, MAX_ENCODED_BYTES + 1)
        except OSError as error:
            raise TileError(f"cannot be read: {error.strerror}") from error

    def close(self) -> None:
        """Nothing to do: no file stays open."""


class Zip:
    """The files in a zip. Raises :class:`UsageError` where it is none, :class:`TilefleetError` where it is damaged."""

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
            kinds = "neither a folder nor a zip, a table (.csv, .parquet) or a CIFAR archive (.tar.gz)"
            raise UsageError(f"{location}: {kinds}") from error

    def list(self) -> Listing:
        """All files in the zip.

        Raises for entries that an honest archive of tiles does not hold: they make all of it doubtful.
        """
        listing = Listing()
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
        """An image, as :class:`training.raw.Files` wants it."""
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
        """Close the zip."""
        self._zip.close()
        self._stream.close()


def _raise_unreadable(error: OSError) -> None:
    raise TilefleetError(f"{error.filename}: cannot be read ({error.strerror})") from error
