"""Splits do not leak, keep their shares and do not depend on the order of the input; shards mix the classes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.shards import SPLITS
from training.splits import (
    MAX_SHARD_BYTES,
    assign_splits,
    count_by_class,
    count_contradictions,
    find_leaks,
    plan_shards,
    take_val,
    warnings,
)

CONTENTS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60)), min_size=1, max_size=200)
SHARES = st.tuples(st.integers(1, 100), st.integers(0, 100), st.integers(0, 100))


def assigned(tiles: list[tuple[int, int]], shares: tuple[int, int, int], seed: int = 0) -> list[str]:
    return assign_splits([label for label, _ in tiles], [str(content).encode() for _, content in tiles], shares, seed)


def owners(tiles: list[tuple[int, int]]) -> list[int]:
    """The class that each tile counts for: equal contents count for the least of their labels."""
    return [min(label for label, other in tiles if other == content) for _, content in tiles]


@given(CONTENTS, SHARES, st.integers(0, 5))
def test_equal_contents_never_land_in_two_splits(
    tiles: list[tuple[int, int]], shares: tuple[int, int, int], seed: int
) -> None:
    found: dict[int, set[str]] = {}
    for (_, content), split in zip(tiles, assigned(tiles, shares, seed), strict=True):
        found.setdefault(content, set()).add(split)
    assert all(len(splits) == 1 for splits in found.values())


@given(CONTENTS, SHARES, st.randoms(use_true_random=False))
def test_the_order_of_the_tiles_does_not_matter(
    tiles: list[tuple[int, int]], shares: tuple[int, int, int], shuffler: random.Random
) -> None:
    order = list(range(len(tiles)))
    shuffler.shuffle(order)
    before = assigned(tiles, shares)
    assert assigned([tiles[i] for i in order], shares) == [before[i] for i in order]


@given(CONTENTS, SHARES)
def test_each_class_has_its_shares_to_within_one_group(
    tiles: list[tuple[int, int]], shares: tuple[int, int, int]
) -> None:
    splits = assigned(tiles, shares)
    own = owners(tiles)
    for label in set(own):
        members = [i for i, owner in enumerate(own) if owner == label]
        sizes = [sum(tiles[j][1] == tiles[i][1] for j in members) for i in members]
        wanted = [len(members) * share / sum(shares) for share in shares]
        if all(w >= max(sizes) for w, share in zip(wanted, shares, strict=True) if share):
            for split, want in zip(SPLITS, wanted, strict=True):
                assert abs(sum(splits[i] == split for i in members) - want) <= max(sizes)


@given(CONTENTS, SHARES)
def test_a_class_with_groups_enough_is_in_every_split_that_has_a_share(
    tiles: list[tuple[int, int]], shares: tuple[int, int, int]
) -> None:
    splits = assigned(tiles, shares)
    own = owners(tiles)
    for label in set(own):
        members = [i for i, owner in enumerate(own) if owner == label]
        present = {splits[i] for i in members}
        wanted = {split for split, share in zip(SPLITS, shares, strict=True) if share}
        assert present <= wanted
        assert "train" in present
        if len({tiles[i][1] for i in members}) >= len(wanted):
            assert present == wanted


def test_another_seed_is_another_split() -> None:
    tiles = [(0, i) for i in range(100)]
    assert assigned(tiles, (80, 10, 10), seed=0) != assigned(tiles, (80, 10, 10), seed=1)
    assert assigned(tiles, (80, 10, 10)).count("val") == 10


GIVEN = st.lists(st.tuples(st.sampled_from(SPLITS), st.integers(0, 20)), max_size=100)


@given(GIVEN)
def test_without_its_leaks_a_content_is_in_its_most_protected_given_split_only(tiles: list[tuple[str, int]]) -> None:
    leaks = find_leaks([str(content).encode() for _, content in tiles], [split for split, _ in tiles])
    for (split, content), leak in zip(tiles, leaks, strict=True):
        most = max((other for other, same in tiles if same == content), key=("train", "val", "test").index)
        assert leak == (None if split == most else most)


def test_a_given_test_split_stays_whole_and_equal_tiles_of_one_split_stay_together() -> None:
    contents = [b"x", b"x", b"x", b"x", b"y", b"y", b"z", b"z"]
    given = ["train", "val", "test", "test", "train", "val", "train", "train"]
    assert find_leaks(contents, given) == ["test", "test", None, None, "val", None, None, None]


@given(CONTENTS, st.integers(0, 5))
def test_val_is_taken_out_of_train_and_nothing_else_moves(tiles: list[tuple[int, int]], seed: int) -> None:
    before = ["test" if content % 3 == 0 else "train" for _, content in tiles]
    labels, contents = [label for label, _ in tiles], [str(content).encode() for _, content in tiles]
    after = take_val(labels, contents, before, (80, 10, 10), seed)
    assert all(now == then or (now, then) == ("val", "train") for now, then in zip(after, before, strict=True))
    val = {content for (_, content), split in zip(tiles, after, strict=True) if split == "val"}
    assert not val & {content for (_, content), split in zip(tiles, after, strict=True) if split == "train"}


@pytest.mark.parametrize(("shares", "expected"), [((80, 10, 10), 20), ((80, 20, 0), 36), ((1, 0, 5), 0)])
def test_the_val_taken_has_its_share_of_train_and_val_in_every_class(shares: tuple[int, ...], expected: int) -> None:
    labels = [number % 2 for number in range(200)]
    contents = [str(number).encode() for number in range(200)]
    splits = ["train"] * 180 + ["test"] * 20
    taken = take_val(labels, contents, splits, shares, 0)
    assert taken.count("val") == expected
    assert sum(label for label, split in zip(labels, taken, strict=True) if split == "val") == expected // 2
    assert taken[180:] == splits[180:]
    assert (taken == take_val(labels, contents, splits, shares, 1)) == (expected == 0)


@given(st.lists(st.tuples(st.sampled_from(SPLITS), st.integers(1, 100)), max_size=100), st.integers(1, 9))
def test_every_tile_is_planned_once_into_a_shard_of_its_split(tiles: list[tuple[str, int]], most: int) -> None:
    ids = [f"tile{i}" for i in range(len(tiles))]
    splits = [split for split, _ in tiles]
    plan = plan_shards(ids, [room for _, room in tiles], splits, 0, most)
    assert sorted(i for positions in plan.values() for i in positions) == list(range(len(tiles)))
    for name, positions in plan.items():
        assert 0 < len(positions) <= most
        assert {splits[i] for i in positions} == {name.split("/")[0]}


def test_shards_are_numbered_and_all_but_the_last_are_full() -> None:
    plan = plan_shards([str(i) for i in range(25)], [1] * 25, ["train"] * 25, 0, 10)
    assert {name: len(positions) for name, positions in plan.items()} == {
        "train/shard-000000.tar": 10,
        "train/shard-000001.tar": 10,
        "train/shard-000002.tar": 5,
    }


def test_a_shard_is_closed_before_it_grows_too_large() -> None:
    plan = plan_shards([str(i) for i in range(6)], [MAX_SHARD_BYTES // 2] * 6, ["test"] * 6, 0, 1000)
    assert [len(positions) for positions in plan.values()] == [2, 2, 2]


def test_classes_are_mixed_in_every_shard() -> None:
    ids = [f"{name}/{i}" for name in "abcd" for i in range(100)]
    for positions in plan_shards(ids, [1] * 400, ["train"] * 400, 0, 50).values():
        assert {ids[i][0] for i in positions} == set("abcd")


def test_counts_and_warnings_say_what_a_split_lacks() -> None:
    counts = count_by_class(["a", "b"], [0, 0, 1], ["train", "val", "train"])
    assert counts == {"a": {"train": 1, "val": 1, "test": 0}, "b": {"train": 1, "val": 0, "test": 0}}
    assert list(warnings(counts, (80, 10, 10))) == [
        "split val has no tile of b",
        "split test is empty: too few tiles for a share of 10",
    ]
    assert list(warnings(counts, (80, 0, 0))) == []


def test_warnings_tell_a_split_that_was_not_given_from_one_that_is_too_small() -> None:
    counts = {"a": {"train": 2, "val": 0, "test": 0}, "b": {"train": 1, "val": 0, "test": 0}}
    assert list(warnings(counts, (80, 10, 10), ("train", "val"))) == [
        "split val is empty: none of its tiles is left",
        "split test is empty: the source gives splits, but no test split",
    ]
    counts["a"]["test"] = 1
    assert list(warnings(counts, (80, 0, 0), ("train", "test"))) == ["split test has no tile of b"]


@pytest.mark.parametrize(("labels", "expected"), [([0, 1, 1], 2), ([0, 0, 1], 0)])
def test_equal_pixels_under_two_labels_are_counted(labels: list[int], expected: int) -> None:
    assert count_contradictions(labels, [b"x", b"x", b"y"]) == expected
