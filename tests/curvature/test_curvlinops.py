"""Factors against those of curvlinops, an independent implementation.

For a sum loss over `B` samples, curvlinops' factors leave out constants that cancel in
its product: of `expand`, the `S` of `A`; of `G`, the division by the number of rows.
"""

import pytest
import torch
from torch import Tensor, nn

from skfac.curvature.positions import Positions, Reduction
from tests.support.dense import factor, geometry_for, normal

curvlinops = pytest.importorskip("curvlinops")

BATCH = 6
BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
MODE = pytest.mark.parametrize("reduction", ["reduce", "expand"])


class Mean(nn.Module):
    """Averages over the positions."""

    def __init__(self, *dims: int):
        super().__init__()
        self.dims = dims

    def forward(self, outputs: Tensor) -> Tensor:
        return outputs.mean(self.dims)


def models(bias: bool) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Models whose first and third modules are compared, and the shape of an input."""
    return {
        "vectors": (
            nn.Sequential(
                nn.Linear(4, 3, bias=bias), nn.Tanh(), nn.Linear(3, 2, bias=bias)
            ),
            (4,),
        ),
        "tokens": (
            nn.Sequential(
                nn.Linear(4, 3, bias=bias),
                nn.Tanh(),
                nn.Linear(3, 2, bias=bias),
                Mean(1),
            ),
            (5, 4),
        ),
        "images": (
            nn.Sequential(
                nn.Conv2d(2, 3, (3, 2), padding=(1, 2), dilation=(1, 2), bias=bias),
                nn.Tanh(),
                nn.Conv2d(3, 2, 2, stride=(1, 2), bias=bias),
                Mean(2, 3),
            ),
            (2, 5, 6),
        ),
    }


def library_factors(
    model: nn.Module, layer: str, batch: tuple[Tensor, Tensor], reduction: Reduction
) -> tuple[Tensor, Tensor, int, int]:
    """`A` and `G` of the empirical Fisher, positions and rows."""
    module, seen = model.get_submodule(layer), []
    inputs, targets = batch
    with module.register_forward_hook(lambda _, args, out: seen.append((args[0], out))):
        loss = nn.MSELoss(reduction="sum")(model(inputs), targets)
    ((layer_inputs, outputs),) = seen
    (derivatives,) = torch.autograd.grad(loss, outputs)
    geometry, positions = geometry_for(module), Positions(reduction, None)
    rows = geometry.derivative_rows(derivatives, positions, scale=1.0)
    columns = geometry.activation_rows(layer_inputs.detach(), positions)
    return factor(columns), factor(rows), geometry.extents(outputs)[1], len(rows)


@BIAS
@MODE
@pytest.mark.parametrize("name", ["vectors", "tokens", "images"])
def test_factors_are_those_of_curvlinops(name, reduction, bias):
    model, shape = models(bias)[name]
    model.double()
    batch = normal(BATCH, *shape), normal(BATCH, 2, seed=1)
    operator = curvlinops.KFACLinearOperator(
        model,
        nn.MSELoss(reduction="sum"),
        list(model.parameters()),
        [batch],
        fisher_type=curvlinops.FisherType.EMPIRICAL,
        kfac_approx=reduction,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    assert set(operator._input_covariances) == {"0", "2"}

    for layer in ("0", "2"):
        a, g, positions, rows = library_factors(model, layer, batch, reduction)
        share = positions if reduction == "expand" else 1

        torch.testing.assert_close(a / share, operator._input_covariances[layer])
        torch.testing.assert_close(g * rows, operator._gradient_covariances[layer])
