"""Which positions of a sample count, and how they become rows.

A layer that uses its weight at `S` positions of a sample (pixels, tokens) sees inputs
`x̄_s` and output derivatives `g_s` there. Its two sides become rows as follows, where
`n` counts the rows of `B` samples:

| reduction   | activation rows          | derivative rows        | n     |
|-------------|--------------------------|------------------------|-------|
| `reduce`    | mean over s of x̄_s       | sum over s of g_s      | B     |
| `authors`   | mean over s of x̄_s       | mean over s of g_s     | B     |
| `subsample` | √S x̄_s at k positions    | g_s at the same k      | B · k |
| `expand`    | √S x̄_s at all positions  | g_s at all positions   | B · S |

`reduce` is exact for a linear network wherever the derivative is the same at every
position, as it is below a mean or sum over positions; in front of a further convolution
that cuts borders or strides it is an approximation. `expand` is exact where each
position has a loss of its own. `subsample` is unbiased for `expand`. `authors` is what
the SKFAC authors' code computes: a constant `S²` per layer away from `reduce`.

Sources: Grosse & Martens, "A Kronecker-factored approximate Fisher matrix for
convolution layers", ICML 2016 (`expand`); Eschenhagen et al., "Kronecker-Factored
Approximate Curvature for Modern Neural Network Architectures", NeurIPS 2023 (`expand`
and `reduce`); Tang et al., "SKFAC", CVPR 2021 (`subsample` and `authors`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from skfac.curvature.tensors import without_graph

Empty = Callable[[Sequence[int], Tensor], Tensor]
"""Makes memory for rows of a shape, in the dtype and on the device of a tensor."""

Reduction = Literal["reduce", "authors", "subsample", "expand"]


@dataclass(frozen=True, eq=False)
class Positions:
    """How the positions of one forward become rows; one value serves both sides.

    Attributes:
        reduction: What is done with them.
        picked: Flat indices of the output positions that `subsample` keeps, ascending,
            in the CPU's memory; None for the other reductions.
        count: Positions `S` that they were drawn for, or None if that is not known.

    Raises:
        ValueError: If there are picked positions without `subsample`, or none with it.
    """

    reduction: Reduction
    picked: Int[Tensor, " k"] | None
    count: int | None = None

    def __post_init__(self) -> None:
        if (self.picked is None) == (self.reduction == "subsample"):
            raise ValueError(
                "Positions are picked for the reduction 'subsample' and no other, got "
                f"{self.reduction!r} with picked={self.picked}. Use draw_positions()."
            )


def new_memory(shape: Sequence[int], like: Tensor) -> Tensor:
    """Make memory for rows: an `Empty` for those that stay in this process.

    Returns:
        A tensor of that shape, in the dtype and on the device of `like`.
    """
    return like.new_empty(shape)


def draw_positions(
    reduction: Reduction, count: int, *, keep: int, seed: int
) -> Positions:
    """Choose the positions of one forward, the same for all samples of its batch.

    Args:
        reduction: What is done with the positions.
        count: How many there are.
        keep: How many `subsample` keeps, at least 1: all of them if there are fewer.
        seed: Decides which, in the same way on every machine, by its last 64 bits.

    Returns:
        The choice; `subsample` draws without replacement.

    Raises:
        ValueError: If `keep` is below 1.
    """
    if reduction != "subsample":
        return all_positions(reduction, count)
    if keep < 1:
        raise ValueError(f"subsample must keep at least 1 position, got {keep}.")
    # On the CPU: the generators of other devices draw other numbers.
    generator = torch.Generator().manual_seed(_mixed(seed))
    order = torch.randperm(count, generator=generator)
    return Positions(reduction, order[:keep].sort().values, count)


@lru_cache(maxsize=1024)
def all_positions(reduction: Reduction, count: int) -> Positions:
    """Leave no position out, as all reductions but `subsample` do.

    Returns:
        The same value for the same arguments.
    """
    return Positions(reduction, None, count)


def mean_rows(
    values: Float[Tensor, "batch *positions d"], positions: Positions
) -> Float[Tensor, "n d"]:
    """Make rows of the activations' side; samples come one after the other.

    Returns:
        They, in memory of `values` if there is only one position.
    """
    if values.ndim == 2:
        rows = values
    elif positions.reduction in ("reduce", "authors"):
        rows = values[:, 0] if values.shape[1] == 1 else values.mean(1)
    else:
        rows = _kept(values, positions) * math.sqrt(values.shape[1])
        rows = rows.flatten(0, 1)
    return rows.contiguous()


def sum_rows(
    values: Float[Tensor, "batch *positions d"],
    positions: Positions,
    scale: float | Float[Tensor, ""],
    empty: Empty = new_memory,
) -> Float[Tensor, "n d"]:
    """Make rows of the derivatives' side, multiplied by `scale`.

    Returns:
        New memory, row by row: products round differently in another layout.
    """
    if values.ndim == 2:
        rows = values
    elif positions.reduction in ("reduce", "authors") and values.shape[1] == 1:
        rows = values[:, 0]
    elif positions.reduction == "reduce":
        rows = values.sum(1)
    elif positions.reduction == "authors":
        rows = values.mean(1)
    else:
        rows = _kept(values, positions).flatten(0, 1)
    return torch.mul(without_graph(rows), scale, out=empty(rows.shape, rows))


def by_sample(
    values: Float[Tensor, "*batch_positions d"],
) -> Float[Tensor, "batch *positions d"]:
    """Bring `[d]` or `[batch, *positions, d]` to three dimensions.

    Samples without any position have no rows: they are left out. `[batch, d]` are rows
    already.

    Returns:
        A view where possible.
    """
    if values.ndim == 1:
        return values.reshape(1, 1, -1)
    if values.ndim == 2:
        return values
    batch, positions = sample_extents(values)
    if positions == 0:
        batch, positions = 0, 1
    # Named extents, not -1: an empty batch must keep its shape.
    return values.reshape(batch, positions, values.shape[-1])


def sample_extents(values: Shaped[Tensor, "*batch_positions d"]) -> tuple[int, int]:
    """Count samples and positions of `[d]`, `[batch, d]` or `[batch, *positions, d]`.

    Returns:
        Both.
    """
    if values.ndim == 1:
        return 1, 1
    return values.shape[0], math.prod(values.shape[1:-1])


def with_bias_column(
    rows: Float[Tensor, "*groups n features"], bias: bool, empty: Empty = new_memory
) -> Float[Tensor, "*groups n d_in"]:
    """Append a column of ones if the layer has a bias.

    Returns:
        New memory, row by row: products round differently in another layout.
    """
    *extents, features = rows.shape
    joined = empty((*extents, features + bias), rows)
    ones = rows.new_ones(*extents, int(bias))
    return torch.cat([without_graph(rows), ones], -1, out=joined)


def _mixed(seed: int) -> int:
    # torch's generator on the CPU looks at 32 bits only. The finalizer of SplitMix64
    # (Steele, Lea & Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA
    # 2014) makes them depend on all 64.
    bits = seed % 2**64
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
    return (bits ^ (bits >> 31)) % 2**32


def _kept(values: Tensor, positions: Positions) -> Tensor:
    if positions.picked is None:
        return values
    return values.index_select(1, positions.picked.to(values.device))
