"""Readers of raw tiles: class folders in a folder or a zip, with or without given splits, CIFAR batches, tables.

In goes a location, out comes a :class:`Source`: the classes, the tiles with their labels, what was left out and why.
Class folders are read here; :mod:`training.cifar` and :mod:`training.tables` read the others.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from cluster import storage
from configs.errors import TilefleetError, UsageError
from training.cifar import is_cifar, open_cifar
from training.files import Folder, Listing, Zip
from training.raw import Found, label, source_name, split_named, tile_id
from training.raw import RawTile as RawTile  # packing takes sources and their tiles from here
from training.raw import Source as Source
from training.tables import is_table, open_table


def open_source(location: str | Path) -> Source:
    """Find the tiles of a folder of class folders or a zip of one, of CIFAR batches, or of a table of paths and labels.

    Folders that only wrap the class folders are passed over. ``train/CLASS/``, ``test/CLASS/`` and ``val/CLASS/`` in
    any usual spelling are given splits; the split is then the first part of a tile's id. Raises :class:`UsageError`
    where ``location`` is none of these and :class:`TilefleetError` where it does not hold two classes of uniquely named
    images.
    """
    if not storage.exists(location):
        raise UsageError(f"{location}: no such folder, zip, table or CIFAR archive")
    if is_cifar(location):
        return open_cifar(location)
    if is_table(location):
        return open_table(location)
    files: Folder | Zip = Folder(location) if storage.is_dir(location) else Zip(location)
    try:
        listing = files.list()
        wrapper = _wrapper(listing.images)
        classes, tiles = label(location, _find(location, wrapper, listing))
    except BaseException:
        files.close()
        raise
    return Source(source_name(location), classes, tiles, dict(sorted(listing.left_out.items())), wrapper, files)


def _wrapper(images: list[str]) -> str:
    """The folders that only wrap the class folders, as a prefix of paths such as ``EuroSAT_RGB/``, or an empty text."""
    prefix = ""
    while True:
        inner = [path[len(prefix) :] for path in images]
        children = {path.split("/", 1)[0] for path in inner}
        if len(children) != 1 or not any(path.count("/") >= 2 for path in inner):
            return prefix
        prefix += children.pop() + "/"


def _find(location: str | Path, wrapper: str, listing: Listing) -> list[Found]:
    """The tiles by the class folders below ``wrapper``, or below its split folders; adds to what is left out."""
    paths = [path[len(wrapper) :] for path in listing.images]
    splits = _split_folders(location, {path.split("/", 1)[0] for path in paths if "/" in path})
    found: list[Found] = []
    for path in paths:
        first, _, rest = path.partition("/")
        inner = rest if splits else path
        if splits and rest and first not in splits:
            listing.left_out[f"outside the folders of the splits: {first}"] += 1
        elif "/" not in inner:
            listing.left_out["outside any class folder"] += 1
        else:
            split = splits.get(first, "")
            name = tile_id(f"{split}/{inner}" if split else inner)
            found.append(Found(name, inner.split("/", 1)[0], split, path))
    _count_bare_folders(wrapper, listing, paths, splits)
    if not found:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(listing.left_out.items())) or "it is empty"
        raise TilefleetError(f"{location}: no images in class folders ({reasons}); expected CLASS/IMAGE files")
    return found


def _split_folders(location: str | Path, names: Collection[str]) -> dict[str, str]:
    """Folder -> split, where ``names`` are folders of given splits; empty where they are classes.

    A folder named as the train split is one only beside another split: by itself it may well be a class.
    """
    splits = {name: split for name in names if (split := split_named(name))}
    if {"train"} < set(splits.values()):
        return splits
    if names and len(splits) == len(names):
        shown = ", ".join(sorted(names))
        raise TilefleetError(f"{location}: holds splits ({shown}), not classes, and not train beside test or val")
    return {}


def _count_bare_folders(wrapper: str, listing: Listing, paths: list[str], splits: Collection[str]) -> None:
    """Add the class folders that hold no image to what is left out."""
    depth = 2 if splits else 1
    filled = {tuple(path.split("/")[:depth]) for path in paths}
    for folder in listing.folders:
        name = folder.removeprefix(wrapper)
        parts = tuple(name.split("/"))
        hidden = any(part == "__MACOSX" or part.startswith(".") for part in parts)
        of_class = folder == wrapper + name and len(parts) == depth and (not splits or parts[0] in splits)
        if of_class and parts not in filled and not hidden:
            listing.left_out[f"folder without images: {name}"] += 1
