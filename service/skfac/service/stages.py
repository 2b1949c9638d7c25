"""How long the parts of the way from rows to versions take: totals and the latest."""

import threading
from collections import deque
from collections.abc import Iterable

from skfac.service.engine import LatencySummary, StageStatus

RECEIVE, ASSEMBLE, QUEUE, SOLVE = "receive", "assemble", "queue", "solve"
PUBLISH, END_TO_END = "publish", "end to end"

STAGES = (RECEIVE, ASSEMBLE, QUEUE, SOLVE, PUBLISH, END_TO_END)
"""In the order of the way; the last is all of it, as the ranks see it."""

LATEST = 512
"""How many of the latest latencies quantiles are made of."""


class StageTimes:
    """Times of all stages; any thread may add to them and read them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = dict.fromkeys(STAGES, 0)
        self._total_s = dict.fromkeys(STAGES, 0.0)
        self._latest_s = {stage: deque[float](maxlen=LATEST) for stage in STAGES}

    def add(self, stage: str, seconds: float) -> None:
        """Add a time to one of the `STAGES`."""
        with self._lock:
            self._count[stage] += 1
            self._total_s[stage] += seconds
            self._latest_s[stage].append(seconds)

    def status(self) -> tuple[StageStatus, ...]:
        """Describe the stages.

        Returns:
            Those that were timed at all, in the order of `STAGES`.
        """
        with self._lock:
            timed = [
                (stage, count, self._total_s[stage], list(self._latest_s[stage]))
                for stage, count in self._count.items()
                if count
            ]
        return tuple(
            StageStatus(stage, count, total_s, summary(latest_s))
            for stage, count, total_s, latest_s in timed
        )


def summary(latencies_s: Iterable[float]) -> LatencySummary:
    """Summarize latencies.

    Returns:
        Their quantiles; zeros if there are none.
    """
    ordered_s = sorted(latencies_s)
    if not ordered_s:
        return LatencySummary(0, 0.0, 0.0)

    def quantile(share: float) -> float:
        return ordered_s[min(int(share * len(ordered_s)), len(ordered_s) - 1)]

    return LatencySummary(len(ordered_s), quantile(0.5), quantile(0.99))
