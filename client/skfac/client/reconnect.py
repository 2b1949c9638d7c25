"""Connects a transport again and again, with growing pauses."""

import logging
import threading
from collections.abc import Callable

import tenacity

from skfac.client.link import Link
from skfac.wire.errors import (
    ServerUnavailableError,
    ServiceError,
    SessionNotFoundError,
)

logger = logging.getLogger(__name__)

_PAUSE_S = 0.1  # between two connections, should a server drop each at once
_BACKOFF = tenacity.wait_random_exponential(multiplier=0.2, max=5.0)
_TRANSIENT = (ServerUnavailableError, SessionNotFoundError)


def keep_connected(
    connect_and_serve: Callable[[], None],
    target: object,
    link: Link,
    closed: threading.Event,
) -> None:
    """Serve one connection after the other until closed, or refused for good.

    Args:
        connect_and_serve: Returns when a connection has ended; raises a `ServiceError`
            if none came about.
        target: What it connects to, for people.
        link: Learns of a refusal, or a bug.
        closed: Ends it.
    """

    def log_first_failure(state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            error = state.outcome.exception()
            logger.warning("No server at %s yet: %s", target, error)

    connect = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(_TRANSIENT),
        wait=_BACKOFF,
        sleep=tenacity.sleep_using_event(closed),
        stop=tenacity.stop_when_event_set(closed),
        before_sleep=log_first_failure,
        reraise=True,
    )
    with link.guard():
        while not closed.is_set():
            try:
                connect(connect_and_serve)
            except _TRANSIENT:
                continue  # only when closed
            except ServiceError as error:
                logger.error("%s refuses this trainer: %s", target, error)
                link.fail(error)
                return
            closed.wait(_PAUSE_S)
