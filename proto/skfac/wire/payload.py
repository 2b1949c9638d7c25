"""Memory for tensors that a manifest declared, filled as their bytes come in.

It is taken in blocks of a few tensors, each of which is free when its tensors are gone:
the rows of a snapshot go layer by layer, as they are solved.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from skfac.wire.errors import InvalidRequestError, LimitExceededError
from skfac.wire.memory import Carved, Pool
from skfac.wire.shared_memory import Area
from skfac.wire.snapshot import TensorHeader

BLOCK_BYTES = 1024 * 1024
"""A block with so much takes no more tensors: many small blocks would cost time.

It is what a `Pool` gives from memory that is used again.
"""

_Place = tuple[int, int]
"""Where a tensor is: in which block, and where it begins there."""


class PayloadBuffer:
    """The tensors of one manifest.

    Args:
        headers: What it declares; what it says of shared memory is checked on reading.
        pinned: Whether a GPU is to copy from it.
        pool: Where else large blocks come from.

    Raises:
        LimitExceededError: If there is not enough memory.
    """

    def __init__(
        self,
        headers: Sequence[TensorHeader],
        *,
        pinned: bool = False,
        pool: Pool | None = None,
    ) -> None:
        self._headers = headers
        inline = [i for i, h in enumerate(headers) if h.shared_offset is None]
        self._shared = [i for i, h in enumerate(headers) if h.shared_offset is not None]
        self._places: dict[int, _Place] = {}
        sizes = _arrange(headers, inline, self._places, first=0)
        self._expected = self._missing = sum(sizes)
        sizes += _arrange(headers, self._shared, self._places, first=len(sizes))
        try:
            self._blocks = [_memory(nbytes, pool, pinned=pinned) for nbytes in sizes]
        except (RuntimeError, TypeError, OSError, OverflowError) as error:
            # Short memory, or a number over 64 bits.
            text = f"No memory for {sum(sizes)} bytes: {error}"
            raise LimitExceededError(text) from None
        self._views = [block.numpy().data for block in self._blocks]
        # Blocks of the payload come first, in the order in which it comes.
        self._gaps, self._gap = iter(self._views), memoryview(b"")

    @property
    def complete(self) -> bool:
        """Whether every declared byte is there."""
        return not self._missing and not self._shared

    @property
    def missing_bytes(self) -> int:
        """Declared bytes of the payload that are not there yet."""
        return self._missing

    def write(self, payload: memoryview) -> None:
        """Append the payload of a frame.

        Raises:
            InvalidRequestError: If it is longer than what is missing.
        """
        if len(payload) > self._missing:
            raise InvalidRequestError(
                f"A payload declared as {self._expected} bytes has at least "
                f"{self._expected - self._missing + len(payload)}."
            )
        self._missing -= len(payload)
        while len(payload):
            if not len(self._gap):
                self._gap = next(self._gaps)
            count = min(len(self._gap), len(payload))
            self._gap[:count] = payload[:count]
            self._gap, payload = self._gap[count:], payload[count:]

    def read_shared(self, area: Area) -> int:
        """Copy the tensors that are in shared memory, those side by side in one go.

        Returns:
            The bytes of these tensors.

        Raises:
            InvalidRequestError: If one is not where it is said to be.
        """
        area.check(self._headers)
        runs: list[tuple[int, int, int, int]] = []  # offset; block, begin and end there
        for index in self._shared:
            header, (block, begin) = self._headers[index], self._places[index]
            assert header.shared_offset is not None
            end = begin + header.nbytes
            if runs and runs[-1][1] == block:
                offset, _, first, _ = runs[-1]
                if header.shared_offset - offset == begin - first:
                    runs[-1] = offset, block, first, end
                    continue
            runs.append((header.shared_offset, block, begin, end))
        for offset, block, begin, end in runs:
            area.read(offset, self._views[block][begin:end])
        nbytes = sum(self._headers[index].nbytes for index in self._shared)
        self._shared = []
        return nbytes

    def tensors(self) -> list[Tensor]:
        """View the memory as the declared tensors.

        Returns:
            Tensors that nothing else will write to; some share their memory.
        """
        assert self.complete, "A payload is read before all of it is there."
        carved = [Carved(block) for block in self._blocks]
        found = []
        for index, header in enumerate(self._headers):
            block, begin = self._places[index]
            found.append(
                carved[block].at(begin, header.shape, header.strides, header.dtype)
            )
        return found


def _arrange(
    headers: Sequence[TensorHeader],
    indices: Sequence[int],
    places: dict[int, _Place],
    *,
    first: int,
) -> list[int]:
    # Puts the tensors of some indices side by side in blocks of their own, from the
    # number `first` on; returns the sizes of these.
    sizes: list[int] = []
    for index in indices:
        if not sizes or sizes[-1] >= BLOCK_BYTES:
            sizes.append(0)
        places[index] = first + len(sizes) - 1, sizes[-1]
        sizes[-1] += headers[index].padded_nbytes
    return sizes


def _memory(nbytes: int, pool: Pool | None, *, pinned: bool) -> Tensor:
    if pinned or pool is None:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
    return pool.take(nbytes)
