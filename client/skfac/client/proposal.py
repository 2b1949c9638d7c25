"""What one rank would use now, and what all ranks make of it together."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Agreement:
    """What all ranks have in common.

    Attributes:
        alive: Whether a server may still answer every rank.
        settled: For each layer whether no rank expects anything more.
        usable: For each layer whether all ranks have one and the same version.
        unlike: For each layer whether they all have a version, but not the same.
    """

    alive: bool
    settled: list[bool]
    usable: list[bool]
    unlike: list[bool]


@dataclass(frozen=True)
class Proposal:
    """What one rank would use now, for all ranks to agree on.

    Attributes:
        step: Capture step of the versions in question.
        wait_s: How long this rank would have waited for them.
        on_time: Whether this is their deadline.
        alive: Whether a server may still answer.
        settled: For each layer whether nothing more is to be expected.
        here: For each layer the fingerprint of its version, or 0. A server that was
            restarted may make a second version of one step, of the rows that are left.
    """

    step: int
    wait_s: float
    on_time: bool
    alive: bool
    settled: tuple[bool, ...]
    here: tuple[int, ...]

    @property
    def numbers(self) -> tuple[int, ...]:
        """What the ranks take the minimum of: of `here` that is also the maximum."""
        return (self.alive, *self.settled, *self.here, *(-mine for mine in self.here))

    def agreed(self, least: Sequence[int]) -> Agreement:
        """Read what the ranks agreed on.

        Args:
            least: The minimum of the `numbers` of all ranks.

        Returns:
            The same on all ranks.
        """
        count = len(self.here)
        alive, *settled = map(bool, least[: count + 1])
        lowest = least[count + 1 : 2 * count + 1]
        highest = [-negated for negated in least[2 * count + 1 :]]
        pairs = list(zip(lowest, highest, strict=True))
        usable = [low == high != 0 for low, high in pairs]
        unlike = [0 != low != high for low, high in pairs]
        return Agreement(alive, settled, usable, unlike)
