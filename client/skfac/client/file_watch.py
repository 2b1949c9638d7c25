"""Notices that the files of credentials have changed while a connection is there."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from skfac.wire.credentials import Credentials
from skfac.wire.errors import ConfigurationError

logger = logging.getLogger(__name__)

_EVERY_S = 1.0


class FileWatch:
    """Compares the files with what they were when it was made.

    Attributes:
        changed: Whether they have been seen to change.
    """

    def __init__(self, credentials: Credentials | None) -> None:
        self.changed = False
        self._credentials = credentials
        self._before = credentials.signature() if credentials is not None else ()

    @contextmanager
    def watching(self, on_change: Callable[[], None]) -> Iterator[None]:
        """Look at the files each second, on a thread of its own if there are any.

        Args:
            on_change: Called on that thread, each second from then on.

        Yields:
            Nothing.
        """
        if self._credentials is None or not self._credentials.files:
            yield
            return
        stop = threading.Event()
        watch = threading.Thread(
            target=self._look,
            args=(self._credentials, stop, on_change),
            name="skfac-files",
            daemon=True,
        )
        watch.start()
        try:
            yield
        finally:
            stop.set()
            watch.join()

    def _look(
        self,
        credentials: Credentials,
        stop: threading.Event,
        on_change: Callable[[], None],
    ) -> None:
        seen = self._before
        while not stop.wait(_EVERY_S):
            if (found := credentials.signature()) == self._before:
                continue
            try:
                credentials.read_tls()
                credentials.read_token()
            except ConfigurationError as error:  # the other half may be on its way
                if found != seen:
                    logger.warning("%s The connection stays as it is.", error)
                seen = found
                continue
            self.changed = True
            on_change()  # each time: there may have been nothing to end yet
