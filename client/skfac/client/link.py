"""What the transport of one server tells the store."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from skfac.client.step_log import StepLog
from skfac.wire.errors import ServerUnavailableError, ServiceError
from skfac.wire.outcome import LossReason, Outcome, Version

logger = logging.getLogger(__name__)


class Listener(Protocol):
    """Keeps what several servers report; may be called from any thread."""

    def receive(self, server: int, outcomes: list[Outcome]) -> list[int]:
        """See `Link.receive`."""

    def lose(self, server: int, step: int, reason: LossReason, message: str) -> None:
        """See `Link.lose`."""

    def set_link(self, server: int, *, up: bool) -> None:
        """See `Link.set_link`."""

    def fail(self, server: int, error: ServiceError) -> None:
        """See `Link.fail`."""

    def held(self, server: int) -> dict[int, int]:
        """See `Link.held`."""


class Link:
    """The store as one server's transport sees it."""

    def __init__(
        self, listener: Listener, server: int, log: StepLog | None = None
    ) -> None:
        self._listener = listener
        self._server = server
        self._log = log or StepLog()

    def receive(self, outcomes: list[Outcome]) -> list[int]:
        """Take what the server published; what nobody expects is counted and dropped.

        Returns:
            The steps among them that this server owes nothing of any more.
        """
        settled = self._listener.receive(self._server, outcomes)
        solved = {o.step for o in outcomes if isinstance(o, Version)}
        self._log.arrived(self._server, [step for step in settled if step in solved])
        return settled

    def lose(self, step: int, reason: LossReason, message: str) -> None:
        """Give up what the server owes of a step."""
        self._listener.lose(self._server, step, reason, message)

    def set_link(self, *, up: bool) -> None:
        """Tell whether the server is connected; nobody waits for one that is not."""
        self._listener.set_link(self._server, up=up)

    def fail(self, error: ServiceError) -> None:
        """Tell that the server will never take this trainer's snapshots."""
        self._listener.fail(self._server, error)

    def held(self) -> dict[int, int]:
        """Find up to which step nothing is wanted of this server.

        While it was away, newer versions may have come from another one; what it still
        owes is wanted nevertheless.

        Returns:
            By layer the step of the newest version that is here, if this server owes
            none before it; layers without any are absent.
        """
        return self._listener.held(self._server)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Turn a bug in a transport's thread into a failure that is said and counted.

        Yields:
            Nothing.
        """
        try:
            yield
        except Exception as error:
            logger.exception("The transport failed; no more versions will come.")
            self.set_link(up=False)
            self.fail(ServerUnavailableError(f"{type(error).__name__}: {error}"))
