"""What there is to classify: archives behind the locations that a user names.

An archive is a tar, plain or compressed (gzip, bzip2, xz, zstd), a zip, a folder of images, a list of paths or a single
image. :mod:`inference.plan` cuts them into chunks, :mod:`inference.readers` makes those tiles again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from cluster import storage
from configs.errors import TilefleetError, UsageError
from inference.lists import LISTS
from inference.plan import PLAN as PLAN
from inference.readers import read_chunk as read_chunk
from inference.scan import is_tile_name, walk_files

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
ENDINGS = (".tar", ".zip", *COMPRESSED)
"""File name endings, lower case, that are taken for archives; what such a file is, its content decides."""


def list_archives(locations: Sequence[str]) -> list[str]:
    """Archives behind files, folders (searched through) and globs: absolute, sorted, each once.

    A folder gives the archives below it and, if there are images too, itself, for all images below it; so a pack
    output gives its shards. Lists of paths (``.txt``, or ``.csv`` and ``.parquet`` with a column ``path``) count only
    where a location ends as they do, and so names them. Images that are named one by one, or by a glob, are archives of
    their own here, and belong to their folder in the plan. In a URI, ``*`` also matches ``/``.

    Raises :class:`UsageError` for a location without any.
    """
    if not locations:
        raise UsageError("no archive given: name tar or zip files, images, folders that hold them, lists, or globs")
    found = {one for location in locations for one in _expand(storage.absolute(location))}
    folders = {one.rstrip("/") for one in found if one.endswith("/")}
    files = {one for one in found if not one.endswith("/")}
    archives = {one for one in files if not (is_tile_name(_name(one)) and _is_below(one, folders))}
    archives |= {one for one in folders if not _is_below(one, folders)}
    for archive in archives:
        try:
            archive.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{archive!r}: its name is not UTF-8; rename it") from error
    return sorted(archives)


def _expand(location: str) -> set[str]:
    """Archives behind one location; a folder of images ends in ``/``."""
    lists = LISTS if location.lower().endswith(LISTS) else ()
    if storage.exists(location):
        if storage.is_dir(location):
            found = _in_folder(location)
        else:
            is_file = storage.is_uri(location) or Path(location).is_file()  # a pipe would be waited for
            found = _chosen([location] if is_file else [], lists)
    elif not any(wildcard in location for wildcard in "*?["):
        raise UsageError(f"{location}: no such file or folder")
    elif storage.is_uri(location):
        folder = re.split(r"[*?\[]", location, maxsplit=1)[0].rpartition("/")[0]
        below = storage.list_files(folder, recursive=True)
        found = _chosen((name for name in below if fnmatchcase(name, location)), lists)
    else:
        pattern = Path(location)
        matches = list(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
        found = _chosen((str(match) for match in matches if match.is_file()), lists)
        found = found.union(*(_in_folder(str(match)) for match in matches if match.is_dir()))
    if not found:
        kinds = f"{', '.join(ENDINGS)}, images, or a list of paths named by itself"
        raise UsageError(f"{location}: no archive there ({kinds})")
    return found


def _in_folder(folder: str) -> set[str]:
    folder, found = folder.rstrip("/") + "/", set()
    try:
        for name in walk_files(folder):
            if name.lower().endswith(ENDINGS) and not _name(name).startswith("."):
                found.add(folder + name)
            elif folder not in found and is_tile_name(name):
                found.add(folder)
    except PermissionError as error:
        raise TilefleetError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return found


def _chosen(files: Iterable[str], lists: tuple[str, ...]) -> set[str]:
    return {
        file
        for file in files
        if is_tile_name(_name(file)) or (file.lower().endswith(ENDINGS + lists) and not _name(file).startswith("."))
    }


def _is_below(location: str, folders: set[str]) -> bool:
    while location := location.rpartition("/")[0]:
        if location in folders:
            return True
    return False


def _name(location: str) -> str:
    return location.rpartition("/")[2]
