"""Damped inverses of Kronecker factors, from the rows they are made of.

The factor is `A = Xᵀ X / n` for rows `X: [n, d]`. With `n < d` it has rank at most
`n`, and with `U = Xᵀ/√n` and `L Lᵀ = Uᵀ U + λ I` (only `n × n`) the inverse is

    (A + λ I)⁻¹ = (I - V Vᵀ) / λ,    V = U L⁻ᵀ,

which is `Xᵀ M⁻ᵀ` with `M Mᵀ = X Xᵀ + n λ I`, so that nothing is divided by `n`. The
`d × d` inverse is never formed, sent or applied. Otherwise the `d × d` matrix is
inverted by Cholesky. With groups the factor is block diagonal: all of this holds for
each block, under one damping.

Source: Tang et al., "SKFAC: Training Neural Networks with Faster
Kronecker-Factored Approximate Curvature", CVPR 2021. Deviations: products and
factorizations run in float64, because the error inside the span of the rows is
about eps·κ with κ = (λ_max + λ)/λ, and the matrices are small. `V` is a product with
the explicit `L⁻¹`: its error is of the same order, and products run at several times
the speed of triangular solves.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from jaxtyping import Float
from torch import Tensor

from skfac.curvature.damped import DampedFactor, NoInverse
from skfac.curvature.factor import Moment, moment_of
from skfac.curvature.halves import lower_times
from skfac.curvature.inverse import (
    DenseInverse,
    DiagonalInverse,
    FactorInverse,
    LowRankInverse,
)
from skfac.curvature.stacks import (
    Number,
    for_each,
    in_stacks,
    numbers_for,
    read_numbers,
)


def invert_factor(
    rows: Float[Tensor, "*groups n dim"], *, damping: float
) -> FactorInverse:
    """Invert the damped second moment `Xᵀ X / n + λ I` of `rows`.

    Args:
        rows: `X`, one row per example, finite, float32 or float64. Not modified.
        damping: `λ > 0`, added to every eigenvalue of the factor.

    Returns:
        A `LowRankInverse` if `n < d`, else a `DenseInverse`; on the device and in the
        dtype of `rows`.

    Raises:
        ValueError: If there are no rows, they are not finite, or `damping` is not
            positive.
        torch.linalg.LinAlgError: If the damped factor is not positive definite, or so
            badly conditioned that the inverse would not be in the dtype of `rows`.
    """
    moment = moment_of(rows, count=rows.shape[-2])
    return invert_moment(moment, damping=damping, dtype=rows.dtype)


def invert_moment(
    moment: Moment, *, damping: float, dtype: torch.dtype
) -> FactorInverse:
    """Invert the damped factor of a moment.

    Args:
        moment: `weight · A`.
        damping: `λ > 0`; see `DampedFactor`.
        dtype: What the result is rounded to.

    Returns:
        A `LowRankInverse` of fewer rows than `d`, a `DiagonalInverse` of a diagonal,
        else a `DenseInverse`; on the device of `moment`.

    Raises:
        ValueError: If `damping` is not positive.
        torch.linalg.LinAlgError: If the damped factor is not positive definite, or so
            badly conditioned that the inverse would not be in `dtype`.
    """
    (found,) = invert_factors([DampedFactor(moment, damping, dtype)])
    if isinstance(found, NoInverse):
        raise torch.linalg.LinAlgError(found.reason)  # type: ignore[attr-defined]  # C++ defines it
    return found


def invert_factors(factors: Sequence[DampedFactor]) -> list[FactorInverse | NoInverse]:
    """Invert many damped factors together.

    On the CPU each result has the bits that it has alone; see `stacks`.

    Args:
        factors: On one device.

    Returns:
        For each what `invert_moment` returns, or why it has none.
    """
    grams = [factor for factor in factors if factor.moment.form != "diagonal"]
    others = iter(_invert_grams(grams) if grams else ())
    return [
        _invert_diagonal(factor) if factor.moment.form == "diagonal" else next(others)
        for factor in factors
    ]


def _invert_diagonal(factor: DampedFactor) -> DiagonalInverse | NoInverse:
    moment, damping = factor.moment, factor.total_damping
    if factor.overflow is not None:
        return factor.overflow
    diagonal = (moment.tensor / moment.weight + damping).reciprocal()
    return DiagonalInverse(diagonal.to(factor.dtype), damping)


def _invert_grams(factors: list[DampedFactor]) -> list[FactorInverse | NoInverse]:
    damped = _damped_squares(factors)
    factorized = in_stacks(torch.linalg.cholesky_ex, damped)
    minors = read_numbers([info for _, info in factorized])
    found: dict[int, FactorInverse | NoInverse] = {}
    good: dict[tuple[bool, torch.dtype], list[int]] = defaultdict(list)
    for i, (factor, matrix) in enumerate(zip(factors, damped, strict=True)):
        refusal = factor.refusal(matrix, int(max(minors[i])))
        if refusal is None:
            good[factor.low_rank, factor.dtype].append(i)
        else:
            found[i] = refusal
    for (low_rank, dtype), places in good.items():
        invert = _low_rank_inverses if low_rank else _dense_inverses
        choleskys = [factorized[i][0] for i in places]
        inverses = invert([factors[i] for i in places], choleskys, dtype)
        found.update(zip(places, inverses, strict=True))
    return [found[i] for i in range(len(factors))]


def _damped_squares(factors: list[DampedFactor]) -> list[Tensor]:
    # Times the weight, which need not be divided by.
    device = factors[0].moment.tensor.device
    shifts = [factor.moment.weight * factor.total_damping for factor in factors]
    squares = [factor.moment.square for factor in factors]
    damped = in_stacks(_damped, squares, numbers_for(device, shifts))
    return [matrix for (matrix,) in damped]


def _damped(square: Tensor, shift: Number) -> tuple[Tensor]:
    damped = square.clone()
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(for_each(shift, diagonal))
    return (damped,)


def _low_rank_inverses(
    factors: list[DampedFactor], choleskys: list[Tensor], dtype: torch.dtype
) -> list[FactorInverse]:
    rows = [factor.moment.tensor for factor in factors]
    identity = cache(partial(torch.eye, dtype=torch.float64, device=rows[0].device))
    roots = in_stacks(partial(_inverse_root, identity=identity), choleskys)
    # Each product is rounded at once, and the next made in its memory, in the cache.
    room = cache(rows[0].new_empty)
    basis = partial(_basis, dtype=dtype, room=room)
    bases = in_stacks(basis, [root for (root,) in roots], rows)
    return [
        LowRankInverse(basis, factor.total_damping)
        for factor, (basis,) in zip(factors, bases, strict=True)
    ]


def _inverse_root(
    cholesky: Tensor, *, identity: Callable[[int], Tensor]
) -> tuple[Tensor]:
    ones = identity(cholesky.shape[-1])
    return (torch.linalg.solve_triangular(cholesky, ones, upper=False),)


def _basis(
    root: Tensor,
    rows: Tensor,
    *,
    dtype: torch.dtype,
    room: Callable[[torch.Size], Tensor],
) -> tuple[Tensor]:
    product = lower_times(root, rows, out=room(rows.shape))
    return (product.to(dtype, copy=True),)


def _dense_inverses(
    factors: list[DampedFactor], choleskys: list[Tensor], dtype: torch.dtype
) -> list[FactorInverse]:
    device = factors[0].moment.tensor.device
    weights = numbers_for(device, [factor.moment.weight for factor in factors])
    matrices = in_stacks(partial(_dense, dtype=dtype), choleskys, weights)
    return [
        DenseInverse(matrix, factor.total_damping)
        for factor, (matrix,) in zip(factors, matrices, strict=True)
    ]


def _dense(cholesky: Tensor, weight: Number, *, dtype: torch.dtype) -> tuple[Tensor]:
    # LAPACK leaves column-major results, on which products round differently: the same
    # inverse, sent over a wire, would not give the same bits.
    matrix = torch.cholesky_inverse(cholesky).mT
    return ((matrix * for_each(weight, matrix)).to(dtype).contiguous(),)
