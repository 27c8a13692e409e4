"""Which tile goes into which split and shard: pure functions of labels, contents, ids and a seed.

Order comes from hashes, so it is the same on every machine and for any order of the input, and classes are mixed in
every shard. :mod:`training.pack` applies what is decided here.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from training.shards import SPLITS

MAX_SHARD_BYTES = 256 << 20
"""A shard is closed before it grows beyond this, whatever the number of its tiles."""


def assign_splits(labels: Sequence[int], contents: Sequence[bytes], shares: Sequence[int], seed: int) -> list[str]:
    """The split of each tile, by class, so that tiles of equal content are in the same one.

    The groups of equal content of a class (that of the least label, where a group spans several) are ordered by a hash
    and cut where their tiles come nearest to the wanted ``shares`` of train, val and test. A class with groups enough
    gives at least one to each split that has a share; the first goes to train. The order of the tiles has no influence.
    """
    groups = _groups(contents)
    by_class: dict[int, list[bytes]] = defaultdict(list)
    for content, members in groups.items():
        by_class[min(labels[member] for member in members)].append(content)
    splits = [""] * len(labels)
    for of_class in by_class.values():
        order = sorted(of_class, key=lambda content: _hash(seed, content))
        cuts = _cuts([len(groups[content]) for content in order], shares)
        for split, first, last in zip(SPLITS, [0, *cuts], [*cuts, len(order)], strict=True):
            for member in (member for content in order[first:last] for member in groups[content]):
                splits[member] = split
    return splits


def find_leaks(contents: Sequence[bytes], given: Sequence[str]) -> list[str | None]:
    """For each tile of given splits, the more protected split that holds a tile of equal content; else None.

    A published test split must not change, so test is protected from val and train, and val from train.
    """
    rank = {split: place for place, split in enumerate(SPLITS)}
    holder = {
        content: max((given[member] for member in members), key=rank.__getitem__)
        for content, members in _groups(contents).items()
    }
    return [
        holder[content] if holder[content] != split else None for content, split in zip(contents, given, strict=True)
    ]


def take_val(
    labels: Sequence[int], contents: Sequence[bytes], splits: Sequence[str], shares: Sequence[int], seed: int
) -> list[str]:
    """``splits`` with a val split that is taken out of train as :func:`assign_splits` does; the others stay.

    Its share of train is val/(train+val) of ``shares``: 1/9 for 80,10,10.
    """
    taken = list(splits)
    train = [position for position, split in enumerate(splits) if split == "train"]
    parts = assign_splits([labels[i] for i in train], [contents[i] for i in train], (*shares[:2], 0), seed)
    for position, part in zip(train, parts, strict=True):
        taken[position] = part
    return taken


def plan_shards(
    tile_ids: Sequence[str], rooms: Sequence[int], splits: Sequence[str], seed: int, tiles_per_shard: int
) -> dict[str, list[int]]:
    """Shard name -> positions of its tiles: each split shuffled by a hash, closed by the number of tiles or of bytes.

    ``rooms`` are the bytes that each tile takes in a shard.
    """
    plan: dict[str, list[int]] = {}
    for split in SPLITS:
        chosen = [position for position, name in enumerate(splits) if name == split]
        shard: list[int] = []
        taken = number = 0
        for position in sorted(chosen, key=lambda i: _hash(seed, tile_ids[i].encode())):
            if not shard or len(shard) == tiles_per_shard or taken + rooms[position] > MAX_SHARD_BYTES:
                shard = plan.setdefault(f"{split}/shard-{number:06}.tar", [])
                number += 1
                taken = 0
            shard.append(position)
            taken += rooms[position]
    return plan


def count_by_class(classes: Sequence[str], labels: Sequence[int], splits: Sequence[str]) -> dict[str, dict[str, int]]:
    """Class -> split -> tiles, with zeros."""
    counts = {name: dict.fromkeys(SPLITS, 0) for name in classes}
    for label, split in zip(labels, splits, strict=True):
        counts[classes[label]][split] += 1
    return counts


def count_contradictions(labels: Sequence[int], contents: Sequence[bytes]) -> int:
    """Tiles whose pixels are also found under another label."""
    groups = _groups(contents).values()
    return sum(len(members) for members in groups if len({labels[member] for member in members}) > 1)


def warnings(counts: dict[str, dict[str, int]], shares: Sequence[int], given: Collection[str] = ()) -> Iterator[str]:
    """A line for each split that was wanted or ``given`` and has no tile at all, or none of some classes."""
    for split, share in zip(SPLITS, shares, strict=True):
        missing = [name for name, by_split in counts.items() if not by_split[split]]
        if not share and split not in given:
            continue
        if missing and len(missing) < len(counts):
            yield f"split {split} has no tile of {', '.join(missing)}"
        elif missing and split in given:
            yield f"split {split} is empty: none of its tiles is left"
        elif missing and given and split == "test":
            yield "split test is empty: the source gives splits, but no test split"
        elif missing:
            yield f"split {split} is empty: too few tiles for a share of {share}"


def _groups(contents: Sequence[bytes]) -> dict[bytes, list[int]]:
    groups: dict[bytes, list[int]] = defaultdict(list)
    for position, content in enumerate(contents):
        groups[content].append(position)
    return groups


def _cuts(sizes: Sequence[int], shares: Sequence[int]) -> list[int]:
    """Positions in ``sizes`` at which val and test begin."""
    ends = np.cumsum([0, *sizes])
    enough = len(sizes) >= np.count_nonzero(shares)
    cuts = [0]
    for done in (1, 2):
        distances = abs(ends * sum(shares) - int(ends[-1]) * sum(shares[:done]))
        nearest = len(sizes) - int(distances[::-1].argmin())  # the later of two that are equally near
        least = cuts[-1] + int(shares[done - 1] > 0 and (enough or done == 1))
        most = len(sizes) - (int(np.count_nonzero(shares[done:])) if enough else 0)
        cuts.append(min(max(nearest, least), most))
    return cuts[1:]


def _hash(seed: int, text: bytes) -> bytes:
    return hashlib.sha256(f"{seed} ".encode() + text).digest()
