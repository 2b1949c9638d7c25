"""The rows of a weight gradient, as they are and preconditioned.

What a trust region asks for needs no pass over the weights: with `∇W = Dᵀ X` and
`P = D̃ᵀ X̃` it is `<P, ∇W> = Σ_{b,b'} (D̃ Dᵀ)_{bb'} (X̃ Xᵀ)_{bb'}`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one or more backwards of a layer, as they are and preconditioned.

    With a bias the activations have a last column of ones, which is not in memory.

    Attributes:
        activations: `X` without that column, shape `[B, features]`.
        derivatives: `D`, shape `[B, d_out]`.
        turned_activations: `X̃` without its last column, shaped like `X`.
        turned_derivatives: `D̃`, shaped like `D`.
        turned_ones: The last column of `X̃`, shape `[B]`; zero without a bias.
        ones: The last column of `X`; zero without a bias.
    """

    activations: Tensor
    derivatives: Tensor
    turned_activations: Tensor
    turned_derivatives: Tensor
    turned_ones: Tensor
    ones: Tensor

    def inner(self) -> Tensor:
        """Multiply direction and gradient.

        Returns:
            `<P, ∇W>`, a scalar.
        """
        return _inner(self._turned, self._raw)

    def gradient_square(self) -> Tensor:
        """Square the gradient.

        Returns:
            `‖∇W‖²`, a scalar.
        """
        return _inner(self._raw, self._raw)

    def direction_square(self) -> Tensor:
        """Square the direction.

        Returns:
            `‖P‖²`, a scalar.
        """
        return _inner(self._turned, self._turned)

    @property
    def _raw(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.activations, self.ones, self.derivatives

    @property
    def _turned(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.turned_activations, self.turned_ones, self.turned_derivatives


def _inner(
    left: tuple[Tensor, Tensor, Tensor], right: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    # <Dᵀ X, Eᵀ Y> of two matrices from their rows: activations, their last column,
    # derivatives.
    (x, last, d), (y, others_last, e) = left, right
    return torch.sum((d @ e.T) * torch.addr(x @ y.T, last, others_last))
