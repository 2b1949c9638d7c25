"""Shared memory that trainers on this host have offered, one region a connection."""

import logging
import threading

from skfac.v1 import preconditioning_pb2 as pb
from skfac.wire.down_queue import DownQueue
from skfac.wire.shared_memory import Region, open_region

logger = logging.getLogger(__name__)


class Regions:
    """Lets a connection's push stream and its stream of outcomes find one region.

    The push stream has the region open; when that ends so does the region. A client
    names its connection by a random token, as a session's streams need not be of one
    connection: one that was cut may linger here beside its successor.
    """

    def __init__(self, max_area_bytes: int) -> None:
        self._max_area_bytes = max_area_bytes
        self._lock = threading.Lock()
        self._queues: dict[tuple[str, bytes], DownQueue] = {}

    def __len__(self) -> int:
        return len(self._queues)

    def open(self, offer: pb.SharedRegion) -> "OpenRegion | None":
        """Open what a trainer offers.

        Returns:
            The region; None if it cannot be used.
        """
        try:
            region = open_region(offer, self._max_area_bytes)
        except OSError as error:
            logger.info("A region is not shared: %s. Its tensors go inline.", error)
            return None
        opened = OpenRegion(self, offer, region)
        queue = DownQueue(region)
        with self._lock:
            if opened.key in self._queues:
                logger.warning("A connection offered shared memory twice.")
                queue.close()
                return None
            self._queues[opened.key] = queue
        return opened

    def queue(self, session_id: str, token: bytes) -> DownQueue | None:
        """Find where the outcomes of a connection can be written.

        Returns:
            The queue, or None if the connection has no region.
        """
        return self._queues.get((session_id, token))

    def close(self, key: tuple[str, bytes]) -> None:
        """Close a region; idempotent."""
        with self._lock:
            queue = self._queues.pop(key, None)
        if queue is not None:
            queue.close()


class OpenRegion:
    """A region as the push stream that it was offered on has it.

    Attributes:
        key: Names it.
        up: Where the rows are.
    """

    def __init__(
        self, regions: Regions, offer: pb.SharedRegion, region: Region
    ) -> None:
        self.key = offer.session_id, offer.token
        self.up = region.up
        self._header = region.answered if offer.answers_in_header else None
        self._answered = 0
        self._regions = regions

    def answer(self, step: int) -> bool:
        """Answer a snapshot that was taken or known where the client looks for it.

        Returns:
            Whether that is done; else it is to be answered by a message.
        """
        if self._header is None:
            return False
        self._answered = max(self._answered, step + 1)
        try:
            self._header.write(self._answered)
        except (OSError, OverflowError):
            return False
        return True

    def close(self) -> None:
        """Close it; idempotent. `up` must not be read afterwards, nothing answered."""
        self._header = None
        self._regions.close(self.key)
