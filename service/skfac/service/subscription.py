"""The outcomes of a session as one rank receives them."""

import threading
from collections.abc import Callable, Mapping

from skfac.service.session import Session
from skfac.wire.outcome import Outcome


class LocalSubscription:
    """A `Subscription` to one session; keeps the session's lease while it is open.

    Attributes:
        published_s: As `Subscription` has it.
    """

    def __init__(
        self,
        session: Session,
        held: Mapping[int, int],
        changed: threading.Condition,
        clock: Callable[[], float],
    ) -> None:
        self._session = session
        self._held = dict(held)
        self._changed = changed
        self._clock = clock
        self._position = 0
        self._opened_s = self.published_s = clock()
        self._closed = False
        session.subscriptions += 1

    def take(self, timeout_s: float) -> list[Outcome]:
        """Wait for outcomes that were not taken yet.

        Returns:
            They in the order they were published; empty after `timeout_s` or `close`.

        Raises:
            ServiceError: `session.end`, once every outcome was taken.
        """
        session, publisher = self._session, self._session.publisher
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._closed
                    or session.end is not None
                    or publisher.position > self._position
                ),
                timeout_s,
            )
            if self._closed:
                return []
            outcomes = publisher.after(self._position, self._held)
            oldest_s = publisher.oldest_s(self._position)
            self.published_s = max(oldest_s, self._opened_s)
            self._position = publisher.position
            if not outcomes and session.end is not None:
                raise session.end
            return outcomes

    def close(self) -> None:
        """Stop receiving; idempotent."""
        with self._changed:
            if not self._closed:
                self._closed = True
                self._session.subscriptions -= 1
                self._session.last_seen_s = self._clock()
                self._changed.notify_all()
