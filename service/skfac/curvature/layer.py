"""From the rows of one layer to the preconditioner of its gradient.

Source: Martens & Grosse, "Optimizing Neural Networks with Kronecker-factored
Approximate Curvature", ICML 2015.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from skfac.curvature.damping import DampingSplit, split_damping
from skfac.curvature.inverse import FactorInverse, invert_factor


@dataclass(frozen=True, eq=False)
class LayerPreconditioner:
    """`∇W ↦ (G + λ_G I)⁻¹ ∇W (A + λ_A I)⁻¹`.

    Attributes:
        activations: Inverse of the damped activation factor, `[d_in, d_in]`.
        derivatives: Inverse of the damped derivative factor, `[d_out, d_out]`.
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
        self, gradient: Float[Tensor, "d_out d_in"]
    ) -> Float[Tensor, "d_out d_in"]:
        """Precondition a gradient, bias column included.

        Returns:
            The preconditioned gradient, a new tensor.
        """
        return self.activations.right(self.derivatives.left(gradient))


def precondition_layer(
    activations: Float[Tensor, "n d_in"],
    derivatives: Float[Tensor, "n d_out"],
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
    assert len(activations) == len(derivatives), "Both sides have the same examples."
    shares = split_damping(
        damping,
        split,
        mean_eigenvalue_activations=mean_eigenvalue(activations),
        mean_eigenvalue_derivatives=mean_eigenvalue(derivatives),
    )
    return LayerPreconditioner(
        activations=invert_factor(activations, damping=shares.activations),
        derivatives=invert_factor(derivatives, damping=shares.derivatives),
    )


def mean_eigenvalue(rows: Float[Tensor, "n dim"]) -> float:
    """Mean eigenvalue of a factor from the norm of its rows.

    Returns:
        `tr(Xᵀ X / n) / d = ‖X‖² / (n d)`; 0 for an empty matrix.
    """
    if rows.numel() == 0:
        return 0.0
    return float(torch.linalg.vector_norm(rows.double()) ** 2 / rows.numel())
