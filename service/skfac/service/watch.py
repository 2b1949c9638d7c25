"""Looks at files again and again, for changes that no call would notice."""

import logging
import threading
from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)

EVERY_S = 1.0
"""How long a change may go unnoticed."""


class Watch:
    """Calls functions every second, on a thread of its own, until it is closed."""

    def __init__(self, looks: Sequence[Callable[[], None]]) -> None:
        self._looks = looks
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name="skfac-watch", daemon=True
        )
        if looks:
            self._thread.start()

    def close(self) -> None:
        """Stop; idempotent."""
        self._closed.set()
        if self._looks:
            self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(EVERY_S):
            for look in self._looks:
                try:
                    look()
                except Exception:  # a bug must not end the watch over the others
                    logger.exception("A file could not be looked at.")
