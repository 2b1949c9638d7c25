"""`authors` is what the SKFAC authors' released code computes, scales included.

Transcribed from Tang et al., "SKFAC: Training Neural Networks With Faster
Kronecker-Factored Approximate Curvature", CVPR 2021, section 3, and from the scales of
their code: both sides are means over the positions, the derivatives times the batch,
and both factors get the damping √λ.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from skfac.curvature.layer import precondition_layer
from skfac.curvature.positions import draw_positions
from tests.support.dense import geometry_for, normal, relative_error

BATCH = 32
BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])


def authors_inverse(rows: Tensor, damping: float) -> Tensor:
    """Their formula with `U = Xᵀ/√n`: `(I - U (λ I + Uᵀ U)⁻¹ Uᵀ) / λ`."""
    count, dim = rows.shape
    u = rows.T / math.sqrt(count)
    inner = torch.linalg.inv(damping * torch.eye(count).double() + u.T @ u)
    return (torch.eye(dim).double() - u @ inner @ u.T) / damping


def authors_update(
    columns: Tensor, derivatives: Tensor, gradient: Tensor, damping: float
) -> Tensor:
    """Their update of one layer.

    Args:
        columns: What the weight multiplies, `[batch, positions, d_in]`.
        derivatives: Of the mean loss, `[batch, positions, d_out]`.
        gradient: Of the mean loss, `[d_out, d_in]`.
        damping: λ.
    """
    activations = columns.mean(1)
    outputs = BATCH * derivatives.mean(1)
    return (
        authors_inverse(outputs, math.sqrt(damping))
        @ gradient
        @ authors_inverse(activations, math.sqrt(damping))
    )


def with_ones(columns: Tensor, bias: bool) -> Tensor:
    ones = columns.new_ones(*columns.shape[:-1], 1)
    return torch.cat([columns, ones], -1) if bias else columns


def gradients(module: nn.Module, inputs: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """Derivatives at the output, and the gradient as a matrix, of a mean loss."""
    outputs = module(inputs)
    loss = outputs.flatten(1).tanh().square().sum(1).mean()
    derivatives, weight, *rest = torch.autograd.grad(
        loss, [outputs, *module.parameters()]
    )
    columns = [weight.flatten(1), *(column[:, None] for column in rest)]
    assert len(columns) == 1 + bias
    return derivatives, torch.cat(columns, 1)


def library_update(module, inputs, derivatives, gradient, damping):
    geometry = geometry_for(module)
    _, count = geometry.extents(derivatives)
    positions = draw_positions("authors", count, keep=1, seed=0)
    return precondition_layer(
        geometry.activation_rows(inputs, positions),
        geometry.derivative_rows(derivatives, positions, scale=float(BATCH)),
        damping=damping,
        split="equal",
    ).apply(gradient)


@BIAS
@pytest.mark.parametrize("damping", [1e-3, 0.03, 1.0])
@pytest.mark.parametrize("positions", [(), (7,)], ids=["vectors", "tokens"])
def test_linear(positions, damping, bias):
    module = nn.Linear(40, 35, bias=bias, dtype=torch.float64)
    inputs = normal(BATCH, *positions, 40)
    derivatives, gradient = gradients(module, inputs, bias)

    expected = authors_update(
        with_ones(inputs.reshape(BATCH, -1, 40), bias),
        derivatives.reshape(BATCH, -1, 35),
        gradient,
        damping,
    )

    actual = library_update(module, inputs, derivatives, gradient, damping)
    assert relative_error(actual, expected) < 1e-6


@BIAS
@pytest.mark.parametrize("damping", [1e-3, 0.03, 1.0])
def test_convolution(damping, bias):
    module = nn.Conv2d(5, 34, 3, stride=2, padding=1, bias=bias, dtype=torch.float64)
    inputs = normal(BATCH, 5, 9, 8)
    derivatives, gradient = gradients(module, inputs, bias)
    columns = nn.functional.unfold(inputs, 3, stride=2, padding=1).transpose(1, 2)

    expected = authors_update(
        with_ones(columns, bias),
        derivatives.flatten(2).transpose(1, 2),
        gradient,
        damping,
    )

    actual = library_update(module, inputs, derivatives, gradient, damping)
    assert relative_error(actual, expected) < 1e-6
