"""A pickle is read as a description: plain values come out, and nothing in it ever runs."""

from __future__ import annotations

import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.pickled import Call, Name, read_pickle

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.lists(inner).map(tuple),
    max_leaves=20,
)


@given(PLAIN, st.integers(0, 2))
def test_plain_values_come_out_as_they_went_in(value: object, protocol: int) -> None:
    assert read_pickle(pickle.dumps(value, protocol), set()) == value


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02}q\x01(U\x04nameq\x02U\x03seaq\x03U\x05otherq\x04]q\x05(h\x03h\x03eu.",
        b"(dp1\nS'name'\np2\nS'sea'\np3\nsS'other'\np4\n(lp5\ng3\nag3\nas.",
    ],
    ids=["protocol 2", "protocol 0"],
)
def test_dicts_and_texts_are_read_as_python_2_wrote_them(data: bytes) -> None:
    assert read_pickle(data, set()) == pickle.loads(data, encoding="latin1") == {"name": "sea", "other": ["sea", "sea"]}


def test_a_text_keeps_its_bytes() -> None:
    text = read_pickle(b"\x80\x02T\x00\x01\x00\x00" + bytes(range(256)) + b".", set())
    assert isinstance(text, str)
    assert text.encode("latin-1") == bytes(range(256))


class Attack:
    """Makes a folder as soon as it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, protocol: int) -> None:
    place = tmp_path / "made"
    data = pickle.dumps({"data": Attack(place)}, protocol)
    pickle.loads(data)
    assert place.exists()  # it is a real attack
    place.rmdir()
    with pytest.raises(ValueError, match=r"names|step"):
        read_pickle(data, {"numpy dtype"})
    assert not place.exists()


def test_even_a_name_that_is_expected_is_only_described(tmp_path: Path) -> None:
    place = tmp_path / "made"
    data = pickle.dumps(Attack(place), 0).replace(b"V", b"S'", 1).replace(b"made\n", b"made'\n", 1)
    name = f"{os.mkdir.__module__} mkdir"
    assert read_pickle(data, {name}) == Call(Name(name), (str(place),))
    assert not place.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "exhausted"),
        (b"\x80\x02T\xff\xff\xff\x7fcut", "remain"),
        (b".", "damaged"),
        (b"\x80\x02K\x01\x85", "exhausted"),
        (b"\x80\x02K\x01K\x02a.", "damaged"),
        (b"\x80\x02}K\x01K\x02s.", "a key is no text"),
        (b"\x80\x02h\x05.", "damaged"),
        (b"\x80\x02]U\x01aU\x01b\x86b.", "damaged"),
        (b"\x80\x04\x8c\x01a.", "a step SHORT_BINUNICODE"),
        (b"\x80\x02Pname\n.", "a step PERSID"),
        (b"\x80\x02\x82\x01.", "a step EXT1"),
        (b"(inumpy\ndtype\n.", "a step INST"),
    ],
)
def test_what_is_damaged_or_unknown_is_one_kind_of_error(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_pickle(data, {"numpy dtype"})


def test_a_small_pickle_cannot_take_time_or_memory_without_end() -> None:
    nested = b"\x80\x02)" + b"2\x86" * 60  # a tuple of itself twice, sixty times: its hash would take for ever
    with pytest.raises(ValueError, match="step DUP"):
        read_pickle(nested + b".", set())
    doubled = b"\x80\x02)q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
    with pytest.raises(ValueError, match="a key is no text"):
        read_pickle(doubled + b"}h%cK\x01s." % 60, set())
    assert read_pickle(b"\x80\x02K\x01r\xff\xff\xff\x7f.", set()) == 1  # the place of a memo takes no room


@given(st.binary(max_size=60), st.integers(0, 200), st.integers(0, 255))
def test_any_bytes_give_a_value_or_a_value_error(noise: bytes, at: int, value: int) -> None:
    whole = bytearray(
        pickle.dumps({"a": [1, 2.5, (None, True)] * 3, "b": (4, [5])}, 1).replace(b"X\x01\0\0\0", b"U\x01")
    )
    whole[at % len(whole)] = value
    for data in (noise, bytes(whole)):
        with suppress(ValueError):
            read_pickle(data, {"numpy dtype"})
