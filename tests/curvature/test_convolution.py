"""Rows of convolutions: unfold and linear, for any geometry and every mode."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from skfac.curvature.convolution import Axis
from skfac.curvature.layer import precondition_layer
from skfac.curvature.positions import Positions, Reduction, draw_positions
from tests.support.dense import geometry_for, normal
from tests.support.layers import (
    by_position,
    joined,
    patches,
    reference_rows,
    trained,
    unfolded,
)

MODES: list[Reduction] = ["reduce", "authors", "subsample", "expand"]
MODE = pytest.mark.parametrize("reduction", MODES)
REDUCE = Positions("reduce", None)
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
    "valid, circular": {
        "kernel_size": 3,
        "padding": "valid",
        "padding_mode": "circular",
    },
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
    "groups": {"kernel_size": (2, 3), "groups": 2, "stride": 2, "padding": 1},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": "same"},
    "everything": {
        "kernel_size": (3, 2),
        "stride": (2, 1),
        "padding": (1, 2),
        "dilation": (1, 2),
        "padding_mode": "circular",
        "groups": 2,
    },
}
EACH_CONV = pytest.mark.parametrize("options", CONVS.values(), ids=CONVS.keys())
# torch says that this costs it a copy; the library never forms it.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def conv_layer(options: dict[str, Any], *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(4, 8, **options, bias=bias, dtype=torch.float64)


def with_ones(columns: Tensor, bias: bool) -> Tensor:
    ones = columns.new_ones(*columns.shape[:-1], 1)
    return torch.cat([columns, ones], -1) if bias else columns


def assert_rows(module: nn.Module, inputs: Tensor, columns: Tensor) -> None:
    """The rows of every mode come from `columns`, which the layer multiplies."""
    outputs = module(inputs)
    geometry, blocks = geometry_for(module), joined(module, trained(module))
    # The reference proves itself: convolution = patches + linear.
    torch.testing.assert_close(
        columns @ blocks.mT[:, None], by_position(module, outputs)
    )
    derivatives = normal(*outputs.shape, seed=3)
    by_site = by_position(module, 4 * derivatives)
    _, count = geometry.extents(outputs)
    assert count == columns.shape[2]
    for reduction in MODES:
        positions = draw_positions(reduction, count, keep=3, seed=count)

        rows = geometry.activation_rows(inputs, positions)
        summed = geometry.derivative_rows(derivatives, positions, scale=4.0)

        picked = positions.picked
        torch.testing.assert_close(
            rows, reference_rows(columns, "activations", reduction, picked)
        )
        torch.testing.assert_close(
            summed, reference_rows(by_site, "derivatives", reduction, picked)
        )


@EACH_CONV
@BIAS
def test_conv_is_unfold_and_linear(options, bias):
    conv, images = conv_layer(options, bias=bias), normal(3, 4, 8, 7)

    assert_rows(conv, images, with_ones(unfolded(conv, images), bias))


PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(
    kernel=PAIR,
    stride=PAIR,
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    padding_mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    groups=st.sampled_from([1, 2, 4]),
    image=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    bias=st.booleans(),
)
def test_any_conv_is_unfold_and_linear(image, kernel, bias, **options):
    conv = conv_layer({"kernel_size": kernel, **options}, bias=bias)
    images = normal(2, 4, *image)

    assert_rows(conv, images, with_ones(unfolded(conv, images), bias))


@st.composite
def layers(draw, kinds, transposed):
    kind = draw(st.sampled_from(kinds))
    dims = kinds.index(kind) + 1
    top = (7, 4, 3)[dims - 1]

    def sizes(low, high):
        return draw(st.tuples(*[st.integers(low, high)] * dims))

    groups = draw(st.sampled_from([1, 2]))
    options = {
        "kernel_size": sizes(1, 3),
        "stride": sizes(1, 3),
        "dilation": sizes(1, 2),
        "padding": sizes(0, 3),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if transposed:
        limits = map(max, options["stride"], options["dilation"])
        options["output_padding"] = tuple(
            draw(st.integers(0, limit - 1)) for limit in limits
        )
    return kind(2, 4, **options, dtype=torch.float64), (2, 2, *sizes(1, top))


@pytest.mark.parametrize(
    ("kinds", "transposed"),
    [
        ([nn.Conv1d, nn.Conv2d, nn.Conv3d], False),
        ([nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d], True),
    ],
    ids=["conv", "transposed"],
)
@settings(max_examples=60)
@given(choose=st.data())
def test_patches_of_any_layer_are_derivatives_for_its_weight(kinds, transposed, choose):
    module, shape = choose.draw(layers(kinds, transposed))
    inputs = normal(*shape)
    try:
        module(inputs)
    except RuntimeError:
        return  # the padded input is smaller than the kernel

    assert_rows(module, inputs, patches(module, inputs))


def test_patches_by_autograd_are_those_of_unfold():
    conv, images = conv_layer(CONVS["everything"]), normal(2, 4, 8, 7)

    torch.testing.assert_close(
        patches(conv, images), with_ones(unfolded(conv, images), bias=True)
    )


@EACH_CONV
@BIAS
@MODE
def test_conv_is_preconditioned_like_linear_layers_on_its_patches(
    options, bias, reduction
):
    conv, images = conv_layer(options, bias=bias), normal(4, 4, 8, 7)
    geometry, outputs = geometry_for(conv), conv(images)
    derivatives = normal(*outputs.shape, seed=3)
    _, count = geometry.extents(outputs)
    positions = draw_positions(reduction, count, keep=3, seed=4)
    groups = () if geometry.groups == 1 else (geometry.groups,)
    gradient = normal(*groups, geometry.d_out, geometry.d_in)

    actual = precondition_layer(
        geometry.activation_rows(images, positions),
        geometry.derivative_rows(derivatives, positions, scale=4.0),
        damping=0.1,
        split="equal",
    ).apply(gradient)

    # The bias is the linear layer's own, not a column of the patches.
    columns, by_site = unfolded(conv, images), by_position(conv, derivatives)
    linear = geometry_for(nn.Linear(columns.shape[3], geometry.d_out, bias=bias))
    gradients = gradient if groups else gradient[None]
    expected = [
        precondition_layer(
            linear.activation_rows(inputs, positions),
            linear.derivative_rows(group, positions, scale=4.0),
            damping=0.1,
            split="equal",
        ).apply(one)
        for inputs, group, one in zip(columns, by_site, gradients, strict=True)
    ]
    torch.testing.assert_close(actual.reshape(gradients.shape), torch.stack(expected))


@EACH_CONV
@BIAS
def test_reduced_rows_multiply_to_the_weight_gradient_under_a_pool(options, bias):
    conv, images = conv_layer(options, bias=bias), normal(4, 4, 8, 7)
    geometry, outputs = geometry_for(conv), conv(images)
    pooled = outputs.mean((2, 3))
    loss = (pooled * normal(*pooled.shape, seed=1)).sum(1).mean()
    parameters = trained(conv)
    derivatives, *gradients = torch.autograd.grad(loss, [outputs, *parameters.values()])

    rows = geometry.derivative_rows(derivatives, REDUCE, scale=4.0)

    product = rows.mT @ geometry.activation_rows(images, REDUCE) / 4
    expected = joined(conv, dict(zip(parameters, gradients, strict=True)))
    torch.testing.assert_close(product.reshape(expected.shape), expected)


@pytest.mark.parametrize(
    "images",
    [
        normal(4, 4, 7, 8).transpose(2, 3),
        normal(4, 4, 8, 7).contiguous(memory_format=torch.channels_last),
        normal(1, 4, 8, 7).expand(4, -1, -1, -1),
        normal(8, 7, 4, 4).permute(3, 2, 0, 1),
    ],
    ids=["transposed", "channels last", "expanded", "permuted"],
)
def test_conv_takes_images_of_any_layout(images):
    conv = conv_layer(CONVS["everything"])

    assert_rows(conv, images, with_ones(unfolded(conv, images), bias=True))


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in [result] if isinstance(result, Tensor) else []:
            self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("reduction", ["reduce", "authors", "subsample"])
@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 8, 7, padding=3),
        nn.Conv2d(4, 8, 7, stride=2, groups=2),
        nn.ConvTranspose2d(4, 8, 7, stride=4),
    ],
    ids=["plain", "groups", "transposed"],
)
def test_nothing_larger_than_the_input_is_formed(module, reduction):
    images = torch.randn(2, 4, 40, 40)
    geometry = geometry_for(module)
    _, count = geometry.extents(module(images))
    positions = draw_positions(reduction, count, keep=3, seed=0)

    with Largest() as largest:
        geometry.activation_rows(images, positions)

    assert 0 < largest.numel <= images.numel()


def test_a_pixel_that_no_patch_meets_is_not_looked_at():
    conv, images = nn.Conv2d(1, 1, 1, stride=3), torch.ones(1, 1, 5, 5)
    images[0, 0, 1, 1] = torch.inf
    geometry = geometry_for(conv)

    for reduction in MODES:
        positions = draw_positions(reduction, 4, keep=4, seed=0)
        assert geometry.activation_rows(images, positions).isfinite().all()


def test_infinite_pixels_do_not_spoil_the_padding():
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    images = torch.ones(1, 1, 3, 3)
    images[0, 0, 0, 0] = torch.inf  # what a padding of 0 · x would make nan

    rows = geometry_for(conv).activation_rows(images, Positions("expand", None))

    assert not rows.isnan().any()


@pytest.mark.parametrize("reduction", MODES)
def test_an_output_of_another_size_is_refused(reduction):
    module = nn.ConvTranspose2d(1, 1, 3, stride=2)
    images = torch.randn(2, 1, 4, 4)
    geometry = geometry_for(module)
    _, count = geometry.extents(module(images, output_size=(10, 9)))
    positions = draw_positions(reduction, count, keep=3, seed=0)

    with pytest.raises(ValueError, match=r"90 output positions should have 81.*skip"):
        geometry.activation_rows(images, positions)


@given(
    kernel=st.integers(1, 4),
    stride=st.integers(1, 4),
    dilation=st.integers(1, 3),
    before=st.integers(0, 6),
    after=st.integers(-3, 6),
    extent=st.integers(1, 9),
    transposed=st.booleans(),
)
def test_slices_and_indices_of_an_axis_agree(extent, **options):
    axis = Axis(**options)
    count = axis.outputs(extent)
    if count < 1:
        return

    met = [list(range(extent))[axis.met(k, extent)] for k in range(axis.kernel)]

    sources = axis.sources(torch.arange(count), extent)
    assert met == [[i for i in column if i >= 0] for column in sources.T.tolist()]
