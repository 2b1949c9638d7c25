"""Times several things in turns, so that whatever slows the machine slows all."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass(eq=False)
class Times:
    """Seconds of each repetition, round by round.

    Attributes:
        rounds: One list a round.
    """

    rounds: list[list[float]] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        """Median of the rounds' medians."""
        return statistics.median(map(statistics.median, self.rounds))

    @property
    def mean_s(self) -> float:
        """Median of the rounds' means, which rare and slow repetitions count in."""
        return statistics.median(map(statistics.fmean, self.rounds))

    def divided_by(self, count: int) -> "Times":
        """Take each repetition for several, all of one length."""
        return Times([[s / count for s in turn] * count for turn in self.rounds])

    def ratio_to(self, other: "Times") -> float:
        """Median over the rounds of the ratio of medians."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(
            statistics.median(own) / statistics.median(its) for own, its in pairs
        )

    def mean_ratio_to(self, other: "Times") -> float:
        """Median over the rounds of the ratio of means."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(
            statistics.fmean(own) / statistics.fmean(its) for own, its in pairs
        )


def hardware(device: str) -> str:
    """Name what a device is."""
    cores = len(os.sched_getaffinity(0))
    if device == "cpu":
        return f"{cores} core(s)"
    return f"{torch.cuda.get_device_name()}, {cores} cores, torch {torch.__version__}"


def time_in_turns(
    bodies: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    repeats: int,
    budget_s: float = float("inf"),
    after_round: Callable[[], None] = lambda: None,
) -> dict[str, Times]:
    """Run all bodies in turns.

    Args:
        bodies: By name. Each has run once before the first round.
        rounds: Turns of each.
        repeats: Repetitions in a turn.
        budget_s: What ends a turn earlier, once it has one repetition.
        after_round: Called when each body had its turn.

    Returns:
        Times by name.
    """
    times = {name: Times() for name in bodies}
    for body in bodies.values():
        body()
    for _ in range(rounds):
        for name, body in bodies.items():
            spent: list[float] = []
            while len(spent) < repeats and (not spent or sum(spent) < budget_s):
                began_s = time.perf_counter()
                body()
                spent.append(time.perf_counter() - began_s)
            times[name].rounds.append(spent)
        after_round()
    return times
