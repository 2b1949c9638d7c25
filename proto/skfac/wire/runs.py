"""Splits what comes one after the other into runs that fit into something."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

_T = TypeVar("_T")


def runs_within(
    limit: float, items: Iterable[_T], size: Callable[[_T], float]
) -> Iterator[list[_T]]:
    """Split items into runs, as long as they can be.

    Args:
        limit: Of the sizes of a run together; an item that is larger is alone.
        items: In the order that they stay in.
        size: What an item adds to its run.

    Yields:
        Runs, none of them empty.
    """
    run: list[_T] = []
    taken = 0.0
    for item in items:
        added = size(item)
        if run and taken + added > limit:
            yield run
            run, taken = [], 0.0
        run.append(item)
        taken += added
    if run:
        yield run
