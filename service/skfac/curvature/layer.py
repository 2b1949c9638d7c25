"""From the rows of one layer to the preconditioner of its gradient.

Source: Martens & Grosse, "Optimizing Neural Networks with Kronecker-factored
Approximate Curvature", ICML 2015.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from skfac.curvature.damping import DampingSplit, split_damping
from skfac.curvature.factor import Moment, moment_of
from skfac.curvature.inverse import FactorInverse, invert_moment


@dataclass(frozen=True, eq=False)
class LayerPreconditioner:
    """`∇W ↦ (G + λ_G I)⁻¹ ∇W (A + λ_A I)⁻¹`.

    Attributes:
        activations: Inverse of the damped activation factor, `[*groups, d_in, d_in]`.
        derivatives: Inverse of the damped derivative factor, `[*groups, d_out, d_out]`.
    """

    activations: FactorInverse
    derivatives: FactorInverse

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The tensors of both inverses, activations first."""
        return self.activations.tensor, self.derivatives.tensor

    def with_tensors(
        self, activations: Tensor, derivatives: Tensor
    ) -> "LayerPreconditioner":
        """Hold both inverses in other tensors, such as copies elsewhere.

        Returns:
            A preconditioner with the same damping.
        """
        return replace(
            self,
            activations=self.activations.with_tensor(activations),
            derivatives=self.derivatives.with_tensor(derivatives),
        )

    def apply(
        self, gradient: Float[Tensor, "*groups d_out d_in"]
    ) -> Float[Tensor, "*groups d_out d_in"]:
        """Precondition a gradient, bias column included.

        Returns:
            The preconditioned gradient, a new tensor.
        """
        return self.activations.right(self.derivatives.left(gradient))


def precondition_layer(
    activations: Float[Tensor, "*groups n d_in"],
    derivatives: Float[Tensor, "*groups n d_out"],
    *,
    damping: float,
    split: DampingSplit,
) -> LayerPreconditioner:
    """Build the preconditioner of one layer from one snapshot of its rows.

    Args:
        activations: Rows of the activation factor, the bias column included.
        derivatives: Rows of the derivative factor, from the same step and examples.
        damping: `λ > 0` of the Kronecker product.
        split: How λ is shared by the factors; see `split_damping`.

    Returns:
        Both damped inverses, in the dtype of the rows.

    Raises:
        ValueError: If there are no rows, `damping` is not positive and finite, or the
            rows are not.
        torch.linalg.LinAlgError: If a damped factor cannot be inverted.
    """
    count = derivatives.shape[-2]
    return precondition_moments(
        moment_of(activations, count=count),
        moment_of(derivatives, count=count),
        damping=damping,
        split=split,
        dtype=derivatives.dtype,
    )


def precondition_moments(
    activations: Moment,
    derivatives: Moment,
    *,
    damping: float,
    split: DampingSplit,
    dtype: torch.dtype,
) -> LayerPreconditioner:
    """Build the preconditioner of one layer from the moments of its rows.

    Args:
        activations: What the activation factor is made of.
        derivatives: What the derivative factor is made of.
        damping: `λ > 0` of the Kronecker product.
        split: How λ is shared by the factors; see `split_damping`.
        dtype: What the results are rounded to.

    Returns:
        Both inverses, each damped by its share of λ and by what truncation dropped.

    Raises:
        ValueError: If `damping` is not positive and finite.
        torch.linalg.LinAlgError: If a damped factor cannot be inverted.
    """
    shares = split_damping(
        damping,
        split,
        mean_eigenvalue_activations=activations.mean_eigenvalue,
        mean_eigenvalue_derivatives=derivatives.mean_eigenvalue,
    )
    return LayerPreconditioner(
        activations=invert_moment(activations, damping=shares.activations, dtype=dtype),
        derivatives=invert_moment(derivatives, damping=shares.derivatives, dtype=dtype),
    )
