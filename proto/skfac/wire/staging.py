"""Copies between host and device that never hold up the device's main stream.

On a CUDA device copies run on a stream of their own through pinned memory, and only
`HostCopy.wait` blocks, which is called from background threads. On the CPU there is
nothing to copy. This is the only module that knows CUDA streams.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class HostCopy:
    """Tensors on their way to host memory."""

    _tensors: list[Tensor]
    _done: torch.cuda.Event | None

    def wait(self) -> list[Tensor]:
        """Block until the tensors are there.

        Returns:
            CPU tensors in the order they were given.
        """
        if self._done is not None:
            self._done.synchronize()
        return self._tensors


class Staging:
    """Moves tensors between one device and host memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]

    def stream(self) -> AbstractContextManager[object]:
        """Run what is inside on the side stream, after nothing of the main stream.

        Returns:
            A context manager; on the CPU it does nothing.
        """
        return (
            nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        )

    def to_device(self, *tensors: Tensor) -> list[Tensor]:
        """Copy to the device on the current stream, without waiting.

        Args:
            tensors: CPU tensors; the copy is asynchronous if they are pinned.

        Returns:
            Tensors that work queued on the current stream may use.
        """
        return [tensor.to(self._device, non_blocking=True) for tensor in tensors]

    def to_host(self, tensors: Sequence[Tensor]) -> HostCopy:
        """Start to copy to pinned host memory, after the work queued so far.

        Returns:
            The copies, to wait for on another thread.
        """
        if self._stream is None:
            return HostCopy([tensor.detach() for tensor in tensors], None)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copies = [_pinned_copy(tensor.detach()) for tensor in tensors]
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        for tensor in tensors:
            # Else the allocator could hand the memory out before it is copied.
            tensor.record_stream(self._stream)
        return HostCopy(copies, done)


def _pinned_copy(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
