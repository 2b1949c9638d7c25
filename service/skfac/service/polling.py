"""Subscriptions by polling, for fronts whose callers may vanish without a word."""

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from skfac.service.engine import Engine, Subscription
from skfac.wire.errors import LimitExceededError, ServiceError, SessionNotFoundError
from skfac.wire.outcome import Outcome


@dataclass(eq=False)
class _Polled:
    subscription: Subscription
    job: str
    seen_s: float
    taking: int = 0


class PolledSubscriptions:
    """Subscriptions that end once nobody has taken from them for a while.

    An open subscription keeps the lease of its session, so one that was left behind
    would keep it for ever.

    Args:
        engine: Whose outcomes they are of.
        limit: Most of them at once: each may hold a thread of the front.
        idle_s: When they are closed.
        clock: Tells the seconds.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        limit: int,
        idle_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._limit = limit
        self._idle_s = idle_s
        self._clock = clock
        self._lock = threading.Lock()
        self._polled: dict[str, _Polled] = {}

    def open(self, session_id: str, held: Mapping[int, int]) -> str:
        """Subscribe, beginning with outcomes newer than `held`.

        Returns:
            The subscription's name.

        Raises:
            SessionNotFoundError: If the session is unknown.
            LimitExceededError: If there are too many.
        """
        (session,) = self._engine.status(session_id).sessions
        name = secrets.token_hex(16)
        with self._lock:
            if len(self._polled) >= self._limit:
                raise LimitExceededError(
                    f"{len(self._polled)} ranks receive outcomes; max_ranks = "
                    f"{self._limit}."
                )
            subscription = self._engine.subscribe(session_id, held)
            self._polled[name] = _Polled(subscription, session.job, self._clock())
        return name

    def take(self, name: str, timeout_s: float) -> tuple[str, float, list[Outcome]]:
        """Wait for outcomes that were not taken yet.

        Returns:
            The session's job; the subscription's `published_s`; the outcomes, which are
            none after `timeout_s` or if the subscription was closed meanwhile.

        Raises:
            SessionNotFoundError: If the subscription is closed.
            ServiceError: What `Subscription.take` raises.
        """
        with self._lock:
            polled = self._polled.get(name)
            if polled is None:
                raise SessionNotFoundError(
                    "There is no such subscription; it was closed, nobody took from it "
                    f"for {self._idle_s:g} s, or the server was restarted."
                )
            polled.taking += 1
        try:
            outcomes = polled.subscription.take(timeout_s)
            return polled.job, polled.subscription.published_s, outcomes
        except ServiceError:
            self.close(name)
            raise
        finally:
            with self._lock:
                polled.taking -= 1
                polled.seen_s = self._clock()

    def close(self, name: str) -> None:
        """End a subscription; idempotent."""
        with self._lock:
            polled = self._polled.pop(name, None)
        if polled is not None:
            polled.subscription.close()

    def close_idle(self) -> None:
        """End the subscriptions that nobody takes from any more."""
        end_s = self._clock() - self._idle_s
        with self._lock:
            idle = [
                name
                for name, polled in self._polled.items()
                if not polled.taking and polled.seen_s <= end_s
            ]
        for name in idle:
            self.close(name)
