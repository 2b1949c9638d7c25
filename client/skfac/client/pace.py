"""How long steps of training take, as one who stalls would show."""

import time
from collections.abc import Callable


class Pace:
    """Times the steps from one to the next, whatever a trainer does in between.

    Attributes:
        longest_s: The longest time so far.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.longest_s = 0.0
        self._clock = clock
        self._latest_s: float | None = None

    def step(self) -> None:
        """Tell that a step begins."""
        now_s = self._clock()
        if self._latest_s is not None:
            self.longest_s = max(self.longest_s, now_s - self._latest_s)
        self._latest_s = now_s
