"""One layer's preconditioner, its damping included, against dense matrices."""

import math

import pytest
import torch
from torch import Tensor

from skfac.curvature.inverse import DenseInverse, LowRankInverse
from skfac.curvature.layer import precondition_layer
from tests.support.dense import (
    dense_inverse,
    dense_split,
    normal,
    relative_error,
)

# Examples, d_in, d_out: every pair of low-rank and dense factors.
SIZES = pytest.mark.parametrize(
    ("count", "d_in", "d_out"),
    [(1, 4, 3), (3, 7, 5), (6, 7, 5), (6, 5, 7), (9, 5, 4)],
)
DAMPING = pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
SPLIT = pytest.mark.parametrize("split", ["pi", "equal"])


def snapshot(count: int, d_in: int, d_out: int) -> tuple[Tensor, Tensor]:
    """Rows of unequal scale, so that π is far from 1."""
    return 3 * normal(count, d_in), 0.1 * normal(count, d_out, seed=1)


@SIZES
@DAMPING
@SPLIT
def test_row_gradient_and_dense_space_agree(count, d_in, d_out, damping, split):
    activations, derivatives = snapshot(count, d_in, d_out)
    gradient = derivatives.T @ activations / count
    shares = (damping**0.5,) * 2
    if split == "pi":
        shares = dense_split(activations, derivatives, damping)
    expected = (
        dense_inverse(derivatives, shares[1])
        @ gradient
        @ dense_inverse(activations, shares[0])
    )

    layer = precondition_layer(activations, derivatives, damping=damping, split=split)
    in_gradient_space = layer.apply(gradient)
    in_row_space = (
        layer.derivatives.right(derivatives).T
        @ layer.activations.right(activations)
        / count
    )

    assert relative_error(in_gradient_space, expected) < 1e-10
    assert relative_error(in_row_space, expected) < 1e-10
    assert (in_gradient_space * gradient).sum() > 0


@SIZES
def test_any_gradient_is_turned_by_less_than_a_right_angle(count, d_in, d_out):
    layer = precondition_layer(*snapshot(count, d_in, d_out), damping=0.01, split="pi")
    gradient = normal(d_out, d_in, seed=2)

    assert (layer.apply(gradient) * gradient).sum() > 0


def test_each_side_is_low_rank_when_it_is_wider_than_the_snapshot():
    layer = precondition_layer(*snapshot(6, 7, 5), damping=0.1, split="pi")

    assert isinstance(layer.activations, LowRankInverse)
    assert isinstance(layer.derivatives, DenseInverse)


def test_apply_leaves_the_gradient_alone():
    layer = precondition_layer(*snapshot(3, 7, 5), damping=0.1, split="pi")
    gradient = normal(5, 7)
    before = gradient.clone()

    layer.apply(gradient)

    assert torch.equal(gradient, before)


def test_with_tensors_is_the_same_preconditioner_in_other_tensors():
    layer = precondition_layer(*snapshot(6, 7, 5), damping=0.1, split="pi")
    copies = layer.tensors[0].clone(), layer.tensors[1].clone()
    gradient = normal(5, 7)

    moved = layer.with_tensors(*copies)

    assert moved.tensors[0] is moved.activations.tensor is copies[0]
    assert moved.tensors[1] is moved.derivatives.tensor is copies[1]
    assert torch.equal(moved.apply(gradient), layer.apply(gradient))


@SIZES
@DAMPING
def test_pi_comes_from_the_traces_of_the_factors(count, d_in, d_out, damping):
    activations, derivatives = snapshot(count, d_in, d_out)
    expected = dense_split(activations, derivatives, damping)

    layer = precondition_layer(activations, derivatives, damping=damping, split="pi")
    shares = layer.activations.damping, layer.derivatives.damping

    assert shares == pytest.approx(expected, rel=1e-12)
    assert math.prod(shares) == pytest.approx(damping, rel=1e-12)


@SPLIT
@pytest.mark.parametrize("scales", [(0, 1), (1, 0), (0, 0)])
def test_pi_is_one_when_a_factor_is_zero(scales, split):
    activations, derivatives = normal(3, 5) * scales[0], normal(3, 4) * scales[1]

    layer = precondition_layer(activations, derivatives, damping=0.04, split=split)

    assert layer.activations.damping == pytest.approx(0.2)
    assert layer.derivatives.damping == pytest.approx(0.2)


def test_rows_of_zeros_divide_the_gradient_by_the_damping():
    rows = (
        torch.zeros(3, 5, dtype=torch.float64),
        torch.zeros(3, 4, dtype=torch.float64),
    )
    gradient = normal(4, 5)

    layer = precondition_layer(*rows, damping=0.04, split="pi")

    torch.testing.assert_close(layer.apply(gradient), gradient / 0.04)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_result_has_the_dtype_of_the_rows(dtype):
    activations, derivatives = (rows.to(dtype) for rows in snapshot(3, 7, 5))

    layer = precondition_layer(activations, derivatives, damping=0.1, split="pi")

    assert layer.apply(normal(5, 7).to(dtype)).dtype is dtype


@SPLIT
@pytest.mark.parametrize("damping", [0.0, -1.0, math.inf, math.nan])
def test_rejects_damping_that_is_not_positive_and_finite(damping, split):
    with pytest.raises(ValueError, match="positive and finite"):
        precondition_layer(*snapshot(3, 7, 5), damping=damping, split=split)


def test_rejects_an_empty_snapshot():
    with pytest.raises(ValueError, match="at least one row"):
        precondition_layer(*snapshot(0, 7, 5), damping=0.1, split="pi")


@pytest.mark.parametrize("groups", [1, 3])
@SIZES
@SPLIT
def test_grouped_layers_are_preconditioned_as_one_block_diagonal(
    count, d_in, d_out, groups, split
):
    activations = 3 * normal(groups, count, d_in)
    activations[0] *= 2
    derivatives = 0.1 * normal(groups, count, d_out, seed=1)
    gradient = normal(groups, d_out, d_in, seed=2)
    means = [float(x.square().sum()) / x.numel() for x in (activations, derivatives)]
    pi = (means[0] / means[1]) ** 0.5 if split == "pi" else 1.0

    layer = precondition_layer(activations, derivatives, damping=0.04, split=split)
    applied = layer.apply(gradient)

    for i in range(groups):
        expected = (
            dense_inverse(derivatives[i], 0.2 / pi)
            @ gradient[i]
            @ dense_inverse(activations[i], 0.2 * pi)
        )
        assert relative_error(applied[i], expected) < 1e-10
    in_row_space = (
        layer.derivatives.right(derivatives).mT
        @ layer.activations.right(activations)
        / count
    )
    assert relative_error(
        in_row_space, layer.apply(derivatives.mT @ activations / count)
    ) < (1e-10)


@SIZES
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("grouped", [False, True])
def test_rows_of_several_workers_are_those_of_one(count, d_in, d_out, parts, grouped):
    groups = (2,) if grouped else ()
    count += 3
    activations = normal(*groups, count, d_in)
    derivatives = normal(*groups, count, d_out, seed=1)
    gradient = normal(*groups, d_out, d_in, seed=2)
    alone = precondition_layer(activations, derivatives, damping=0.01, split="pi")
    # Unequal shards in any order: 1, 2, ... and what is left, the last one first.
    sizes = [*range(1, parts), count - sum(range(1, parts))]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    shards = order.split(sizes)[::-1]

    together = precondition_layer(
        torch.cat([activations[..., shard, :] for shard in shards], -2),
        torch.cat([derivatives[..., shard, :] for shard in shards], -2),
        damping=0.01,
        split="pi",
    )

    assert relative_error(together.apply(gradient), alone.apply(gradient)) < 1e-10
