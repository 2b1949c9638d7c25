"""`invert_factor` against the dense inverse it replaces."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from skfac.curvature.factor import Moment, moment_of
from skfac.curvature.inverse import (
    DenseInverse,
    DiagonalInverse,
    FactorInverse,
    LowRankInverse,
)
from skfac.curvature.invert import invert_factor, invert_moment
from tests.support.dense import dense_inverse, factor, normal, relative_error
from tests.support.weighted import diagonal_factor, kept_matrix

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


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_condition_counts_rows_that_are_alike(shape):
    # Eight equal eigenvalues would be within the limit; one of their sum is not.
    rows = torch.ones(shape)
    rows[0] = 0
    largest = float(torch.linalg.eigvalsh(factor(rows.double()))[-1])

    with pytest.raises(LinAlgError, match=r"torch\.float32 holds at most"):
        invert_factor(rows, damping=largest / 2e6)


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

    with pytest.raises(ValueError, match="must be finite"):
        invert_factor(broken, damping=1.0)


GROUPED = pytest.mark.parametrize(
    "shape", [(3, 4, 9), (2, 6, 6), (2, 12, 5), (1, 4, 9), (4, 1, 1)], ids=str
)


@GROUPED
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_grouped_rows_are_inverted_block_by_block(shape, damping):
    rows, columns = normal(*shape), normal(shape[0], shape[2], 3, seed=1)
    more_rows = normal(shape[0], 2, shape[2], seed=2)

    inverse = invert_factor(rows, damping=damping)
    left, right = inverse.left(columns), inverse.right(more_rows)

    for i, group in enumerate(rows):
        expected = dense_inverse(group, damping)
        assert relative_error(left[i], expected @ columns[i]) < EXACT
        assert relative_error(right[i], more_rows[i] @ expected) < EXACT
    assert isinstance(inverse, LowRankInverse if shape[1] < shape[2] else DenseInverse)
    assert inverse.dim == shape[2]
    assert inverse.tensor.is_contiguous()


@GROUPED
def test_arguments_of_grouped_inverses_are_not_modified(shape):
    rows, square = normal(*shape), normal(shape[0], shape[2], shape[2])
    before = square.clone()

    inverse = invert_factor(rows, damping=1.0)
    first = inverse.left(square), inverse.right(square)

    assert torch.equal(square, before)
    assert torch.equal(first[0], inverse.left(square))
    assert torch.equal(first[1], inverse.right(square))


def test_one_bad_group_refuses_all():
    rows = torch.ones(3, 2, 5)
    rows[1] = 1e4

    with pytest.raises(LinAlgError, match="has condition"):
        invert_factor(rows, damping=1.0)


@pytest.mark.parametrize("shape", [(4, 9), (12, 5), (3, 4, 9), (2, 12, 5)], ids=str)
def test_results_are_row_major(shape):
    inverse = invert_factor(normal(*shape), damping=1.0)

    assert inverse.tensor.is_contiguous()


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("stored", [1, 3, 8])
def test_a_diagonal_equals_the_dense_inverse(stored, damping):
    rows, columns, more_rows = normal(stored, 7), normal(7, 3), normal(2, 7)
    dense = diagonal_factor(rows, 4) + damping * torch.eye(7, dtype=torch.float64)
    expected = torch.linalg.inv(dense)

    moment = moment_of(rows, count=4, diagonal=True)
    inverse = invert_moment(moment, damping=damping, dtype=torch.float64)

    assert isinstance(inverse, DiagonalInverse)
    assert inverse.diagonal.shape == (1, 7)
    assert (inverse.dim, inverse.damping) == (7, damping)
    assert relative_error(inverse.left(columns), expected @ columns) < EXACT
    assert relative_error(inverse.right(more_rows), more_rows @ expected) < EXACT
    copy = inverse.tensor.clone()
    moved = inverse.with_tensor(copy)
    assert moved.tensor is copy
    assert torch.equal(explicit(moved), explicit(inverse))


def test_a_diagonal_of_any_condition_is_exact_in_float32():
    # Counts of rare and frequent words: each number is rounded on its own.
    rows = torch.tensor([[1e6, 1.0, 1e-6, 0.0]])

    moment = moment_of(rows, count=1, diagonal=True)
    inverse = invert_moment(moment, damping=1e-3, dtype=torch.float32)

    expected = 1 / (rows.double().square() + 1e-3)
    torch.testing.assert_close(inverse.tensor.double(), expected, rtol=1e-7, atol=0)
    assert inverse.tensor.dtype is torch.float32


@pytest.mark.parametrize("shape", [(8, 9), (12, 9), (2, 8, 9)], ids=str)
@pytest.mark.parametrize("weight", [1.0, 0.05])
def test_what_was_dropped_is_damping(weight, shape):
    moment = moment_of(normal(*shape), count=shape[-2])
    small = moment.compressed(rank=3).scaled(weight)

    inverse = invert_moment(small, damping=0.1, dtype=torch.float64)

    dim = kept_matrix(moment).shape[0]
    dropped = float((kept_matrix(moment) - kept_matrix(small)).trace()) / dim
    assert inverse.damping == pytest.approx(0.1 + dropped)
    identity = torch.eye(dim, dtype=torch.float64)
    exact = kept_matrix(small) + inverse.damping * identity
    found = inverse.left(torch.eye(9, dtype=torch.float64).expand(*shape[:-2], 9, 9))
    whole = torch.block_diag(*found) if found.ndim == 3 else found
    assert relative_error(whole, torch.linalg.inv(exact)) < EXACT
    # The mean eigenvalue under damping is what it was.
    assert float(exact.trace()) / dim == pytest.approx(moment.mean_eigenvalue + 0.1)


def test_rows_are_inverted_like_their_matrix_however_many_there_are():
    rows = normal(12, 5)
    matrix = moment_of(rows, count=12)
    kept = matrix.tensor.clone()

    found = [
        invert_moment(moment, damping=0.1, dtype=torch.float64)
        for moment in (matrix, Moment("rows", rows, 12.0))
    ]

    assert [type(inverse) for inverse in found] == [DenseInverse, LowRankInverse]
    assert relative_error(explicit(found[1]), explicit(found[0])) < EXACT
    assert torch.equal(kept, matrix.tensor)


@pytest.mark.parametrize("damping", [0.0, -1.0, math.nan])
@pytest.mark.parametrize("diagonal", [True, False])
def test_rejects_damping_of_a_moment(diagonal, damping):
    moment = moment_of(normal(9, 4), count=9, diagonal=diagonal)

    with pytest.raises(ValueError, match=f"damping must be positive, got {damping}"):
        invert_moment(moment, damping=damping, dtype=torch.float64)


@pytest.mark.parametrize(("rows", "form"), [(4, LowRankInverse), (20, DenseInverse)])
def test_a_column_of_ones_need_not_be_in_memory(rows, form):
    inverse = invert_factor(with_ones(normal(rows, 8)), damping=0.1)
    assert isinstance(inverse, form)
    check_ones(inverse, normal(5, 8))


def with_ones(matrix):
    return torch.cat([matrix, matrix.new_ones(len(matrix), 1)], 1)


def check_ones(inverse, matrix) -> None:
    first, last = inverse.right_of_ones(matrix)
    expected = inverse.right(with_ones(matrix))
    torch.testing.assert_close(first, expected[:, :-1])
    torch.testing.assert_close(last, expected[:, -1])


def test_many_large_eigenvalues_are_no_bad_condition():
    # Their sum over the damping is 3 · 10⁶, each 4 · 10⁵; float32 holds 8.4 · 10⁵.
    rows = torch.eye(8, 20) * (8 * 4e5) ** 0.5

    inverse = invert_factor(rows, damping=1.0)

    expected = dense_inverse(rows.double(), 1.0)
    actual = inverse.left(torch.eye(20))
    torch.testing.assert_close(actual.double(), expected, rtol=0.1, atol=1e-6)
