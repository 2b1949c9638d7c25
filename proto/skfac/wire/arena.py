"""Tensors in memory that was mapped once: who wrote them need not copy to send them."""

import math
import threading
import weakref
from bisect import insort
from collections import deque

import torch
from torch import Tensor

from skfac.wire.memory import Carved
from skfac.wire.snapshot import header_of, padded


class _Lease(weakref.ref[memoryview]):
    # Tells when the view of a part is gone. A weakref.finalize would take three times
    # as long, of a training step and for each tensor.
    begin: int
    end: int


class Slab:
    """One part of an arena, for tensors that come and go together.

    Each costs a fraction of what a part of its own does. It may be called from any
    thread.

    Args:
        memory: The part, as bytes.
    """

    def __init__(self, memory: Tensor) -> None:
        self._carved = Carved(memory)
        self._nbytes = memory.nbytes
        self._lock = threading.Lock()
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Make a tensor of any content, behind the last one.

        Returns:
            The tensor; None if it has no elements or there is no room for it.
        """
        header = header_of(dtype, shape)
        with self._lock:
            begin = self._used
            if not header.nbytes or begin + header.nbytes > self._nbytes:
                return None
            self._used = begin + header.padded_nbytes
        return self._carved.at(begin, shape, header.strides, dtype)


class Arena:
    """Hands out parts of a mapping as tensors; a part is free when its tensor is gone.

    Parts are aligned to 64 bytes and the first that fits is taken. All methods may be
    called from any thread.
    """

    def __init__(self, mapping: memoryview) -> None:
        self._mapping = mapping
        self._begin = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
        self._lock = threading.Lock()
        self._free = [(0, len(mapping))]  # (begin, end), sorted, never touching
        # Tensors end anywhere, also while this thread has the lock.
        self._returned: deque[_Lease] = deque()
        self._leases: dict[int, _Lease] = {}  # by where they begin, to keep them

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Make a tensor of any content.

        Returns:
            The tensor; None if it has no elements or there is no room for it.
        """
        count = math.prod(shape)
        if not count:
            return None
        nbytes = count * dtype.itemsize
        with self._lock:
            begin = self._take(padded(nbytes))
            if begin is None:
                return None
            # torch keeps the view, and all tensors of one storage keep torch's.
            view = self._mapping[begin : begin + nbytes]
            self._leases[begin] = lease = _Lease(view, self._returned.append)
            lease.begin, lease.end = begin, begin + padded(nbytes)
        return torch.frombuffer(view, dtype=dtype).view(shape)

    def slab(self, nbytes: int) -> Slab | None:
        """Take a part for several tensors.

        Returns:
            It; None if there is no room for it.
        """
        memory = self.empty((padded(nbytes),), torch.uint8)
        return None if memory is None else Slab(memory)

    def offset_of(self, tensor: Tensor) -> int | None:
        """Find a tensor that can be sent from where it is.

        Returns:
            Where it begins in the mapping; None if it is not in it, or not as it would
            be sent: contiguous and aligned.
        """
        offset = tensor.data_ptr() - self._begin
        inside = 0 <= offset < len(self._mapping) and tensor.device.type == "cpu"
        if not inside or not tensor.is_contiguous() or offset != padded(offset):
            return None
        return offset if tensor.nbytes else None

    @property
    def free_bytes(self) -> int:
        """Bytes that no tensor has."""
        with self._lock:
            self._take_back()
            return sum(end - begin for begin, end in self._free)

    def _take(self, nbytes: int) -> int | None:
        self._take_back()
        for index, (begin, end) in enumerate(self._free):
            if end - begin >= nbytes:
                rest = (begin + nbytes, end)
                self._free[index : index + 1] = [rest] if rest[0] < end else []
                return begin
        return None

    def _take_back(self) -> None:
        if not self._returned:
            return
        while self._returned:
            lease = self._returned.popleft()
            del self._leases[lease.begin]
            insort(self._free, (lease.begin, lease.end))
        joined: list[tuple[int, int]] = []
        for begin, end in self._free:
            if joined and joined[-1][1] == begin:
                joined[-1] = joined[-1][0], end
            else:
                joined.append((begin, end))
        self._free = joined
