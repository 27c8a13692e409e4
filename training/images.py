"""The images of a shard set, a tar, a folder or a single file: which there are, and where the bytes of each lie.

In goes a location, out comes an :class:`Entry` for each image, not yet read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from cluster import storage
from configs.errors import TilefleetError, UsageError
from training.encoded import MAX_ENCODED_BYTES, TileError, is_image_name
from training.shards import INDEX, load_index, load_tiles, scan_tar


@dataclass(frozen=True)
class Entry:
    """One image: the group it belongs to (its class where that is known), its caption, where its encoded bytes lie."""

    group: str
    caption: str
    location: str
    offset: int = 0
    size: int = MAX_ENCODED_BYTES + 1  # one over the limit: a larger file is refused without its being read whole

    def read(self) -> bytes:
        """Its encoded bytes; raises :class:`TileError` where they cannot be read."""
        try:
            return storage.read_bytes(self.location, self.offset, self.size)
        except OSError as error:
            raise TileError(f"cannot be read: {error.strerror}") from error


def list_images(location: str, split: str | None = None) -> list[Entry]:
    """The images of ``location``, in its order; ``split`` limits a shard set to one of its splits.

    Raises :class:`UsageError` where there is no such path or split, :class:`TilefleetError` where there are no images.
    """
    if not storage.exists(location):
        raise UsageError(f"{location}: no such file or folder")
    is_set = storage.exists(storage.join(location, INDEX))
    if split is not None and not is_set:
        raise UsageError(f"{location}: --split needs a shard set, and this is none; leave it out")
    name = location.rsplit("/", 1)[-1]
    if is_set:
        entries = _of_shards(location, split)
    elif storage.is_dir(location):
        entries = _of_folder(location)
    else:
        entries = [Entry("", name, location)] if is_image_name(name) else _of_tar(location)
    if not entries:
        raise TilefleetError(f"{location}: holds no images")
    return entries


def _of_shards(root: str, split: str | None) -> list[Entry]:
    index = load_index(root)
    if split is not None:
        index.require(root, split)
    table = load_tiles(root, split).select(["label", "shard", "offset", "size"])
    names = [index.classes[label] for label in table["label"].to_pylist()]
    places = zip(*(table[column].to_pylist() for column in ("shard", "offset", "size")), strict=True)
    return [
        Entry(name, name, storage.join(root, shard), offset, size)
        for name, (shard, offset, size) in zip(names, places, strict=True)
    ]


def _of_folder(root: str) -> list[Entry]:
    entries = []
    for location in storage.list_files(root, recursive=True):
        path = PurePosixPath(location[len(root.rstrip("/")) + 1 :])
        if is_image_name(str(path)):
            entries.append(Entry(path.parent.name, path.parent.name or path.name, location))
    return entries


def _of_tar(location: str) -> list[Entry]:
    with storage.open_input(location) as stream:
        scan = scan_tar(stream)
    if scan.damage and not scan.members:
        raise TilefleetError(f"{location}: neither an image nor a tar of images ({scan.damage})")
    return [
        Entry("", PurePosixPath(m.name).name, location, m.offset, min(m.size, MAX_ENCODED_BYTES + 1))
        for m in scan.members
        if is_image_name(m.name) and not m.refused
    ]
