"""Work done ahead of its use by threads, in order and within a bound: it hides delays and holds few results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


def in_order(work: Callable[[Given], Made], items: Iterable[Given], threads: int) -> Iterator[Made]:
    """``work`` of each of ``items`` in their order; at most twice as many results as ``threads`` wait to be taken.

    Raises what ``work`` raises, at its place in the order.
    """
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                if len(waiting) == 2 * threads:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(work, item))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
