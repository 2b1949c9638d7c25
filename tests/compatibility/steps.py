"""Preconditioned gradients of tiny models, and K-FAC by hand for them."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skfac.client import Preconditioner
from tests.compatibility.cells import gradients_of
from tests.support.dense import dense_inverse, dense_split

DAMPING = 0.1
CLOSE: dict[str, Any] = {"rtol": 1e-7, "atol": 1e-10}
EXACT: dict[str, Any] = {
    "damping": DAMPING,
    "damping_split": "pi",
    "update_every": 1,
    "lag": 1,
    "on_late": "wait",
    "wire_dtype": "float64",
    "trust": "none",
    "rank": None,
}
"""Settings with which the result is K-FAC and nothing else."""


both_spaces = pytest.mark.parametrize("apply", ["gradient", "row"])


def squares(outputs: Tensor) -> Tensor:
    """A loss whose derivative by each sample's outputs is these outputs."""
    return outputs.square().sum(-1).mean() / 2


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    """Plain gradient descent on all parameters."""
    return torch.optim.SGD(model.parameters(), lr=lr)


def preconditioned(
    model: nn.Module, backward: Callable[[Any], None], **settings: Any
) -> dict[str, Tensor]:
    """Take two steps at the same weights.

    The second one uses the curvature of the first, which is its own.

    Returns:
        The gradients by parameter after the second.
    """
    with Preconditioner(model, sgd(model), **(EXACT | settings)) as pre:
        for _ in range(2):
            model.zero_grad()
            backward(model)
            pre.step()
    return gradients_of(model)


def kfac(inputs: Tensor, derivatives: Tensor, *, bias: bool = True) -> Tensor:
    """K-FAC by hand for the mean loss of `n` rows.

    Args:
        inputs: Of a linear layer, `[n, features]`.
        derivatives: Of each row's own loss, `[n, d_out]`.
        bias: Whether the layer has one.

    Returns:
        The preconditioned gradient `[d_out, d_in]`, the bias as last column.
    """
    rows = inputs.detach()
    if bias:
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
    damping_a, damping_g = dense_split(rows, derivatives, DAMPING)
    gradient = derivatives.T @ rows / len(rows)
    return (
        dense_inverse(derivatives, damping_g)
        @ gradient
        @ dense_inverse(rows, damping_a)
    )


def as_matrix(gradients: dict[str, Tensor], name: str = "") -> Tensor:
    """The gradients of a linear layer with a bias as one matrix."""
    prefix = f"{name}." if name else ""
    weight, bias = gradients[f"{prefix}weight"], gradients[f"{prefix}bias"]
    return torch.cat([weight, bias[:, None]], 1)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same parameters have gradients, and the same ones."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, **CLOSE)


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers in float64 with tanh between them, the same each time."""
    torch.manual_seed(0)
    pairs = itertools.pairwise(sizes)
    layers = [layer for pair in pairs for layer in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()
