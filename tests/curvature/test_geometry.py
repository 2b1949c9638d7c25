"""Rows of a layer: what `reduce` makes of its inputs and output derivatives."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from skfac.curvature.geometry import LinearGeometry, geometry_of
from skfac.curvature.layer import precondition_layer
from tests.support.dense import geometry_for, joined, normal, patches

BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
CONVS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "1x1": {"kernel_size": 1},
    "not square": {"kernel_size": (2, 3)},
    "stride": {"kernel_size": 3, "stride": (2, 3)},
    "dilation": {"kernel_size": (3, 2), "dilation": (2, 3)},
    "padding": {"kernel_size": 3, "padding": 2},
    "padding pair": {"kernel_size": 3, "padding": (2, 1)},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "same, odd": {"kernel_size": (3, 5), "padding": "same"},
    "same, even": {"kernel_size": (2, 4), "padding": "same"},
    "same, odd total": {"kernel_size": (4, 2), "padding": "same", "dilation": (1, 3)},
    "reflect": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": (3, 1), "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": (0, 3), "padding_mode": "circular"},
    "reflect same": {
        "kernel_size": (4, 3),
        "padding": "same",
        "padding_mode": "reflect",
    },
    "everything": {
        "kernel_size": (3, 2),
        "stride": (2, 1),
        "padding": (1, 2),
        "dilation": (1, 2),
        "padding_mode": "circular",
    },
}
EACH_CONV = pytest.mark.parametrize("options", CONVS.values(), ids=CONVS.keys())
# torch says that this costs it a copy; the library never forms it.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def conv_layer(options: dict[str, Any], *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(2, 3, **options, bias=bias, dtype=torch.float64)


def assert_reduces_patches(conv: nn.Conv2d, images: Tensor) -> None:
    """The rows are means of the columns that the convolution multiplies."""
    columns = patches(conv, images)
    outputs = conv(images)
    geometry = geometry_for(conv)
    # The reference proves itself: convolution = unfold + linear.
    products = columns @ joined(conv.weight, conv.bias).T
    torch.testing.assert_close(products.transpose(1, 2), outputs.flatten(2))
    derivatives = normal(*outputs.shape, seed=3)

    rows = geometry.activation_rows(images)

    torch.testing.assert_close(rows, columns.mean(1))
    torch.testing.assert_close(
        geometry.derivative_rows(derivatives, scale=4.0),
        torch.einsum("nchw->nc", 4 * derivatives),
    )
    assert (geometry.d_in, geometry.d_out) == (rows.shape[1], outputs.shape[1])


@EACH_CONV
@BIAS
def test_conv_rows_are_the_mean_patch_and_the_summed_derivative(options, bias):
    assert_reduces_patches(conv_layer(options, bias=bias), normal(4, 2, 8, 7))


PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(
    kernel=PAIR,
    stride=PAIR,
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    padding_mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    image=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    bias=st.booleans(),
)
def test_any_conv_is_unfold_and_linear(image, kernel, bias, **options):
    conv = conv_layer({"kernel_size": kernel, **options}, bias=bias)

    assert_reduces_patches(conv, normal(2, 2, *image))


@EACH_CONV
@BIAS
def test_conv_is_preconditioned_like_a_linear_layer_on_its_patches(options, bias):
    conv, images = conv_layer(options, bias=bias), normal(4, 2, 8, 7)
    # The bias is the linear layer's own, not a column of the patches.
    columns = patches(conv, images)[..., : conv.weight[0].numel()]
    linear = nn.Linear(columns.shape[2], 3, bias=bias, dtype=torch.float64)
    derivatives = normal(*conv(images).shape, seed=3)
    gradient = normal(3, geometry_for(conv).d_in)

    actual, expected = (
        precondition_layer(
            geometry.activation_rows(inputs),
            geometry.derivative_rows(outputs, scale=4.0),
            damping=0.1,
            split="pi",
        ).apply(gradient)
        for geometry, inputs, outputs in [
            (geometry_for(conv), images, derivatives),
            (geometry_for(linear), columns, derivatives.flatten(2).transpose(1, 2)),
        ]
    )

    torch.testing.assert_close(actual, expected)


def assert_rows_make_the_gradient(
    module: nn.Linear | nn.Conv2d, inputs: Tensor, positions: tuple[int, ...]
) -> None:
    """Under mean pooling and a batch-mean loss `∇[W | b] = Dᵀ X / batch`, exactly."""
    outputs = module(inputs)
    pooled = outputs.mean(positions) if positions else outputs
    loss = (pooled * normal(*pooled.shape, seed=1)).sum(1).mean()
    parameters = list(module.parameters())

    derivatives, *gradients = torch.autograd.grad(loss, [outputs, *parameters])

    batch, geometry = len(inputs), geometry_for(module)
    rows = geometry.derivative_rows(derivatives, scale=float(batch))
    weight, bias = gradients if module.bias is not None else (gradients[0], None)
    torch.testing.assert_close(
        rows.T @ geometry.activation_rows(inputs) / batch, joined(weight, bias)
    )


@EACH_CONV
@BIAS
def test_conv_rows_multiply_to_the_weight_gradient(options, bias):
    conv = conv_layer(options, bias=bias)

    assert_rows_make_the_gradient(conv, normal(4, 2, 8, 7), (2, 3))


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

    rows = geometry.activation_rows(values)
    derivatives = geometry.derivative_rows(values, scale=4.0)

    for row, summed, sample in zip(rows, derivatives, samples, strict=True):
        torch.testing.assert_close(row[:5], sum(sample) / len(sample))
        torch.testing.assert_close(summed, 4 * sum(sample))
    assert rows.shape[1] == geometry.d_in == 5 + bias
    assert (rows[:, 5:] == 1).all()


@BIAS
@pytest.mark.parametrize(
    ("module", "inputs", "outputs"),
    [
        (nn.Linear, (0, 2), (0, 3)),
        (nn.Linear, (0, 4, 2), (0, 4, 3)),
        (nn.Conv2d, (0, 2, 5, 6), (0, 3, 3, 4)),
    ],
)
def test_an_empty_batch_has_no_rows(module, inputs, outputs, bias):
    options = {"kernel_size": 3} if module is nn.Conv2d else {}
    geometry = geometry_for(module(2, 3, bias=bias, **options))

    rows = geometry.activation_rows(torch.zeros(inputs))

    assert rows.shape == (0, geometry.d_in)
    assert geometry.derivative_rows(torch.zeros(outputs), scale=1.0).shape == (0, 3)


def test_an_unbatched_image_is_one_row():
    conv, image = conv_layer(CONVS["everything"]), normal(2, 8, 7)
    geometry, derivatives = geometry_for(conv), normal(*conv(image).shape)

    torch.testing.assert_close(
        geometry.activation_rows(image), patches(conv, image[None]).mean(1)
    )
    torch.testing.assert_close(
        geometry.derivative_rows(derivatives, scale=2.0),
        2 * derivatives.sum((1, 2))[None],
    )


@pytest.mark.parametrize(
    "images",
    [
        normal(4, 2, 7, 8).transpose(2, 3),
        normal(4, 2, 8, 7).contiguous(memory_format=torch.channels_last),
        normal(1, 2, 8, 7).expand(4, -1, -1, -1),
        normal(8, 7, 2, 4).permute(3, 2, 0, 1),
    ],
    ids=["transposed", "channels last", "expanded", "permuted"],
)
def test_conv_takes_images_of_any_layout(images):
    assert_reduces_patches(conv_layer(CONVS["everything"]), images)


def test_linear_takes_transposed_tokens():
    geometry = geometry_for(nn.Linear(5, 5))
    # The positions are two dimensions that no view can merge.
    tokens = normal(2, 3, 4, 5).transpose(0, 2)
    packed = tokens.contiguous()

    assert torch.equal(
        geometry.activation_rows(tokens), geometry.activation_rows(packed)
    )
    assert torch.equal(
        geometry.derivative_rows(tokens, scale=2.0),
        geometry.derivative_rows(packed, scale=2.0),
    )


@pytest.mark.parametrize("module", [nn.Linear(4, 3), nn.Conv2d(1, 3, 2)])
def test_a_frozen_bias_counts_as_none(module):
    assert geometry_for(module).d_in == 5
    assert geometry_for(module).bias

    module.bias.requires_grad_(False)

    assert geometry_for(module).d_in == 4
    assert not geometry_for(module).bias
    inputs = torch.zeros(2, 4) if module.weight.ndim == 2 else torch.zeros(2, 1, 3, 3)
    assert geometry_for(module).activation_rows(inputs).shape == (2, 4)


def test_kinds():
    assert geometry_for(nn.Linear(4, 3)).kind == "linear"
    assert geometry_for(nn.Conv2d(1, 3, 2)).kind == "conv2d"


def test_geometry_is_a_value():
    geometry = geometry_of(nn.Linear(4, 3))

    assert geometry == LinearGeometry(d_in=5, d_out=3, bias=True)
    assert geometry != geometry_of(nn.Linear(4, 3, bias=False))


class ScaledLinear(nn.Linear):
    """Computes something else with the same weight."""

    def forward(self, inputs):
        return 2 * super().forward(inputs)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.ConvTranspose2d(2, 3, 3),
        nn.Conv1d(2, 3, 3),
        nn.Conv3d(2, 3, 3),
        nn.Bilinear(2, 3, 4),
        nn.Embedding(5, 3),
        nn.LayerNorm(3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Sequential(nn.Linear(3, 2)),
        ScaledLinear(3, 2),
    ],
    ids=repr,
)
def test_other_modules_are_not_supported(module):
    assert geometry_of(module) is None
