"""The trust region that bounds a preconditioned step.

A step `-lr ν P` changes the model's output distribution by a KL divergence of about
`lr² ν² <P, F P> ≈ lr² ν² <P, ∇W>`; ν keeps that below κ.

Source: Ba, Grosse & Martens, "Distributed Second-Order Optimization using
Kronecker-Factored Approximations", ICLR 2017, in the form used by kfac-pytorch.
"""

from jaxtyping import Float
from torch import Tensor


def kl_scale(model_decrease: Float[Tensor, ""], *, kl_clip: float) -> Float[Tensor, ""]:
    """Factor ν that shortens a step to the trust region, never lengthens it.

    Args:
        model_decrease: `Σ_layers lr² <P, ∇W>`, a scalar; `P` the step's direction,
            `∇W` the raw gradient, `lr` the current learning rate.
        kl_clip: `κ > 0`, the largest KL divergence allowed.

    Returns:
        `ν = min(1, √(κ / |model_decrease|))`, a scalar on the same device; NaN if
        `model_decrease` is NaN.
    """
    return (kl_clip / model_decrease.abs()).sqrt().clamp(max=1.0)
