"""Kernels that a GPU is given as one, once they have run a few times.

To start a kernel costs the trainer's thread ten microseconds, and torch's operator
around it some more: a step of milliseconds has no room for a hundred of them. A CUDA
graph costs as much as one.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Generic, TypeVar

import torch

logger = logging.getLogger(__name__)

RUNS_BEFORE = 3
"""How often a computation runs by itself: that loads what it needs, and shows that it
is asked for again."""

_T = TypeVar("_T")


class Replay(Generic[_T]):
    """A computation on tensors that stay where they are.

    On a GPU its results stay where they are, too, and each run overwrites those of the
    one before. Elsewhere it just runs.

    Args:
        body: Reads tensors that nobody moves, waits for nothing and returns tensors. It
            is called for all runs, or for the first few alone.
        device: Where the tensors are.
    """

    def __init__(self, body: Callable[[], _T], device: torch.device) -> None:
        self._body = body
        self._device = device
        self._runs = 0
        self._recorded: tuple[torch.cuda.CUDAGraph, _T] | None = None

    def __call__(self) -> _T:
        """Run it on the current stream.

        Returns:
            Its results, which the next run may overwrite.
        """
        self._runs += 1
        if self._device.type == "cuda" and self._runs == RUNS_BEFORE + 1:
            self._recorded = self._record()
        if self._recorded is None:
            return self._body()
        graph, results = self._recorded
        graph.replay()
        return results

    def _record(self) -> tuple[torch.cuda.CUDAGraph, _T] | None:
        graph = torch.cuda.CUDAGraph()
        stream = _recording_stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(stream):
                # Other threads go on: they copy versions, or load data.
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    results = self._body()
                finally:
                    graph.capture_end()
        except RuntimeError as error:  # all that CUDA raises; the body runs by itself
            logger.warning("Kernels are started one by one: %s", error)
            return None
        return graph, results


@cache  # each stream that multiplies keeps memory for it
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
