"""Forms in which the damped inverse of a Kronecker factor is kept, sent and applied.

`skfac.curvature.invert` says how each comes about. A low-rank inverse is applied
without ever forming the `d × d` matrix. With groups each form has one block a group.
"""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


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

    def right(self, matrix: Tensor, *, spoil: bool = False) -> Tensor:
        """Multiply the inverse from the right onto `[*groups, rows, d]`.

        `spoil` says that nobody needs `matrix` any more: the result may be there.
        """


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
        self, matrix: Float[Tensor, "*groups rows dim"], *, spoil: bool = False
    ) -> Float[Tensor, "*groups rows dim"]:
        """Multiply from the right in `4·n·d·rows` operations, if `spoil` in place.

        Returns:
            `matrix (A + λ I)⁻¹`.
        """
        inner = matrix @ self.basis.mT
        out = matrix if spoil else None
        return self._rest(matrix, inner, self.basis, out)

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

    def _rest(
        self, matrix: Tensor, left: Tensor, right: Tensor, out: Tensor | None = None
    ) -> Tensor:
        add = torch.addmm if matrix.ndim == 2 else torch.baddbmm
        by = 1 / self.damping
        return add(matrix, left, right, beta=by, alpha=-by, out=out)


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
        self, matrix: Float[Tensor, "*groups rows dim"], *, spoil: bool = False
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
        self, matrix: Float[Tensor, "*stack rows dim"], *, spoil: bool = False
    ) -> Float[Tensor, "*stack rows dim"]:
        """Multiply from the right, if `spoil` in place.

        Returns:
            `matrix (A + λ I)⁻¹`.
        """
        return torch.mul(matrix, self.diagonal, out=matrix if spoil else None)
