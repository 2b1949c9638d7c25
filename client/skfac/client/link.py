"""What the transport of one server tells the store."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from skfac.wire.errors import ServerUnavailableError, ServiceError
from skfac.wire.outcome import LossReason, Outcome

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

    def newest(self) -> dict[int, int]:
        """See `Link.newest`."""


class Link:
    """The store as one server's transport sees it."""

    def __init__(self, listener: Listener, server: int) -> None:
        self._listener = listener
        self._server = server

    def receive(self, outcomes: list[Outcome]) -> list[int]:
        """Take what the server published; what nobody expects is counted and dropped.

        Returns:
            The steps among them that this server owes nothing of any more.
        """
        return self._listener.receive(self._server, outcomes)

    def lose(self, step: int, reason: LossReason, message: str) -> None:
        """Give up what the server owes of a step."""
        self._listener.lose(self._server, step, reason, message)

    def set_link(self, *, up: bool) -> None:
        """Tell whether the server is connected; nobody waits for one that is not."""
        self._listener.set_link(self._server, up=up)

    def fail(self, error: ServiceError) -> None:
        """Tell that the server will never take this trainer's snapshots."""
        self._listener.fail(self._server, error)

    def newest(self) -> dict[int, int]:
        """Find the newest version of each layer that is here.

        Returns:
            Its step by layer; layers without any are absent.
        """
        return self._listener.newest()

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
