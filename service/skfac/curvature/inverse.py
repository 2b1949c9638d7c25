"""Damped inverse of one Kronecker factor, from the rows it is made of.

The factor is `A = Xᵀ X / n` for rows `X: [n, d]`. With `n < d` it has rank at most
`n`, and with `U = Xᵀ/√n` and `L Lᵀ = Uᵀ U + λ I` (only `n × n`) the inverse is

    (A + λ I)⁻¹ = (I - V Vᵀ) / λ,    V = U L⁻ᵀ,

so the `d × d` inverse is never formed, sent or applied. Otherwise the `d × d` matrix
is inverted by Cholesky.

Source: Tang et al., "SKFAC: Training Neural Networks with Faster
Kronecker-Factored Approximate Curvature", CVPR 2021. Deviation: products and
factorizations run in float64, because the error inside the span of the rows is
about eps·κ with κ = (λ_max + λ)/λ, and the matrices are small.
"""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

# A result is refused when rounding it to its dtype could cost this share of the
# smallest eigenvalue; past that the inverse may not be positive definite any more.
_ROUNDING_SHARE = 0.1


@runtime_checkable
class FactorInverse(Protocol):
    """The matrix `(A + λ I)⁻¹`, factorized once and applied often."""

    @property
    def damping(self) -> float:
        """`λ > 0`, in the units of the factor."""

    @property
    def dim(self) -> int:
        """The factor's size `d`."""

    @property
    def tensor(self) -> Tensor:
        """The one tensor that the inverse is made of besides its damping."""

    def with_tensor(self, tensor: Tensor) -> "FactorInverse":
        """The same inverse held in another tensor, such as a copy elsewhere."""

    def left(self, matrix: Tensor) -> Tensor:
        """Multiply the inverse from the left onto `matrix` of shape `[d, columns]`."""

    def right(self, matrix: Tensor) -> Tensor:
        """Multiply the inverse from the right onto `matrix` of shape `[rows, d]`."""


@dataclass(frozen=True, eq=False)
class LowRankInverse:
    """`(A + λ I)⁻¹ = (I - V Vᵀ) / λ`.

    Attributes:
        basis: `Vᵀ`, shape `[n, d]`: rows like the ones it came from.
        damping: `λ > 0`, in the units of the factor.
    """

    basis: Float[Tensor, "rank dim"]
    damping: float

    @property
    def dim(self) -> int:
        """The factor's size `d`."""
        return self.basis.shape[1]

    @property
    def tensor(self) -> Tensor:
        """`Vᵀ`."""
        return self.basis

    def with_tensor(self, tensor: Tensor) -> "LowRankInverse":
        """Hold the inverse in another tensor.

        Returns:
            An inverse with the same damping.
        """
        return replace(self, basis=tensor)

    def left(
        self, matrix: Float[Tensor, "dim columns"]
    ) -> Float[Tensor, "dim columns"]:
        """Multiply from the left in `4·n·d·columns` operations.

        Returns:
            `(A + λ I)⁻¹ matrix`.
        """
        inner = self.basis @ matrix
        return torch.addmm(matrix, self.basis.T, inner, alpha=-1).div_(self.damping)

    def right(self, matrix: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
        """Multiply from the right in `4·n·d·rows` operations.

        Returns:
            `matrix (A + λ I)⁻¹`.
        """
        inner = matrix @ self.basis.T
        return torch.addmm(matrix, inner, self.basis, alpha=-1).div_(self.damping)


@dataclass(frozen=True, eq=False)
class DenseInverse:
    """`(A + λ I)⁻¹` as an explicit symmetric matrix, for `n >= d`.

    Attributes:
        matrix: The inverse, shape `[d, d]`.
        damping: `λ > 0`, in the units of the factor.
    """

    matrix: Float[Tensor, "dim dim"]
    damping: float

    @property
    def dim(self) -> int:
        """The factor's size `d`."""
        return self.matrix.shape[0]

    @property
    def tensor(self) -> Tensor:
        """The explicit inverse."""
        return self.matrix

    def with_tensor(self, tensor: Tensor) -> "DenseInverse":
        """Hold the inverse in another tensor.

        Returns:
            An inverse with the same damping.
        """
        return replace(self, matrix=tensor)

    def left(
        self, matrix: Float[Tensor, "dim columns"]
    ) -> Float[Tensor, "dim columns"]:
        """Multiply from the left.

        Returns:
            `(A + λ I)⁻¹ matrix`.
        """
        return self.matrix @ matrix

    def right(self, matrix: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
        """Multiply from the right.

        Returns:
            `matrix (A + λ I)⁻¹`.
        """
        return matrix @ self.matrix


def invert_factor(rows: Float[Tensor, "n dim"], *, damping: float) -> FactorInverse:
    """Invert the damped second moment `Xᵀ X / n + λ I` of `rows`.

    Args:
        rows: `X`, one row per example, finite, float32 or float64. Not modified.
        damping: `λ > 0`, added to every eigenvalue of the factor.

    Returns:
        A `LowRankInverse` if `n < d`, else a `DenseInverse`; on the device and in the
        dtype of `rows`.

    Raises:
        ValueError: If there are no rows or `damping` is not positive.
        torch.linalg.LinAlgError: If the damped factor is not positive definite, or so
            badly conditioned that the inverse would not be in the dtype of `rows`.
    """
    count, dim = rows.shape
    if count == 0:
        raise ValueError(
            f"A factor needs at least one row, got shape ({count}, {dim})."
        )
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}.")
    scaled = rows.double() / count**0.5
    gram = scaled @ scaled.T if count < dim else scaled.T @ scaled
    _check_condition(gram, damping, rows.dtype)
    gram.diagonal().add_(damping)
    cholesky = torch.linalg.cholesky(gram)
    if count < dim:
        basis = torch.linalg.solve_triangular(cholesky, scaled, upper=False)
        return LowRankInverse(_row_major(basis, rows.dtype), damping)
    inverse = torch.cholesky_inverse(cholesky)
    return DenseInverse(_row_major(inverse, rows.dtype), damping)


def _row_major(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    # LAPACK leaves column-major results, on which products round differently: the same
    # inverse, sent over a wire, would not give the same bits.
    return matrix.to(dtype).contiguous()


def _check_condition(
    gram: Float[Tensor, "m m"], damping: float, dtype: torch.dtype
) -> None:
    # The largest absolute row sum bounds λ_max from above.
    largest = float(gram.abs().sum(1).amax()) if gram.numel() else 0.0
    condition = (largest + damping) / damping
    limit = _ROUNDING_SHARE / torch.finfo(dtype).eps
    if not condition <= limit:
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]  # C++ defines it
            f"A factor with eigenvalues up to {largest:.3g} and damping {damping:.3g} "
            f"has condition {condition:.3g}; {dtype} holds at most {limit:.3g}."
        )
