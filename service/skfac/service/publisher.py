"""Keeps the latest outcomes of one session for its subscribers."""

from collections import deque
from collections.abc import Mapping

from skfac.wire.outcome import Outcome, Version
from skfac.wire.session import SessionSpec


class Publisher:
    """The outcomes that some rank may still need, numbered as they were published.

    As many as can be in flight are kept for each layer: a subscriber that is slower
    than that misses only versions whose deadline has passed.
    """

    def __init__(self, spec: SessionSpec) -> None:
        length = spec.versions_in_flight + 1
        self._kept: list[deque[tuple[int, Outcome]]] = [
            deque(maxlen=length) for _ in spec.layers
        ]
        self._newest: dict[int, Version] = {}
        self._published = 0

    @property
    def position(self) -> int:
        """Number of the newest outcome."""
        return self._published

    def publish(self, outcome: Outcome) -> None:
        """Add an outcome."""
        self._published += 1
        self._kept[outcome.layer].append((self._published, outcome))
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
        if position == self._published:
            return []
        numbered = [entry for kept in self._kept for entry in kept]
        return [
            outcome
            for number, outcome in sorted(numbered, key=lambda entry: entry[0])
            if number > position and outcome.step > held.get(outcome.layer, -1)
        ]

    def newest_version(self, layer: int) -> Version | None:
        """Find the newest preconditioner of a layer.

        Returns:
            It, or None if there is none.
        """
        return self._newest.get(layer)
