"""`invert_factor` against the dense inverse it replaces."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from skfac.curvature.inverse import (
    DenseInverse,
    FactorInverse,
    LowRankInverse,
    invert_factor,
)
from tests.support.dense import dense_inverse, factor, normal, relative_error

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # C++ has it

EXACT = 1e-10
DAMPINGS = [1e-4, 1e-2, 1.0, 10.0]
ROWS = {
    "n<d": normal(4, 9),
    "n=d-1": normal(8, 9),
    "n=d": normal(6, 6),
    "n>d": normal(12, 5),
    "n=1": normal(1, 7),
    "n=d=1": normal(1, 1),
    "n>d=1": normal(3, 1),
    "duplicate rows, n<d": normal(2, 9).repeat(3, 1),
    "duplicate rows, n>d": normal(2, 5).repeat(4, 1),
    "one zero row": torch.cat([normal(3, 8), torch.zeros(1, 8)]),
    "zero rows, n<d": torch.zeros(3, 5, dtype=torch.float64),
    "zero rows, n>d": torch.zeros(5, 3, dtype=torch.float64),
    "scales apart": normal(4, 8) * torch.logspace(-3, 0, 8, dtype=torch.float64),
    "strided": normal(9, 4).T,
}
SHAPES = pytest.mark.parametrize("rows", [ROWS["n<d"], ROWS["n>d"]], ids=["n<d", "n>d"])


def explicit(inverse: FactorInverse) -> Tensor:
    return inverse.left(torch.eye(inverse.dim, dtype=torch.float64))


def assert_inverts(rows: Tensor, damping: float) -> None:
    expected = dense_inverse(rows, damping)
    columns, more_rows = normal(rows.shape[1], 3, seed=1), normal(2, rows.shape[1])

    inverse = invert_factor(rows, damping=damping)

    assert relative_error(explicit(inverse), expected) < EXACT
    assert relative_error(inverse.left(columns), expected @ columns) < EXACT
    assert relative_error(inverse.right(more_rows), more_rows @ expected) < EXACT
    assert inverse.damping == damping
    assert inverse.dim == rows.shape[1]


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_equals_the_dense_inverse(rows, damping):
    assert_inverts(rows, damping)


@given(
    count=st.integers(1, 10),
    dim=st.integers(1, 10),
    exponent=st.floats(-4, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_the_dense_inverse_of_any_rows(count, dim, exponent, seed):
    assert_inverts(normal(count, dim, seed=seed), 10**exponent)


@given(
    count=st.integers(1, 10),
    dim=st.integers(1, 10),
    exponent=st.floats(-4, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_eigenvalues_lie_between_the_damped_extremes(count, dim, exponent, seed):
    rows, damping = normal(count, dim, seed=seed), 10**exponent
    largest = float(torch.linalg.eigvalsh(factor(rows))[-1])

    matrix = explicit(invert_factor(rows, damping=damping))
    eigenvalues = torch.linalg.eigvalsh(matrix)

    torch.testing.assert_close(matrix, matrix.T, rtol=1e-12, atol=1e-12 / damping)
    assert eigenvalues[0] > (1 - 1e-9) / (damping + largest)
    assert eigenvalues[-1] < (1 + 1e-9) / damping


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_float32_error_in_the_span_is_eps_times_condition(rows, damping):
    rows = rows.float()
    exact = rows.double()
    condition = 1 + float(torch.linalg.eigvalsh(factor(exact))[-1]) / damping

    # The rows span the factor, and there the inverse is smallest.
    actual = invert_factor(rows, damping=damping).right(rows).double()

    expected = exact @ dense_inverse(exact, damping)
    bound = 4 * torch.finfo(torch.float32).eps * condition
    assert (actual - expected).norm() <= bound * expected.norm()


@SHAPES
def test_float32_rows_are_inverted_in_float64(rows):
    rows = rows.float()

    single = invert_factor(rows, damping=1e-3)
    double = invert_factor(rows.double(), damping=1e-3)

    assert torch.equal(single.tensor, double.tensor.float())


@pytest.mark.parametrize(("count", "dim"), [(1, 2), (4, 9), (8, 9)])
def test_fewer_rows_than_columns_need_no_square_matrix(count, dim):
    inverse = invert_factor(normal(count, dim), damping=1.0)

    assert isinstance(inverse, LowRankInverse)
    assert inverse.basis.shape == (count, dim)


@pytest.mark.parametrize(("count", "dim"), [(1, 1), (6, 6), (12, 5), (3, 0)])
def test_enough_rows_give_the_explicit_inverse(count, dim):
    inverse = invert_factor(normal(count, dim), damping=1.0)

    assert isinstance(inverse, DenseInverse)
    assert inverse.matrix.shape == (dim, dim)


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_result_has_the_dtype_of_the_rows(dtype, rows):
    inverse = invert_factor(rows.to(dtype), damping=1.0)

    assert inverse.left(normal(inverse.dim, 2).to(dtype)).dtype is dtype
    assert inverse.right(normal(2, inverse.dim).to(dtype)).dtype is dtype


@SHAPES
def test_arguments_are_not_modified(rows):
    given_rows, square = rows.clone(), normal(rows.shape[1], rows.shape[1])
    given_square = square.clone()

    inverse = invert_factor(given_rows, damping=1.0)
    first = inverse.left(given_square), inverse.right(given_square)
    second = inverse.left(given_square), inverse.right(given_square)

    assert torch.equal(given_rows, rows)
    assert torch.equal(given_square, square)
    assert all(map(torch.equal, first, second))


@SHAPES
def test_with_tensor_is_the_same_inverse_in_another_tensor(rows):
    inverse = invert_factor(rows, damping=0.5)
    copy = inverse.tensor.clone()

    moved = inverse.with_tensor(copy)

    assert moved.tensor is copy
    assert moved.damping == inverse.damping
    assert torch.equal(explicit(moved), explicit(inverse))


@SHAPES
@pytest.mark.parametrize("damping", [0.0, -1e-3, -math.inf, math.nan])
def test_rejects_damping_that_is_not_positive(damping, rows):
    with pytest.raises(ValueError, match=f"damping must be positive, got {damping}"):
        invert_factor(rows, damping=damping)


def test_rejects_an_empty_snapshot():
    with pytest.raises(ValueError, match=r"at least one row, got shape \(0, 3\)"):
        invert_factor(torch.zeros(0, 3), damping=1.0)


@pytest.mark.parametrize("shape", [(1, 3), (3, 1)])
def test_rejects_a_condition_that_float32_cannot_hold(shape):
    rows = torch.full(shape, 1e3)

    with pytest.raises(LinAlgError, match=r"condition 3e\+06; torch\.float32"):
        invert_factor(rows, damping=rows.square().sum().item() / 3e6 / shape[0])
    invert_factor(rows.double(), damping=1.0)


@pytest.mark.parametrize("shape", [(1, 3), (3, 1)])
def test_rejects_a_condition_that_float64_cannot_hold(shape):
    rows = torch.full(shape, 1e8, dtype=torch.float64)

    with pytest.raises(LinAlgError, match=r"torch\.float64 holds at most"):
        invert_factor(rows, damping=1.0)


@given(count=st.integers(1, 6), dim=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_an_accepted_float32_inverse_is_positive_definite(count, dim, seed):
    rows = normal(count, dim, seed=seed)
    # Largest eigenvalue 3e5 times the damping: near the limit, yet within it.
    scale = (3e5 / torch.linalg.eigvalsh(factor(rows))[-1]) ** 0.5
    inverse = invert_factor((rows * scale).float(), damping=1.0)

    if isinstance(inverse, LowRankInverse):
        matrix = torch.eye(dim) - (inverse.basis.T.double() @ inverse.basis.double())
    else:
        assert isinstance(inverse, DenseInverse)
        matrix = inverse.matrix.double()
    assert torch.linalg.eigvalsh(matrix)[0] > 0


@SHAPES
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rejects_rows_that_are_not_finite(bad, rows):
    broken = rows.clone()
    broken[1, 2] = bad

    with pytest.raises(LinAlgError, match=r"has condition (nan|inf); torch\.float64"):
        invert_factor(broken, damping=1.0)
