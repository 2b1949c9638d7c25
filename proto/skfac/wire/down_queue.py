"""The server's side of the down area: written wherever it was read, first come first.

Positions count all bytes that were ever written. The trainer tells in the header of the
region up to which of them it has read; a number that cannot be is as if it had told
nothing. What is written goes as near to the beginning of the area as it fits: a reader
that keeps up is served from the same few megabytes, which both cores have in their
cache, and not from all of the area in turns.
"""

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from skfac.wire.frames import byte_views
from skfac.wire.shared_memory import Region
from skfac.wire.snapshot import ALIGNMENT, padded

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """Where tensors were written.

    Attributes:
        offsets: Of each in the down area; None for one without elements.
        end: The position that the reader tells once it has read them.
    """

    offsets: list[int | None]
    end: int


@dataclass(frozen=True, order=True)
class _Part:
    # What was written in one go: where in the area, and the position after it.
    begin: int
    end: int
    position: int


class DownQueue:
    """Writes tensors to the region that a trainer offered, if there is room.

    It never waits. All methods may be called from any thread.

    Attributes:
        written_bytes: Bytes of all tensors so far.
    """

    def __init__(self, region: Region) -> None:
        self._region = region
        self._lock = threading.Lock()
        self._closed = False
        self._capacity = region.down.nbytes // ALIGNMENT * ALIGNMENT
        self._produced = 0
        self._unread: deque[_Part] = deque()
        self.written_bytes = 0

    def place(self, tensors: Sequence[Tensor]) -> Placement | None:
        """Write tensors one after the other.

        Returns:
            Where they are; None if there is no room, or no region any more.
        """
        nbytes = sum(padded(tensor.nbytes) for tensor in tensors)
        with self._lock:
            begin = None if self._closed else self._room_for(nbytes)
            if begin is None:
                return None
            try:
                self._region.down.write(begin, list(byte_views(tensors)))
            except OSError as error:
                logger.warning("Shared memory is not used any more: %s", error)
                self._closed = True
                return None
            self._produced += nbytes
            self._unread.append(_Part(begin, begin + nbytes, self._produced))
            self.written_bytes += sum(tensor.nbytes for tensor in tensors)
            return Placement(_offsets(tensors, begin), self._produced)

    def close(self) -> None:
        """Close the region; idempotent."""
        with self._lock:  # or another thread would write to whatever has its number
            self._closed = True
            self._region.close()

    def _room_for(self, nbytes: int) -> int | None:
        # The first place that is free and long enough: there are few parts at a time.
        if not nbytes:
            return None
        self._forget_read()
        free = 0
        for part in sorted(self._unread):
            if part.begin - free >= nbytes:
                break
            free = part.end
        return free if free + nbytes <= self._capacity else None

    def _forget_read(self) -> None:
        told = self._region.consumed.read()
        if told is None or told > self._produced:
            return
        while self._unread and self._unread[0].position <= told:
            self._unread.popleft()


def _offsets(tensors: Sequence[Tensor], begin: int) -> list[int | None]:
    offsets: list[int | None] = []
    for tensor in tensors:
        offsets.append(begin if tensor.nbytes else None)
        begin += padded(tensor.nbytes)
    return offsets
