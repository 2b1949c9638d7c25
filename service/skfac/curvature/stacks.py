"""Runs one operation on many matrices, in stacks where that is faster.

On the CPU every matrix is worked on alone, in memory of its own. What a library for
linear algebra rounds depends on how its operands are aligned: inside a stack a matrix
would not always have the bits that it has alone (measured: MKL's inverse of a 33 × 33
matrix). Nothing is lost by it: such libraries go through a stack one by one as well,
at up to half the speed for products, and the operands of one matrix stay in the cache.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import cast

import torch
from torch import Tensor

Operation = Callable[..., tuple[Tensor, ...]]
"""Takes tensors and returns tensors, or stacks of them in a new first dimension."""

Number = Tensor | float
"""A scalar, in a stack one for each place; on the CPU a plain number will do."""


def faster_on(device: torch.device) -> bool:
    """Tell whether stacks are faster than single matrices.

    Returns:
        False for the CPU.
    """
    return device.type != "cpu"


def in_stacks(
    operation: Operation, first: Sequence[Tensor], *others: Sequence[Number]
) -> list[tuple[Tensor, ...]]:
    """Run an operation for each place in some sequences of tensors.

    Args:
        operation: What is run: on single tensors on the CPU, elsewhere on stacks of all
            whose operands have the same shapes.
        first: The first operand of each place, all on one device.
        others: Further operands there; numbers come from `numbers_for`.

    Returns:
        The results for each place.
    """
    whole = list(zip(first, *others, strict=True))
    if not first or not faster_on(first[0].device):
        return [operation(*operands) for operands in whole]
    tensors_of = cast(list[tuple[Tensor, ...]], whole)  # see `numbers_for`
    by_shapes: dict[tuple[torch.Size, ...], list[int]] = {}
    for place, tensors in enumerate(tensors_of):
        shapes = tuple(tensor.shape for tensor in tensors)
        by_shapes.setdefault(shapes, []).append(place)
    found: dict[int, tuple[Tensor, ...]] = {}
    for places in by_shapes.values():
        stacks = [
            torch.stack(operands)
            for operands in zip(*(tensors_of[i] for i in places), strict=True)
        ]
        results = [stack.unbind() for stack in operation(*stacks)]
        found.update(zip(places, zip(*results, strict=True), strict=True))
    return [found[place] for place in range(len(first))]


def read_numbers(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Read small tensors of one device and dtype, waiting for a GPU once.

    Returns:
        The numbers of each.
    """
    if not tensors or not faster_on(tensors[0].device):
        return [list(map(float, tensor.reshape(-1).tolist())) for tensor in tensors]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    numbers = iter(flat.double().tolist())
    return [list(islice(numbers, tensor.numel())) for tensor in tensors]


def numbers_on(device: torch.device, values: Sequence[float]) -> Tensor:
    """Copy numbers to a device, without waiting for what it does.

    Returns:
        They, in float64.
    """
    pinned = device.type == "cuda"
    numbers = torch.tensor(values, dtype=torch.float64, pin_memory=pinned)
    return numbers.to(device, non_blocking=True)


def numbers_for(device: torch.device, values: Sequence[float]) -> Sequence[Number]:
    """Bring numbers to where each is an operand of `in_stacks`, without waiting.

    Returns:
        One for each place.
    """
    return numbers_on(device, values).unbind() if faster_on(device) else values


def for_each(numbers: Number, like: Tensor) -> Number:
    """Give numbers the dimensions to calculate with a tensor, or a stack of them.

    Args:
        numbers: A scalar, or one for each place of the stack.
        like: The tensor.

    Returns:
        A view with as many dimensions as `like`; a plain number as it is.
    """
    if not isinstance(numbers, Tensor):
        return numbers
    return numbers.reshape(*numbers.shape, *[1] * (like.ndim - numbers.ndim))
