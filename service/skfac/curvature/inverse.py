"""Damped inverse of one Kronecker factor, from the rows it is made of.

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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from skfac.curvature.damped import DampedFactor, NoInverse
from skfac.curvature.factor import Moment, moment_of
from skfac.curvature.stacks import in_stacks


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

    def right_of_ones(
        self, matrix: Float[Tensor, "rows features"]
    ) -> tuple[Float[Tensor, "rows features"], Float[Tensor, " rows"]]:
        """Multiply from the right, as `right` does with ones in a last column.

        Returns:
            The first columns of the product, and the last one.
        """
        columns, last = self.basis[:, :-1], self.basis[:, -1]
        inner = torch.addmm(last, matrix, columns.mT)
        return self._rest(matrix, inner, columns), (1 - inner @ last) / self.damping

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

    def right_of_ones(
        self, matrix: Float[Tensor, "rows features"]
    ) -> tuple[Float[Tensor, "rows features"], Float[Tensor, " rows"]]:
        """Multiply from the right, as `right` does with ones in a last column.

        Returns:
            The first columns of the product, and the last one.
        """
        columns, last = self.matrix[:, :-1], self.matrix[:, -1]
        first = torch.addmm(columns[-1], matrix, columns[:-1])
        return first, last[-1] + matrix @ last[:-1]


@dataclass(frozen=True, eq=False)
class DiagonalInverse:
    """`(A + λ I)⁻¹` of a diagonal factor.

    Attributes:
        diagonal: The inverse's diagonal `1 / (a + λ)`, shape `[1, d]`, or a stack.
        damping: `λ > 0`, in the units of the factor.
    """

    diagonal: Float[Tensor, "*stack 1 dim"]
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
        self, matrix: Float[Tensor, "*stack dim columns"]
    ) -> Float[Tensor, "*stack dim columns"]:
        """Multiply from the left.

        Returns:
            `(A + λ I)⁻¹ matrix`.
        """
        return self.diagonal.mT * matrix

    def right(
        self, matrix: Float[Tensor, "*stack rows dim"]
    ) -> Float[Tensor, "*stack rows dim"]:
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


def _invert_diagonal(factor: DampedFactor) -> DiagonalInverse:
    moment, damping = factor.moment, factor.total_damping
    diagonal = (moment.tensor / moment.weight + damping).reciprocal()
    return DiagonalInverse(diagonal.to(factor.dtype), damping)


def _invert_grams(factors: list[DampedFactor]) -> list[FactorInverse | NoInverse]:
    grams = _damped_grams(factors)
    factorized = in_stacks(torch.linalg.cholesky_ex, grams)
    minors = torch.stack([info.amax() for _, info in factorized]).tolist()  # waits once
    found: dict[int, FactorInverse | NoInverse] = {}
    good: dict[bool, list[int]] = {True: [], False: []}
    for i, (factor, gram) in enumerate(zip(factors, grams, strict=True)):
        refusal = factor.refusal(gram, minors[i])
        if refusal is None:
            good[factor.low_rank].append(i)
        else:
            found[i] = refusal
    for low_rank, invert in ((True, _low_rank_inverses), (False, _dense_inverses)):
        places = good[low_rank]
        choleskys = [factorized[i][0] for i in places]
        inverses = invert([factors[i] for i in places], choleskys)
        found.update(zip(places, inverses, strict=True))
    return [found[i] for i in range(len(factors))]


def _damped_grams(factors: list[DampedFactor]) -> list[Tensor]:
    # Times the weight, which need not be divided by: of the rows if there are fewer of
    # them than columns, else of the columns.
    by_rows = [factor for factor in factors if factor.moment.form == "rows"]
    sides = [
        factor.moment.tensor if factor.low_rank else factor.moment.tensor.mT
        for factor in by_rows
    ]
    products = iter(in_stacks(lambda side: (side @ side.mT,), sides))
    grams = []
    for factor in factors:
        moment = factor.moment
        gram = next(products)[0] if moment.form == "rows" else moment.tensor.clone()
        gram.diagonal(dim1=-2, dim2=-1).add_(moment.weight * factor.total_damping)
        grams.append(gram)
    return grams


def _low_rank_inverses(
    factors: list[DampedFactor], choleskys: list[Tensor]
) -> list[FactorInverse]:
    roots = [root for (root,) in in_stacks(_inverse_root, choleskys)]
    rows = [factor.moment.tensor for factor in factors]
    bases = in_stacks(lambda root, rows: (root @ rows,), roots, rows)
    return [
        LowRankInverse(basis.to(factor.dtype), factor.total_damping)
        for factor, (basis,) in zip(factors, bases, strict=True)
    ]


def _inverse_root(cholesky: Tensor) -> tuple[Tensor]:
    identity = torch.eye(
        cholesky.shape[-1], dtype=cholesky.dtype, device=cholesky.device
    )
    return (torch.linalg.solve_triangular(cholesky, identity, upper=False),)


def _dense_inverses(
    factors: list[DampedFactor], choleskys: list[Tensor]
) -> list[FactorInverse]:
    # LAPACK leaves column-major results, on which products round differently: the same
    # inverse, sent over a wire, would not give the same bits.
    matrices = in_stacks(lambda factor: (torch.cholesky_inverse(factor),), choleskys)
    return [
        DenseInverse(
            (matrix.mT * factor.moment.weight).to(factor.dtype).contiguous(),
            factor.total_damping,
        )
        for factor, (matrix,) in zip(factors, matrices, strict=True)
    ]
