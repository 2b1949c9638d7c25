"""Every mode on every kind of layer, against patches from autograd."""

import pytest
import torch
from torch import Tensor, nn

from skfac.curvature.geometry import LayerGeometry
from skfac.curvature.positions import Positions, draw_positions
from tests.support.dense import factor, geometry_for, normal
from tests.support.layers import (
    CASES,
    CASES_AND_BIAS,
    TRANSPOSED,
    by_position,
    joined,
    patches,
    reference_rows,
    trained,
)

EACH_CASE = pytest.mark.parametrize("name", CASES)
EACH_CASE_AND_BIAS = pytest.mark.parametrize(("name", "bias"), CASES_AND_BIAS)
MODE = pytest.mark.parametrize(
    "reduction", ["reduce", "authors", "subsample", "expand"]
)
# torch says that this costs it a copy; the library never forms it.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def built(name: str, bias: bool) -> tuple[nn.Module, Tensor, LayerGeometry]:
    module, inputs = CASES[name].build(bias=bias)
    return module, inputs, geometry_for(module)


def ungrouped(blocks: Tensor) -> Tensor:
    return blocks[0] if len(blocks) == 1 else blocks


def activation_factor(geometry: LayerGeometry, rows: Tensor, count: int) -> Tensor:
    """`A` from the rows of the activations' side of `count` derivative rows."""
    if geometry.diagonal:
        return (rows**2).sum(0).div(count).diag()
    return rows.mT @ rows / count


@EACH_CASE_AND_BIAS
def test_the_matrix_multiplies_patches(name, bias):
    module, inputs, geometry = built(name, bias)
    parameters = trained(module)

    matrix = geometry.to_matrix(parameters["weight"], parameters.get("bias"))

    blocks = joined(module, parameters)
    assert torch.equal(matrix, ungrouped(blocks))
    assert (geometry.d_out, geometry.d_in) == matrix.shape[-2:]
    assert geometry.groups == getattr(module, "groups", 1)
    assert geometry.bias == ("bias" in parameters) == bias
    columns = patches(module, inputs)
    outputs = by_position(module, module(inputs))
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        # A padded token has an output, but x = 0.
        outputs = outputs * (inputs != module.padding_idx).flatten(1)[None, ..., None]
    if "bias" not in parameters and getattr(module, "bias", None) is not None:
        outputs = outputs - module.bias  # frozen: no part of the matrix
    torch.testing.assert_close(columns @ blocks.mT[:, None], outputs)


@EACH_CASE_AND_BIAS
def test_a_matrix_splits_into_the_shapes_of_the_parameters(name, bias):
    module, _, geometry = built(name, bias)
    groups = () if geometry.groups == 1 else (geometry.groups,)
    matrix = normal(*groups, geometry.d_out, geometry.d_in)

    weight, column = geometry.from_matrix(matrix)

    assert weight.shape == module.weight.shape
    assert (column is not None) == bias
    if bias:
        assert column.shape == module.bias.shape
    assert torch.equal(geometry.to_matrix(weight, column), matrix)
    if geometry.groups == 1 or not isinstance(module, TRANSPOSED):
        assert weight.untyped_storage().data_ptr() == matrix.data_ptr()


@EACH_CASE_AND_BIAS
@MODE
def test_rows_are_what_the_table_of_modes_says(name, bias, reduction):
    module, inputs, geometry = built(name, bias)
    outputs = module(inputs)
    derivatives = normal(*outputs.shape, seed=3)
    batch, count = geometry.extents(outputs)
    positions = draw_positions(reduction, count, keep=2, seed=4)

    rows = geometry.activation_rows(inputs, positions)
    summed = geometry.derivative_rows(derivatives, positions, scale=4.0)

    columns, by_site = patches(module, inputs), by_position(module, 4 * derivatives)
    assert columns.shape[1:3] == by_site.shape[1:3] == (batch, count)
    picked = positions.picked
    torch.testing.assert_close(
        summed, reference_rows(by_site, "derivatives", reduction, picked)
    )
    if not geometry.diagonal:
        torch.testing.assert_close(
            rows, reference_rows(columns, "activations", reduction, picked)
        )
    assert rows.dtype == summed.dtype == torch.float64


@pytest.mark.parametrize("name", [name for name in CASES if "embedding" in name])
@MODE
def test_an_embedding_has_the_factor_of_its_one_hot_inputs(name, reduction):
    module, inputs, geometry = built(name, False)
    outputs = module(inputs)
    batch, count = geometry.extents(outputs)
    positions = draw_positions(reduction, count, keep=2, seed=4)
    n = len(geometry.derivative_rows(outputs, positions, scale=1.0))

    rows = geometry.activation_rows(inputs, positions)

    (one_hot,) = patches(module, inputs)
    if reduction in ("reduce", "authors"):
        expected = one_hot.sum((0, 1)).div(batch * count).diag()
        assert n == batch
    else:
        kept = reference_rows(one_hot[None], "activations", reduction, positions.picked)
        expected = factor(kept)
        assert len(kept) == n
    assert geometry.diagonal
    torch.testing.assert_close(activation_factor(geometry, rows, n), expected)


@EACH_CASE_AND_BIAS
def test_expanded_rows_multiply_to_the_weight_gradient(name, bias):
    module, inputs, geometry = built(name, bias)
    outputs = module(inputs)
    batch, count = geometry.extents(outputs)
    loss = (outputs.tanh() * normal(*outputs.shape, seed=1)).sum() / batch
    parameters = trained(module)
    derivatives, *gradients = torch.autograd.grad(loss, [outputs, *parameters.values()])
    positions = Positions("expand", None)

    rows = geometry.derivative_rows(derivatives, positions, scale=float(batch))

    if geometry.diagonal:  # its activation rows are not those of the samples
        columns = reference_rows(patches(module, inputs), "activations", "expand", None)
    else:
        columns = geometry.activation_rows(inputs, positions)
    # x̄ carries √S and n = B S.
    product = rows.mT @ columns * count**0.5 / (batch * count)
    expected = joined(module, dict(zip(parameters, gradients, strict=True)))
    torch.testing.assert_close(product, ungrouped(expected))


@EACH_CASE_AND_BIAS
def test_subsample_is_unbiased_for_expand(name, bias):
    module, inputs, geometry = built(name, bias)
    outputs = module(inputs)
    derivatives = normal(*outputs.shape, seed=3)
    _, count = geometry.extents(outputs)

    def both_factors(positions: Positions) -> tuple[Tensor, Tensor]:
        rows = geometry.derivative_rows(derivatives, positions, scale=2.0)
        columns = geometry.activation_rows(inputs, positions)
        n = rows.shape[-2]
        return activation_factor(geometry, columns, n), rows.mT @ rows / n

    draws = [
        both_factors(Positions("subsample", torch.tensor([position])))
        for position in range(count)
    ]

    expanded = both_factors(Positions("expand", None))
    for side, expected in zip(zip(*draws, strict=True), expanded, strict=True):
        torch.testing.assert_close(torch.stack(side).mean(0), expected)


@EACH_CASE
def test_keeping_all_positions_is_expand(name):
    module, inputs, geometry = built(name, not name.startswith("embedding"))
    outputs = module(inputs)
    _, count = geometry.extents(outputs)
    kept = draw_positions("subsample", count, keep=count + 1, seed=0)
    all_of_them = Positions("expand", None)

    assert torch.equal(
        geometry.activation_rows(inputs, kept),
        geometry.activation_rows(inputs, all_of_them),
    )
    assert torch.equal(
        geometry.derivative_rows(outputs, kept, scale=2.0),
        geometry.derivative_rows(outputs, all_of_them, scale=2.0),
    )


@EACH_CASE_AND_BIAS
@MODE
def test_rows_keep_the_dtype_and_take_a_scale_on_the_device(name, bias, reduction):
    module, inputs, geometry = built(name, bias)
    outputs = module(inputs)
    _, count = geometry.extents(outputs)
    positions = draw_positions(reduction, count, keep=2, seed=4)
    derivatives = outputs.detach().float()

    scaled, expected = (
        geometry.derivative_rows(derivatives, positions, scale=scale)
        for scale in (torch.tensor(8.0, dtype=torch.float64), 8.0)
    )

    assert scaled.dtype == torch.float32
    assert torch.equal(scaled, expected)
    if not geometry.diagonal:
        rows = geometry.activation_rows(inputs.bfloat16(), positions)
        assert rows.dtype == torch.bfloat16


@EACH_CASE
@MODE
def test_rows_are_copies(name, reduction):
    module, inputs, geometry = built(name, False)
    outputs = module(inputs).detach()
    _, count = geometry.extents(outputs)
    positions = draw_positions(reduction, count, keep=10**6, seed=4)
    rows = geometry.activation_rows(inputs, positions)
    summed = geometry.derivative_rows(outputs, positions, scale=1.0)
    expected = rows.clone(), summed.clone()

    inputs.zero_()
    outputs.zero_()

    assert torch.equal(rows, expected[0])
    assert torch.equal(summed, expected[1])


@EACH_CASE_AND_BIAS
@MODE
def test_any_layout_of_memory(name, bias, reduction):
    module, inputs, geometry = built(name, bias)
    outputs = module(inputs).detach()
    _, count = geometry.extents(outputs)
    positions = draw_positions(reduction, count, keep=2, seed=4)

    def backwards(values: Tensor) -> Tensor:
        order = range(values.ndim - 1, -1, -1)
        return values.permute(*order).contiguous().permute(*order)

    rows = geometry.activation_rows(backwards(inputs), positions)
    summed = geometry.derivative_rows(backwards(outputs), positions, scale=2.0)

    torch.testing.assert_close(rows, geometry.activation_rows(inputs, positions))
    torch.testing.assert_close(
        summed, geometry.derivative_rows(outputs, positions, scale=2.0)
    )
    # Whatever came in: a wire would make them so, and products would round otherwise.
    assert rows.is_contiguous()
    assert summed.is_contiguous()


@pytest.mark.parametrize(
    ("name", "bias"),
    [
        (name, bias)
        for name, bias in CASES_AND_BIAS
        if not name.endswith(("unbatched", "vector"))
    ],
)
@MODE
def test_an_empty_batch_has_no_rows(name, bias, reduction):
    module, inputs, geometry = built(name, bias)
    outputs = module(inputs).detach()[:0]
    batch, count = geometry.extents(outputs)
    positions = draw_positions(reduction, count, keep=2, seed=4)

    rows = geometry.activation_rows(inputs[:0], positions)
    summed = geometry.derivative_rows(outputs, positions, scale=1.0)

    groups = () if geometry.groups == 1 else (geometry.groups,)
    assert batch == 0
    assert rows.shape == (*groups, 0, geometry.d_in)
    assert summed.shape == (*groups, 0, geometry.d_out)


@pytest.mark.parametrize("name", ["linear, tokens", "hf_conv1d, tokens", "embedding"])
@MODE
def test_samples_without_positions_have_no_rows(name, reduction):
    module, inputs, geometry = built(name, False)
    outputs = module(inputs).detach()[:, :0]
    assert geometry.extents(outputs) == (4, 0)
    positions = draw_positions(reduction, 0, keep=2, seed=4)

    rows = geometry.activation_rows(inputs[:, :0], positions)
    summed = geometry.derivative_rows(outputs, positions, scale=1.0)

    assert rows.shape == (0, geometry.d_in)
    assert summed.shape == (0, geometry.d_out)
