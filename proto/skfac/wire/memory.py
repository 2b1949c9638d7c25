"""Memory of large tensors that is used again once they are gone.

Fresh memory costs a page fault for each 4 KiB, about as much time as filling it. What
is received has the same sizes again and again, so that a few blocks do for all of it.
"""

import mmap
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

_LEAST_BYTES = 1024 * 1024  # smaller blocks are well served by the C library
_MADV_HUGEPAGE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)


def tensor_over(view: memoryview, freed: Callable[[], object]) -> Tensor:
    """Make a tensor of memory, and learn when nothing refers to that any more.

    Args:
        view: The memory, not empty; made for this call and not kept.
        freed: Called once, on any thread, when the last tensor over it is gone. It must
            take no lock.

    Returns:
        Its bytes.
    """
    # torch keeps the view, and all tensors of one storage keep torch's.
    weakref.finalize(view, freed).atexit = False
    return torch.frombuffer(view, dtype=torch.uint8)


class Carved:
    """Tensors at places of one piece of memory, each made by one operation.

    Args:
        memory: The piece, as bytes.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self._typed: dict[torch.dtype, Tensor] = {}

    def at(
        self,
        begin: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Tensor:
        """View a part as a tensor; `narrow` and `view` would be two operations.

        Returns:
            The tensor that begins at the byte `begin`, a multiple of its items' size.
        """
        if dtype not in self._typed:
            self._typed[dtype] = self.memory.view(dtype)
        return self._typed[dtype].as_strided(shape, strides, begin // dtype.itemsize)


class Pool:
    """Blocks for what one receiver gets.

    It keeps what comes back up to as much as was in use at once, and all of that goes
    with it. Only one thread may take; blocks come back from any.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        self._returned: deque[mmap.mmap] = deque()
        self._used_bytes = self._peak_bytes = 0

    @property
    def free_bytes(self) -> int:
        """Bytes of the blocks that nobody uses."""
        self._take_back()
        return sum(map(len, self._free))

    def take(self, nbytes: int) -> Tensor:
        """Get memory of any content.

        Returns:
            That many bytes, aligned to 64.

        Raises:
            OSError: If there is not enough memory.
            OverflowError: If no address space has so much.
            RuntimeError: If there is not enough memory for a small block.
        """
        if nbytes < _LEAST_BYTES:
            return torch.empty(nbytes, dtype=torch.uint8)
        self._take_back()
        fitting = (b for b in self._free if nbytes <= len(b) <= 2 * nbytes)
        block = min(fitting, key=len, default=None)
        if block is None:
            block = _map(nbytes)
        else:
            self._free.remove(block)
        self._used_bytes += len(block)
        self._peak_bytes = max(self._peak_bytes, self._used_bytes)
        returned = self._returned
        return tensor_over(memoryview(block)[:nbytes], lambda: returned.append(block))

    def _take_back(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            self._used_bytes -= len(block)
            self._free.append(block)
        excess = sum(map(len, self._free)) + self._used_bytes - self._peak_bytes
        while excess > 0:
            excess -= len(self._free.pop(0))


def _map(nbytes: int) -> mmap.mmap:
    # Private, or a forked child would share what is received later.
    block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if _MADV_HUGEPAGE is not None:
        with suppress(OSError):  # of a kernel that was built without them
            block.madvise(_MADV_HUGEPAGE)
    return block
