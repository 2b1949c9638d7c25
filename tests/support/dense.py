"""Slow, obvious references for factors and their inverses, by `torch.linalg`."""

import torch
from torch import Tensor, nn

from skfac.curvature.geometry import LayerGeometry, geometry_of


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 numbers that depend on nothing but `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`."""
    assert actual.shape == expected.shape
    difference = (actual - expected).detach()
    return float(difference.norm() / expected.detach().norm())


def factor(rows: Tensor) -> Tensor:
    """`Xᵀ X / n`."""
    return rows.T @ rows / rows.shape[0]


def dense_inverse(rows: Tensor, damping: float) -> Tensor:
    """`(Xᵀ X / n + λ I)⁻¹` by the textbook O(d³) formula."""
    identity = torch.eye(rows.shape[1], dtype=rows.dtype)
    inverse: Tensor = torch.linalg.inv(factor(rows) + damping * identity)
    return inverse


def dense_split(
    activations: Tensor, derivatives: Tensor, damping: float
) -> tuple[float, float]:
    """`λ_A = π √λ` and `λ_G = √λ / π`, with π from the traces of the factors."""
    mean_a, mean_g = (
        float(factor(rows).trace()) / rows.shape[1]
        for rows in (activations, derivatives)
    )
    pi = (mean_a / mean_g) ** 0.5
    return pi * damping**0.5, damping**0.5 / pi


def geometry_for(module: nn.Module) -> LayerGeometry:
    """The library's geometry of a module that it must support."""
    geometry = geometry_of(module)
    assert geometry is not None
    return geometry
