"""Runs one operation on many matrices, in stacks where that is faster.

On the CPU every matrix is worked on alone, in memory of its own. What a library for
linear algebra rounds depends on how its operands are aligned: inside a stack a matrix
would not always have the bits that it has alone (measured: MKL's inverse of a 33 × 33
matrix). Nothing is lost by it: such libraries go through a stack one by one as well,
and the operands of a single matrix stay in the cache.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Operation = Callable[..., tuple[Tensor, ...]]
"""Takes stacks, their first dimension, and returns stacks of as many results."""


def faster_on(device: torch.device) -> bool:
    """Tell whether stacks are faster than single matrices.

    Returns:
        False for the CPU.
    """
    return device.type != "cpu"


def in_stacks(
    operation: Operation, *operands: Sequence[Tensor]
) -> list[tuple[Tensor, ...]]:
    """Run an operation for each place in some sequences of tensors.

    Args:
        operation: What is run, on stacks of one tensor on the CPU, and elsewhere on
            stacks of all whose operands have the same shapes.
        operands: Sequences of one length, all tensors on one device.

    Returns:
        The results for each place.
    """
    found: dict[int, tuple[Tensor, ...]] = {}
    for places in _stacks(operands):
        stacks = [_stacked([operand[i] for i in places]) for operand in operands]
        results = [stack.unbind() for stack in operation(*stacks)]
        found.update(zip(places, zip(*results, strict=True), strict=True))
    return [found[place] for place in range(len(found))]


def _stacks(operands: Sequence[Sequence[Tensor]]) -> Iterator[list[int]]:
    by_shapes: dict[object, list[int]] = {}
    for place, tensors in enumerate(zip(*operands, strict=True)):
        stacked = faster_on(tensors[0].device)
        key = tuple(tensor.shape for tensor in tensors) if stacked else place
        by_shapes.setdefault(key, []).append(place)
    yield from by_shapes.values()


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
