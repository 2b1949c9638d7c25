"""How long steps of training take, and how much of that is waiting for versions."""

import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

WATCHED = 100
"""Steps whose waiting is looked at together."""

_LARGE_SHARE = 0.05


class Pace:
    """Times the steps from one to the next, whatever a trainer does in between.

    Says once if much of the time is spent waiting for versions: then `lag` is shorter
    than an engine needs, and training slower than it could be.

    Attributes:
        longest_s: The longest time so far.
    """

    def __init__(self, lag: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.longest_s = 0.0
        self._lag = lag
        self._clock = clock
        self._latest_s: float | None = None
        self._steps = 0
        self._since = (0.0, 0.0)
        self._said = lag == 0  # where waiting is what was asked for

    def step(self, waited_s: float) -> None:
        """Tell that a step begins.

        Args:
            waited_s: What steps have waited for versions so far, in all.
        """
        now_s = self._clock()
        if self._latest_s is not None:
            self.longest_s = max(self.longest_s, now_s - self._latest_s)
        self._latest_s = now_s
        if self._steps % WATCHED == 0:
            # The first ones wait for what is loaded once.
            if self._steps > WATCHED:
                self._look(now_s - self._since[0], waited_s - self._since[1])
            self._since = now_s, waited_s
        self._steps += 1

    def _look(self, spent_s: float, waited_s: float) -> None:
        if self._said or waited_s <= _LARGE_SHARE * spent_s:
            return
        self._said = True
        logger.warning(
            "%.0f %% of the last %d steps' time was waiting for versions: they take "
            "longer than lag = %d steps. A larger lag or update_every ends that; "
            "'skfac top' shows what an update takes.",
            100 * waited_s / spent_s,
            WATCHED,
            self._lag,
        )
