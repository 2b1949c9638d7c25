"""Inverses on a part of a matrix whose other rows or columns are elsewhere.

With `(G + λ I)⁻¹ = (I - V Vᵀ) / λ` and the rows of `M` in parts `M_r`,

    ((G + λ I)⁻¹ M)_r = (M_r - V_r Σ_s V_sᵀ M_s) / λ:

what the parts have to tell each other is a sum of `[n, columns]` matrices. A dense
inverse `K` needs `(K M)_r`, rows of `Σ_s K_s M_s`, where there are more rows `n` in the
factor than rows in `M`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from skfac.curvature.inverse import (
    DenseInverse,
    DiagonalInverse,
    FactorInverse,
    LowRankInverse,
)


def left_share(
    inverse: FactorInverse, own: slice, part: Float[Tensor, "rows columns"]
) -> Float[Tensor, "m columns"]:
    """Make what one part adds to the sum that all parts need.

    Args:
        inverse: Of a factor without groups, low-rank or dense.
        own: Which rows of the whole matrix are here.
        part: These rows.

    Returns:
        `V_rᵀ M_r` with as many rows as `V` has columns, or `K_r M_r`.
    """
    assert isinstance(inverse, LowRankInverse | DenseInverse)
    return inverse.tensor[:, own] @ part


def left_of_part(
    inverse: FactorInverse,
    own: slice,
    part: Float[Tensor, "rows columns"],
    total: Float[Tensor, "m columns"],
) -> Float[Tensor, "rows columns"]:
    """Multiply the inverse from the left, as far as a part of the rows goes.

    Args:
        inverse: As in `left_share`.
        own: As in `left_share`.
        part: As in `left_share`.
        total: The sum of all parts' shares.

    Returns:
        These rows of `inverse.left(matrix)`.
    """
    if isinstance(inverse, DenseInverse):
        return total[own]
    assert isinstance(inverse, LowRankInverse)
    by = 1 / inverse.damping
    return torch.addmm(part, inverse.basis[:, own].mT, total, beta=by, alpha=-by)


def of_columns(inverse: FactorInverse, own: slice) -> DiagonalInverse:
    """Take the part of a diagonal inverse that some columns of a matrix meet.

    Returns:
        The inverse of these columns.
    """
    assert isinstance(inverse, DiagonalInverse)
    return DiagonalInverse(inverse.diagonal[:, own], inverse.damping)
