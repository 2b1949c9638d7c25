"""Products of which half is known beforehand: a symmetric result, a triangular operand.

On the CPU a large matrix is worked on by blocks of rows, each with those columns only
that count, which takes 0.7 to 0.8 of the time (torch has no BLAS routine for either).
Small ones, groups and what is on a GPU are multiplied whole: they would lose more by
many calls than they would gain.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from skfac.curvature.stacks import faster_on

_BLOCK = 64
_WORTH_IT = 4 * _BLOCK  # rows; half as many gain nothing


def gram(side: Float[Tensor, "*groups n d"]) -> Float[Tensor, "*groups n n"]:
    """Multiply a matrix by its own transpose.

    Returns:
        `side sideᵀ`, exactly symmetric if it is made by blocks.
    """
    if not _by_blocks(side):
        return side @ side.mT
    found = side.new_empty(len(side), len(side))
    for begin, end in _blocks(len(side)):
        torch.mm(side[begin:end], side[:end].mT, out=found[begin:end, :end])
        found[:begin, begin:end] = found[begin:end, :begin].mT
    return found


def lower_times(
    lower: Float[Tensor, "*groups n n"],
    rows: Float[Tensor, "*groups n d"],
    *,
    out: Float[Tensor, "*groups n d"],
) -> Float[Tensor, "*groups n d"]:
    """Multiply a lower triangular matrix by rows.

    Args:
        lower: The matrix.
        rows: They.
        out: Where the result goes.

    Returns:
        `lower rows`, in `out`.
    """
    if not _by_blocks(lower):
        return torch.matmul(lower, rows, out=out)
    for begin, end in _blocks(len(lower)):
        torch.mm(lower[begin:end, :end], rows[:end], out=out[begin:end])
    return out


def _by_blocks(matrix: Tensor) -> bool:
    large = matrix.ndim == 2 and matrix.shape[0] >= _WORTH_IT
    return large and not faster_on(matrix.device)


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, size, _BLOCK):
        yield begin, min(begin + _BLOCK, size)
