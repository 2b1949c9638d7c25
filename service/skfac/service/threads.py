"""The threads that gRPC runs calls on."""

import logging
from concurrent.futures import ThreadPoolExecutor

logger = logging.getLogger(__name__)


class CallThreads(ThreadPoolExecutor):
    """A pool that goes on with the threads it has where the system gives no more.

    Else the exception would end gRPC's own thread, and no call would ever be served
    again. A call that finds no thread waits for one, up to its deadline.
    """

    _short = False

    def _adjust_thread_count(self) -> None:
        # Called with the work in the queue already.
        try:
            super()._adjust_thread_count()
        except RuntimeError as error:
            if not self._short:
                logger.error(
                    "No thread can be started beside %d others (%s): calls wait. Raise "
                    "the limit of processes, or lower max_streams.",
                    len(self._threads),
                    error,
                )
            self._short = True
        else:
            self._short = False
