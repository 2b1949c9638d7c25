"""How one damping λ is split over the two factors of a layer.

`(A + λ_A I) ⊗ (G + λ_G I)` should approximate `A ⊗ G + λ I`, so `λ_A λ_G = λ`; the
split π weighs the two by the factors' average eigenvalues.

Source: Martens & Grosse, "Optimizing Neural Networks with Kronecker-factored
Approximate Curvature", ICML 2015, section 6.3.
"""

import math
from dataclasses import dataclass
from typing import Literal

DampingSplit = Literal["pi", "equal"]


@dataclass(frozen=True)
class FactorDamping:
    """The damping of each factor; the product of the two is the layer's λ.

    Attributes:
        activations: `λ_A > 0`, added to the activation factor.
        derivatives: `λ_G > 0`, added to the derivative factor.
    """

    activations: float
    derivatives: float


def split_damping(
    damping: float,
    split: DampingSplit,
    *,
    mean_eigenvalue_activations: float,
    mean_eigenvalue_derivatives: float,
) -> FactorDamping:
    """Split λ into `λ_A = π √λ` and `λ_G = √λ / π`.

    Args:
        damping: `λ > 0`, in the units of the Kronecker product.
        split: `"pi"` sets `π² = (tr A / d_A) / (tr G / d_G)`, or 1 where a trace is
            zero; `"equal"` sets `π = 1`, as the authors of SKFAC do.
        mean_eigenvalue_activations: `tr A / d_A`.
        mean_eigenvalue_derivatives: `tr G / d_G`.

    Returns:
        The damping of both factors.

    Raises:
        ValueError: If `damping` is not positive and finite, or the eigenvalues' ratio
            is not.
    """
    if not (damping > 0 and math.isfinite(damping)):
        raise ValueError(f"damping must be positive and finite, got {damping}.")
    root = math.sqrt(damping)
    pi = 1.0
    if split == "pi" and mean_eigenvalue_activations and mean_eigenvalue_derivatives:
        pi = math.sqrt(mean_eigenvalue_activations)
        pi /= math.sqrt(mean_eigenvalue_derivatives)
    if not (pi > 0 and math.isfinite(pi)):
        raise ValueError(
            f"Factors with mean eigenvalues {mean_eigenvalue_activations} and "
            f"{mean_eigenvalue_derivatives} cannot share a damping."
        )
    return FactorDamping(activations=pi * root, derivatives=root / pi)
