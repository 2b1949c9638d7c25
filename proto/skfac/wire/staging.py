"""Copies between host and device that never hold up the device's main stream.

On a CUDA device copies run on a stream of their own through pinned memory, and only
`HostCopy.wait` blocks, which is called from background threads. On the CPU there is
nothing to copy. Only this module and `skfac.client.replay` know CUDA streams.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from skfac.curvature.tensors import in_dtype, without_graph


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


@dataclass(frozen=True, eq=False)
class DeviceCopy:
    """Tensors on their way to the device."""

    _tensors: list[Tensor]
    _done: torch.cuda.Event | None

    def take(self) -> list[Tensor]:
        """Let the current stream wait for the tensors; the caller does not wait.

        Returns:
            Tensors on the device in the order they were given.
        """
        if self._done is not None:
            stream = torch.cuda.current_stream(self._tensors[0].device)
            stream.wait_event(self._done)
            for tensor in self._tensors:
                # Else the side stream could be given their memory while it is in use.
                tensor.record_stream(stream)
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

    def upload(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> DeviceCopy:
        """Copy to the device on the side stream, through pinned memory.

        Called from background threads: the copy to pinned memory is done here.

        Args:
            tensors: CPU tensors.
            dtype: What the copies are to have, unless theirs is wider.

        Returns:
            The copies, for whichever stream will use them.
        """
        if self._stream is None:
            return DeviceCopy([_widened(tensor, dtype) for tensor in tensors], None)
        with torch.cuda.stream(self._stream):
            pinned = [t if t.is_pinned() else t.pin_memory() for t in tensors]
            copies = [_widened(copy, dtype) for copy in self.to_device(*pinned)]
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        return DeviceCopy(copies, done)

    def to_host(self, tensors: Sequence[Tensor]) -> HostCopy:
        """Start to copy to pinned host memory, after the work queued so far.

        Returns:
            The copies, to wait for on another thread.
        """
        if self._stream is None:
            return HostCopy([without_graph(tensor) for tensor in tensors], None)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copies = [_pinned_copy(without_graph(tensor)) for tensor in tensors]
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        for tensor in tensors:
            # Else the allocator could hand the memory out before it is copied.
            tensor.record_stream(self._stream)
        return HostCopy(copies, done)


@cache  # torch takes as long for it as for a small product
def wider(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """Find the dtype in which products of two run.

    Returns:
        What holds the numbers of both.
    """
    return torch.promote_types(first, second)


def _widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return in_dtype(tensor, wider(tensor.dtype, dtype))


def _pinned_copy(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
