"""Reading many files with a pool of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_Error = TypeVar("_Error", bound=Exception)


def read_in_order(
    read: Callable[[_Item], _Result], items: Iterable[_Item], workers: int, failure: type[_Error]
) -> Iterator[_Result | _Error]:
    """What `read` returns for each item, in the order of the items.

    Args:
        read: called in several threads at a time.
        items: its arguments.
        workers: number of threads.
        failure: an error that is given in place of the result; any other is raised.
    """

    def attempt(item: _Item) -> _Result | _Error:
        try:
            return read(item)
        except failure as error:
            return error

    remaining = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        # In portions: after an error the rest is not read.
        while portion := list(islice(remaining, 8 * workers)):
            yield from pool.map(attempt, portion)
