"""What a pickle says, without doing it: no code of a pickle can run here, whatever it holds.

In go the bytes of a pickle of protocol 0 to 2, out come plain values. A pickle is a program; of its steps only those
are known that build lists, dicts, tuples, numbers and texts. What would call something becomes a :class:`Call`, a
description that nobody follows, and even that only for names that the caller expects.
"""

from __future__ import annotations

import pickletools
from collections.abc import Set
from dataclasses import dataclass
from typing import Any


@dataclass
class Call:
    """What a pickle says about an object: the function or class it names, the arguments, the state to set."""

    function: object
    arguments: object
    state: object = None


@dataclass(frozen=True)
class Name:
    """A function or class that a pickle names, as ``module name``."""

    text: str


def read_pickle(data: bytes, names: Set[str]) -> object:
    """The value that a pickle describes; Python 2's texts become ``str``, a character a byte (Latin-1).

    ``names`` are the functions and classes it may name. Keys of dicts must be texts. Raises :class:`ValueError` for a
    pickle that is damaged, holds other steps or names something else.
    """
    machine = _Machine(names)
    try:
        for step, argument, _ in pickletools.genops(data):
            if step.name != "STOP":
                machine.do(step.name, argument)
        return machine.stack.pop()
    except (TypeError, LookupError, AttributeError, OverflowError) as error:
        raise ValueError("damaged") from error


class _Machine:
    def __init__(self, names: Set[str]) -> None:
        self.stack: list[Any] = []
        self._names = names
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def do(self, step: str, argument: Any) -> None:
        stack = self.stack
        match step:
            case "PROTO":
                pass
            case "MARK":
                self._marks.append(len(stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[step])
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "FLOAT" | "BINFLOAT":
                stack.append(argument)
            case "STRING" | "BINSTRING" | "SHORT_BINSTRING":
                stack.append(argument)
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_TUPLE":
                stack.append({"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}[step]())
            case "LIST":
                stack.append(self._take())
            case "DICT":
                stack.append(_pairs(self._take()))
            case "TUPLE":
                stack.append(tuple(self._take()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple([stack.pop() for _ in range(int(step[-1]))][::-1]))
            case "APPEND":
                value = stack.pop()
                stack[-1].append(value)
            case "APPENDS":
                values = self._take()
                stack[-1].extend(values)
            case "SETITEM" | "SETITEMS":
                values = self._take() if step == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
                stack[-1].update(_pairs(values))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[int(argument)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[int(argument)])
            case "GLOBAL":
                if argument not in self._names:
                    raise ValueError(f"it names {argument[:80]!r}")
                stack.append(Name(argument))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(Call(function, arguments))
            case "BUILD":
                state = stack.pop()
                stack[-1].state = state
            case _:
                raise ValueError(f"it has a step {step}")

    def _take(self) -> list[Any]:
        """The values above the last mark."""
        start = self._marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values


def _pairs(values: list[Any]) -> dict[str, Any]:
    keys = values[::2]
    if not all(isinstance(key, str) for key in keys):  # the hash of nested tuples may take for ever
        raise ValueError("a key is no text")
    return dict(zip(keys, values[1::2], strict=True))
