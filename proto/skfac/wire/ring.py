"""The server's side of the down area: written round and round, as fast as it is read.

Positions count all bytes that were ever written or skipped. The trainer tells in the
header of the region up to which of them it has read; a number that cannot be is as if
it had told nothing.
"""

import logging
import threading
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


class Ring:
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
        self._produced = self._consumed = 0
        self.written_bytes = 0

    def place(self, tensors: Sequence[Tensor]) -> Placement | None:
        """Write tensors one after the other.

        Returns:
            Where they are; None if there is no room, or no region any more.
        """
        nbytes = sum(padded(tensor.nbytes) for tensor in tensors)
        with self._lock:
            begin = None if self._closed else self._reserve(nbytes)
            if begin is None:
                return None
            offset = begin % self._capacity
            try:
                self._region.down.write(offset, list(byte_views(tensors)))
            except OSError as error:
                logger.warning("Shared memory is not used any more: %s", error)
                self._closed = True
                return None
            self._produced = begin + nbytes
            self.written_bytes += sum(tensor.nbytes for tensor in tensors)
            offsets: list[int | None] = []
            for tensor in tensors:
                offsets.append(offset if tensor.nbytes else None)
                offset += padded(tensor.nbytes)
            return Placement(offsets, self._produced)

    def close(self) -> None:
        """Close the region; idempotent."""
        with self._lock:  # or another thread would write to whatever has its number
            self._closed = True
            self._region.close()

    def _reserve(self, nbytes: int) -> int | None:
        told = self._region.read_consumed()
        if told is not None and self._consumed <= told <= self._produced:
            self._consumed = told
        if not 0 < nbytes <= self._capacity:
            return None
        begin = self._produced
        used = begin % self._capacity
        if used + nbytes > self._capacity:  # nothing is split at the end
            begin += self._capacity - used
        if self._consumed == self._produced:
            self._consumed = self._produced = begin  # what is skipped is not waited for
        return begin if begin + nbytes - self._consumed <= self._capacity else None
