"""Which modules are supported, as what, and the rows of fully connected layers."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import (
    parametrizations,
    parametrize,
    prune,
    spectral_norm,
    weight_norm,
)

from skfac.curvature.geometry import LayerGeometry, geometry_of
from skfac.curvature.linear import LinearGeometry
from skfac.curvature.positions import Positions
from tests.support.dense import geometry_for, normal
from tests.support.layers import CASES, Conv1D, joined

BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
REDUCE = Positions("reduce", None)


def assert_rows_make_the_gradient(
    module: nn.Linear, inputs: Tensor, positions: tuple[int, ...]
) -> None:
    """Under mean pooling and a batch-mean loss `∇[W | b] = Dᵀ X / batch`, exactly."""
    outputs = module(inputs)
    pooled = outputs.mean(positions) if positions else outputs
    loss = (pooled * normal(*pooled.shape, seed=1)).sum(1).mean()
    parameters = dict(module.named_parameters())

    derivatives, *gradients = torch.autograd.grad(loss, [outputs, *parameters.values()])

    batch, geometry = len(inputs), geometry_for(module)
    rows = geometry.derivative_rows(derivatives, REDUCE, scale=float(batch))
    (expected,) = joined(module, dict(zip(parameters, gradients, strict=True)))
    torch.testing.assert_close(
        rows.T @ geometry.activation_rows(inputs, REDUCE) / batch, expected
    )


@BIAS
@pytest.mark.parametrize("positions", [(), (3,), (3, 2)])
def test_linear_rows_multiply_to_the_weight_gradient(positions, bias):
    linear = nn.Linear(5, 3, bias=bias, dtype=torch.float64)
    pooled = tuple(range(1, 1 + len(positions)))

    assert_rows_make_the_gradient(linear, normal(4, *positions, 5), pooled)


@BIAS
@pytest.mark.parametrize("shape", [(5,), (4, 5), (4, 3, 5), (4, 3, 2, 5)])
def test_linear_rows_by_input_shape(shape, bias):
    geometry = geometry_for(nn.Linear(5, 5, bias=bias))
    values = normal(*shape)
    samples = [
        sample.reshape(-1, 5) for sample in (values if len(shape) > 1 else [values])
    ]

    rows = geometry.activation_rows(values, REDUCE)
    derivatives = geometry.derivative_rows(values, REDUCE, scale=4.0)

    for row, summed, sample in zip(rows, derivatives, samples, strict=True):
        torch.testing.assert_close(row[:5], sum(sample) / len(sample))
        torch.testing.assert_close(summed, 4 * sum(sample))
    assert rows.shape[1] == geometry.d_in == 5 + bias
    assert (rows[:, 5:] == 1).all()
    assert geometry.extents(values) == (len(samples), len(samples[0]))


def test_the_bias_column_is_scaled_like_its_position():
    geometry = geometry_for(nn.Linear(5, 5))
    picked = Positions("subsample", torch.tensor([1, 6]))

    rows = geometry.activation_rows(normal(2, 9, 5), picked)

    assert (rows[:, 5] == 3).all()  # √S


def test_linear_takes_transposed_tokens():
    geometry = geometry_for(nn.Linear(5, 5))
    # The positions are two dimensions that no view can merge.
    tokens = normal(2, 3, 4, 5).transpose(0, 2)
    packed = tokens.contiguous()

    assert torch.equal(
        geometry.activation_rows(tokens, REDUCE),
        geometry.activation_rows(packed, REDUCE),
    )
    assert torch.equal(
        geometry.derivative_rows(tokens, REDUCE, scale=2.0),
        geometry.derivative_rows(packed, REDUCE, scale=2.0),
    )


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (nn.Linear(4, 3), (2, 4)),
        (Conv1D(3, 4), (2, 4)),
        (nn.Conv2d(1, 3, 2), (2, 1, 3, 3)),
        (nn.ConvTranspose1d(2, 3, 2), (2, 2, 4)),
    ],
    ids=["linear", "hf_conv1d", "conv2d", "conv_transpose1d"],
)
def test_a_frozen_bias_counts_as_none(module, inputs):
    assert geometry_for(module).d_in == 5
    assert geometry_for(module).bias

    module.bias.requires_grad_(False)

    geometry = geometry_for(module)
    assert geometry.d_in == 4
    assert not geometry.bias
    assert geometry.activation_rows(torch.zeros(inputs), REDUCE).shape == (2, 4)


@pytest.mark.parametrize("name", CASES)
def test_kinds(name):
    module, _ = CASES[name].build(bias=False)
    geometry = geometry_for(module)

    assert geometry.kind == name.split(",")[0]
    assert geometry.diagonal == (geometry.kind == "embedding")
    assert isinstance(geometry, LayerGeometry)


@pytest.mark.parametrize("name", CASES)
def test_geometry_is_a_value(name):
    first, second = (geometry_of(CASES[name].build(bias=False)[0]) for _ in range(2))

    assert first == second
    assert hash(first) == hash(second)


def test_geometries_differ_where_the_rows_do():
    def conv(**options):
        return geometry_of(nn.Conv2d(4, 4, 3, **{"padding": 1, **options}))

    different = [
        conv(),
        conv(stride=2),
        conv(dilation=2),
        conv(padding=2),
        conv(groups=2),
        conv(bias=False),
        conv(padding_mode="circular"),
        conv(padding_mode="reflect"),
        geometry_of(nn.ConvTranspose2d(4, 4, 3, padding=1)),
        geometry_of(nn.ConvTranspose2d(4, 4, 3, stride=2)),
        geometry_of(nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1)),
        geometry_of(nn.Embedding(4, 4)),
        geometry_of(nn.Embedding(4, 4, padding_idx=0)),
        geometry_of(nn.Linear(4, 4)),
        geometry_of(Conv1D(4, 4)),
    ]

    assert len(set(different)) == len(different)
    assert different[-2] == LinearGeometry(d_in=5, d_out=4, bias=True)


class NamedLinear(nn.Linear):
    """A subclass that computes the same."""

    def __init__(self) -> None:
        super().__init__(3, 2)


class NamedConv(nn.Conv2d):
    """A subclass that computes the same."""


class NamedConv1D(Conv1D):
    """A subclass that computes the same."""


class ScaledLinear(nn.Linear):
    """Computes something else with the same weight."""

    def forward(self, inputs):
        return 2 * super().forward(inputs)


class NamedScaledLinear(ScaledLinear):
    """Computes what its base does, which is something else."""


class ScaledConv(nn.Conv2d):
    """Computes something else one call further down."""

    def _conv_forward(self, inputs, weight, bias):
        return 2 * super()._conv_forward(inputs, weight, bias)


class ScaledConv1D(Conv1D):
    """Computes something else with the same weight."""

    def forward(self, inputs):
        return 2 * super().forward(inputs)


class Standardized(nn.Module):
    """A parametrization: the weight is computed from another."""

    def forward(self, weight):
        return weight - weight.mean()


OtherConv1D = type("Conv1D", (nn.Module,), {"weight": nn.Parameter(torch.ones(2, 3))})


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (NamedLinear(), "linear"),
        (NamedConv(2, 3, 2), "conv2d"),
        (NamedConv1D(2, 3), "hf_conv1d"),
    ],
    ids=["linear", "conv2d", "hf_conv1d"],
)
def test_subclasses_that_compute_the_same_are_supported(module, kind):
    assert geometry_for(module).kind == kind


@pytest.mark.parametrize(
    "module",
    [
        nn.Bilinear(2, 3, 4),
        nn.EmbeddingBag(5, 3),
        nn.LayerNorm(3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Sequential(nn.Linear(3, 2)),
        nn.MultiheadAttention(4, 2),
        nn.MultiheadAttention(4, 2).out_proj,
        ScaledLinear(3, 2),
        NamedScaledLinear(3, 2),
        ScaledConv(2, 3, 2),
        ScaledConv1D(2, 3),
        OtherConv1D(),
        nn.LazyLinear(3),
        nn.LazyConv2d(3, 2),
        nn.Linear(2, 3, dtype=torch.complex64),
    ],
    ids=repr,
)
def test_other_modules_are_not_supported(module):
    assert geometry_of(module) is None


def test_a_layer_without_weights_is_not_supported():
    with pytest.warns(UserWarning, match="zero-element"):
        module = nn.Linear(0, 3)

    assert geometry_of(module) is None


def test_a_lazy_layer_is_supported_from_its_first_forward_on():
    module = nn.LazyConv2d(3, 2)
    module(torch.zeros(1, 2, 4, 4))

    assert geometry_for(module) == geometry_of(nn.Conv2d(2, 3, 2))


@pytest.mark.parametrize(
    "change",
    [
        lambda module: parametrize.register_parametrization(
            module, "weight", Standardized()
        ),
        lambda module: parametrize.register_parametrization(
            module, "bias", Standardized()
        ),
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        lambda module: prune.l1_unstructured(module, "weight", amount=0.5),
        lambda module: prune.l1_unstructured(module, "bias", amount=0.5),
        spectral_norm,
        weight_norm,
    ],
    ids=[
        "parametrized weight",
        "parametrized bias",
        "weight norm",
        "orthogonal",
        "pruned weight",
        "pruned bias",
        "old spectral norm",
        "old weight norm",
    ],
)
@pytest.mark.filterwarnings("ignore:.*(spectral|weight)_norm.*deprecated")
def test_a_parameter_that_is_computed_from_others_is_not_supported(change):
    module = nn.Linear(3, 3)
    assert geometry_of(module) is not None

    change(module)

    assert geometry_of(module) is None


def test_looking_at_a_parametrized_layer_does_not_change_it():
    # Too large for its power iteration to have converged at once.
    module = parametrizations.spectral_norm(nn.Linear(40, 30))
    before = copy.deepcopy(module.state_dict())

    assert geometry_of(module) is None

    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_hugging_face_is_recognised():
    transformers = pytest.importorskip("transformers.pytorch_utils")
    module = transformers.Conv1D(3, 5).double()
    inputs, geometry = normal(4, 2, 5), geometry_for(module)

    assert geometry.kind == "hf_conv1d"
    rows = geometry.activation_rows(inputs, Positions("expand", None)) / 2**0.5
    torch.testing.assert_close(
        rows @ geometry.to_matrix(module.weight, module.bias).T,
        module(inputs).flatten(0, 1),
    )
