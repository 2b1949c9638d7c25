"""Keeps the latest outcomes of one session for its subscribers."""

import math
from collections import OrderedDict, deque
from collections.abc import Mapping
from itertools import takewhile

from skfac.wire.outcome import Outcome, Version
from skfac.wire.session import SessionSpec


class Publisher:
    """The outcomes that some rank may still need, numbered as they were published.

    As many as can be in flight are kept for each layer: a subscriber that is slower
    than that misses only versions whose deadline has passed.
    """

    def __init__(self, spec: SessionSpec) -> None:
        length = spec.versions_in_flight + 1
        self._numbers: list[deque[int]] = [deque(maxlen=length) for _ in spec.layers]
        self._kept: OrderedDict[int, tuple[float, Outcome]] = OrderedDict()  # by number
        self._newest: dict[int, Version] = {}
        self._published = 0

    @property
    def position(self) -> int:
        """Number of the newest outcome."""
        return self._published

    def publish(self, outcome: Outcome, now_s: float) -> None:
        """Add an outcome."""
        self._published += 1
        numbers = self._numbers[outcome.layer]
        if len(numbers) == numbers.maxlen:
            del self._kept[numbers[0]]
        numbers.append(self._published)
        self._kept[self._published] = now_s, outcome
        newest = self._newest.get(outcome.layer)
        if isinstance(outcome, Version) and (not newest or outcome.step > newest.step):
            self._newest[outcome.layer] = outcome

    def after(self, position: int, held: Mapping[int, int]) -> list[Outcome]:
        """Find what a subscriber has not seen.

        Args:
            position: Number of the newest outcome that it has seen.
            held: Newest step that it holds anyhow, by layer.

        Returns:
            Newer outcomes in the order they were published.
        """
        outcomes = (outcome for _, outcome in reversed(self._newer(position)))
        return [o for o in outcomes if o.step > held.get(o.layer, -1)]

    def oldest_s(self, position: int) -> float:
        """Find when the first outcome after a position was published.

        Returns:
            The time of the oldest that is kept; infinity if there is none.
        """
        newer = self._newer(position)
        return newer[-1][0] if newer else math.inf

    def newest_versions(self) -> dict[int, Version]:
        """Copy the newest preconditioners.

        Returns:
            They by layer.
        """
        return dict(self._newest)

    def _newer(self, position: int) -> list[tuple[float, Outcome]]:
        # From the end: all subscribers ask this under one lock, of thousands of layers.
        newer = takewhile(lambda number: number > position, reversed(self._kept))
        return [self._kept[number] for number in newer]
