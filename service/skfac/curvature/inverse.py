"""Damped inverse of one Kronecker factor, from the rows it is made of.

The factor is `A = Xᵀ X / n` for rows `X: [n, d]`. With `n < d` it has rank at most
`n`, and with `U = Xᵀ/√n` and `L Lᵀ = Uᵀ U + λ I` (only `n × n`) the inverse is

    (A + λ I)⁻¹ = (I - V Vᵀ) / λ,    V = U L⁻ᵀ,

so the `d × d` inverse is never formed, sent or applied. Otherwise the `d × d` matrix
is inverted by Cholesky. With groups the factor is block diagonal: all of this holds
for each block, under one damping.

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

from skfac.curvature.factor import Moment, moment_of

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
        """The size `d` of the factor, or of one group's block of it."""

    @property
    def tensor(self) -> Tensor:
        """The one tensor that the inverse is made of besides its damping."""

    def with_tensor(self, tensor: Tensor) -> "FactorInverse":
        """The same inverse held in another tensor, such as a copy elsewhere."""

    def left(self, matrix: Tensor) -> Tensor:
        """Multiply the inverse from the left onto `[*groups, d, columns]`."""

    def right(self, matrix: Tensor) -> Tensor:
        """Multiply the inverse from the right onto `[*groups, rows, d]`."""


@dataclass(frozen=True, eq=False)
class LowRankInverse:
    """`(A + λ I)⁻¹ = (I - V Vᵀ) / λ`.

    Attributes:
        basis: `Vᵀ`, shape `[*groups, n, d]`: rows like the ones it came from.
        damping: `λ > 0`, in the units of the factor.
    """

    basis: Float[Tensor, "*groups rank dim"]
    damping: float

    @property
    def dim(self) -> int:
        """The size `d` of the factor, or of one group's block of it."""
        return self.basis.shape[-1]

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
        self, matrix: Float[Tensor, "*groups dim columns"]
    ) -> Float[Tensor, "*groups dim columns"]:
        """Multiply from the left in `4·n·d·columns` operations.

        Returns:
            `(A + λ I)⁻¹ matrix`.
        """
        inner = self.basis @ matrix
        return self._rest(matrix, self.basis.mT, inner)

    def right(
        self, matrix: Float[Tensor, "*groups rows dim"]
    ) -> Float[Tensor, "*groups rows dim"]:
        """Multiply from the right in `4·n·d·rows` operations.

        Returns:
            `matrix (A + λ I)⁻¹`.
        """
        inner = matrix @ self.basis.mT
        return self._rest(matrix, inner, self.basis)

    def _rest(self, matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
        add = torch.addmm if matrix.ndim == 2 else torch.baddbmm
        by = 1 / self.damping
        return add(matrix, left, right, beta=by, alpha=-by)


@dataclass(frozen=True, eq=False)
class DenseInverse:
    """`(A + λ I)⁻¹` as an explicit symmetric matrix, for `n >= d`.

    Attributes:
        matrix: The inverse, shape `[*groups, d, d]`.
        damping: `λ > 0`, in the units of the factor.
    """

    matrix: Float[Tensor, "*groups dim dim"]
    damping: float

    @property
    def dim(self) -> int:
        """The size `d` of the factor, or of one group's block of it."""
        return self.matrix.shape[-1]

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
        self, matrix: Float[Tensor, "*groups dim columns"]
    ) -> Float[Tensor, "*groups dim columns"]:
        """Multiply from the left.

        Returns:
            `(A + λ I)⁻¹ matrix`.
        """
        return self.matrix @ matrix

    def right(
        self, matrix: Float[Tensor, "*groups rows dim"]
    ) -> Float[Tensor, "*groups rows dim"]:
        """Multiply from the right.

        Returns:
            `matrix (A + λ I)⁻¹`.
        """
        return matrix @ self.matrix


@dataclass(frozen=True, eq=False)
class DiagonalInverse:
    """`(A + λ I)⁻¹` of a diagonal factor.

    Attributes:
        diagonal: The inverse's diagonal `1 / (a + λ)`, shape `[1, d]`.
        damping: `λ > 0`, in the units of the factor.
    """

    diagonal: Float[Tensor, "1 dim"]
    damping: float

    @property
    def dim(self) -> int:
        """The factor's size `d`."""
        return self.diagonal.shape[-1]

    @property
    def tensor(self) -> Tensor:
        """The inverse's diagonal, as a row."""
        return self.diagonal

    def with_tensor(self, tensor: Tensor) -> "DiagonalInverse":
        """Hold the inverse in another tensor.

        Returns:
            An inverse with the same damping.
        """
        return replace(self, diagonal=tensor)

    def left(
        self, matrix: Float[Tensor, "dim columns"]
    ) -> Float[Tensor, "dim columns"]:
        """Multiply from the left.

        Returns:
            `(A + λ I)⁻¹ matrix`.
        """
        return self.diagonal.mT * matrix

    def right(self, matrix: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
        """Multiply from the right.

        Returns:
            `matrix (A + λ I)⁻¹`.
        """
        return matrix * self.diagonal


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
        damping: `λ > 0`, added to every eigenvalue of the factor. So is what `moment`
            says to have dropped, which leaves the trace of the factor as it was.
        dtype: What the result is rounded to.

    Returns:
        A `LowRankInverse` of fewer rows than `d`, a `DiagonalInverse` of a diagonal,
        else a `DenseInverse`; on the device of `moment`.

    Raises:
        ValueError: If `damping` is not positive.
        torch.linalg.LinAlgError: If the damped factor is not positive definite, or so
            badly conditioned that the inverse would not be in `dtype`.
    """
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}.")
    damping += moment.mean_dropped
    if moment.form == "diagonal":
        diagonal = (moment.tensor / moment.weight + damping).reciprocal()
        return DiagonalInverse(diagonal.to(dtype), damping)
    if moment.form == "dense":
        gram = moment.tensor / moment.weight
        return _invert_dense(gram, damping, dtype)
    scaled = moment.tensor / moment.weight**0.5
    if scaled.shape[-2] >= moment.dim:
        return _invert_dense(scaled.mT @ scaled, damping, dtype)
    cholesky = _damped_cholesky(scaled @ scaled.mT, damping, dtype)
    basis = torch.linalg.solve_triangular(cholesky, scaled, upper=False)
    return LowRankInverse(_row_major(basis, dtype), damping)


def _invert_dense(
    factor: Float[Tensor, "*groups dim dim"], damping: float, dtype: torch.dtype
) -> DenseInverse:
    cholesky = _damped_cholesky(factor, damping, dtype)
    return DenseInverse(_row_major(torch.cholesky_inverse(cholesky), dtype), damping)


def _damped_cholesky(
    gram: Float[Tensor, "*groups m m"], damping: float, dtype: torch.dtype
) -> Float[Tensor, "*groups m m"]:
    _check_condition(gram, damping, dtype)
    gram.diagonal(dim1=-2, dim2=-1).add_(damping)  # `gram` is the caller's to lose
    cholesky: Tensor = torch.linalg.cholesky(gram)
    return cholesky


def _row_major(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    # LAPACK leaves column-major results, on which products round differently: the same
    # inverse, sent over a wire, would not give the same bits.
    return matrix.to(dtype).contiguous()


def _check_condition(
    gram: Float[Tensor, "*groups m m"], damping: float, dtype: torch.dtype
) -> None:
    # The largest absolute row sum bounds λ_max from above.
    largest = float(gram.abs().sum(-1).amax()) if gram.numel() else 0.0
    condition = (largest + damping) / damping
    limit = _ROUNDING_SHARE / torch.finfo(dtype).eps
    if not condition <= limit:
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]  # C++ defines it
            f"A factor with eigenvalues up to {largest:.3g} and damping {damping:.3g} "
            f"has condition {condition:.3g}; {dtype} holds at most {limit:.3g}."
        )
