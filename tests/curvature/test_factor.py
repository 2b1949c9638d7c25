"""`Moment`: exact until it is compressed, and then no trace is lost."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from skfac.curvature.factor import Moment, add_moments, moment_of
from tests.support.dense import normal, relative_error
from tests.support.values import same_bits
from tests.support.weighted import (
    diagonal_factor,
    kept_matrix,
    trace_of,
    weighted_mean,
    whole_factor,
)

EXACT = 1e-12
SHAPES = pytest.mark.parametrize(
    "shape", [(4, 9), (9, 9), (12, 5), (1, 1), (3, 2, 7), (2, 9, 4), (1, 3, 3)]
)
seeds = st.integers(0, 2**32 - 1)


def rows_of(*shape: int, seed: int = 0) -> Tensor:
    """Rows of a spectrum that falls by a factor of 100, turned at random."""
    spectrum = torch.logspace(0, -1, shape[-1], dtype=torch.float64)
    turn = torch.linalg.qr(normal(shape[-1], shape[-1], seed=99))[0]
    return (normal(*shape, seed=seed) * spectrum) @ turn


def moment(*shape: int, seed: int = 0) -> Moment:
    return moment_of(rows_of(*shape, seed=seed), count=shape[-2])


@pytest.fixture
def no_decomposition(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("decomposed for nothing")

    for name in ("eigh", "svd", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, refuse)


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moment_of_rows_is_their_factor(shape, dtype):
    rows = rows_of(*shape).to(dtype)

    taken = moment_of(rows, count=shape[-2])

    form = "rows" if shape[-2] < shape[-1] else "dense"  # whichever is smaller
    assert taken.tensor.dtype is torch.float64
    assert relative_error(kept_matrix(taken), whole_factor(rows.double())) < EXACT
    assert (taken.form, taken.dropped, taken.dim) == (form, 0.0, shape[-1])


def test_a_moment_keeps_nothing_of_its_callers_rows():
    rows = normal(3, 5)
    taken = moment_of(rows, count=3)
    before = kept_matrix(taken)

    rows.zero_()

    assert same_bits(kept_matrix(taken), before)


@SHAPES
def test_the_square_has_the_nonzero_eigenvalues(shape):
    taken = moment(*shape)

    size = min(shape[-2:])
    assert taken.square.shape == (*shape[:-2], size, size)
    again = replace(taken)  # without what was worked out at once
    torch.testing.assert_close(again.square, taken.square, rtol=EXACT, atol=EXACT)
    values = torch.linalg.eigvalsh(taken.square).flatten() / taken.weight
    whole = torch.linalg.eigvalsh(whole_factor(rows_of(*shape)))
    largest = whole.sort().values[-len(values) :]
    torch.testing.assert_close(values.sort().values, largest, rtol=1e-9, atol=EXACT)


@SHAPES
def test_mean_eigenvalue_is_that_of_all_blocks(shape):
    taken = moment(*shape)
    eigenvalues = torch.linalg.eigvalsh(whole_factor(rows_of(*shape)))

    expected = pytest.approx(float(eigenvalues.mean()), rel=EXACT)

    assert taken.mean_eigenvalue == expected
    assert taken.mean_eigenvalue == expected
    assert taken.scaled(0.3).mean_eigenvalue == expected
    assert taken.compressed(rank=1).mean_eigenvalue == expected


def test_mean_eigenvalue_of_an_empty_factor_is_zero():
    empty = moment_of(torch.zeros(3, 0), count=3)

    assert (empty.mean_eigenvalue, empty.mean_dropped) == (0.0, 0.0)


@pytest.mark.parametrize("stored", [0, 1, 2, 9])
def test_a_diagonal_needs_not_one_row_per_example(stored):
    rows = normal(stored, 6).float() if stored else torch.zeros(0, 6)
    expected = torch.zeros(6, 6, dtype=torch.float64)
    if stored:
        expected = diagonal_factor(rows.double(), 4)

    taken = moment_of(rows, count=4, diagonal=True)

    assert (taken.form, taken.tensor.shape) == ("diagonal", (1, 6))
    torch.testing.assert_close(kept_matrix(taken), expected)
    assert taken.mean_eigenvalue == pytest.approx(float(expected.trace()) / 6)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_rejects_rows_that_are_not_finite(bad, diagonal):
    rows = normal(3, 4)
    rows[1, 2] = bad

    with pytest.raises(ValueError, match=r"must be finite; .* is (nan|inf)"):
        moment_of(rows, count=3, diagonal=diagonal)


def test_rejects_no_examples():
    with pytest.raises(ValueError, match=r"at least one row, got shape \(0, 3\)"):
        moment_of(torch.zeros(0, 3), count=0)


@SHAPES
@pytest.mark.parametrize("form", ["rows", "dense", "diagonal"])
def test_scaled_changes_the_weight_and_not_the_factor(form, shape):
    taken = Moment("rows", rows_of(*shape), float(shape[-2]), dropped=0.5)
    if form == "dense":
        taken = replace(moment(*shape[:-2], 20, shape[-1]), dropped=0.5)
    if form == "diagonal":
        taken = moment_of(rows_of(4, shape[-1]), count=4, diagonal=True)

    less = taken.scaled(0.25)

    assert taken.form == less.form == form
    assert less.weight == 0.25 * taken.weight
    assert less.mean_dropped == pytest.approx(taken.mean_dropped, rel=EXACT)
    torch.testing.assert_close(kept_matrix(less), kept_matrix(taken))


@pytest.mark.parametrize("groups", [(), (1,), (3,)])
@pytest.mark.parametrize(
    "counts", [(2, 3), (2, 3, 1, 2), (5, 4), (12, 1), (1, 12), (10, 11)]
)
def test_sum_is_the_weighted_mean(counts, groups):
    updates = [rows_of(*groups, n, 9, seed=n) for n in counts]
    weights = [0.1 * (j + 1) for j in range(len(counts))]
    moments = [
        moment_of(rows, count=n).scaled(w / n)
        for rows, n, w in zip(updates, counts, weights, strict=True)
    ]

    total = add_moments(*moments)

    factors = map(whole_factor, updates)
    expected = weighted_mean(factors, [w / sum(weights) for w in weights])
    assert relative_error(kept_matrix(total), expected) < EXACT
    assert total.form == ("rows" if sum(counts) < 9 else "dense")
    assert total.weight == pytest.approx(sum(weights))


def test_sum_keeps_what_each_had_dropped():
    parts = [moment(6, 9, seed=j).compressed(rank=2) for j in range(3)]

    total = add_moments(*parts)

    assert total.dropped == pytest.approx(sum(part.dropped for part in parts))
    mean = sum(map(trace_of, parts)) / 3
    assert trace_of(total) == pytest.approx(mean)


def test_sum_of_diagonals_is_one_diagonal():
    updates = [normal(m, 5, seed=m) for m in (2, 3)]

    total = add_moments(*(moment_of(rows, count=2, diagonal=True) for rows in updates))

    expected = (diagonal_factor(updates[0], 2) + diagonal_factor(updates[1], 2)) / 2
    assert (total.form, total.tensor.shape) == ("diagonal", (1, 5))
    torch.testing.assert_close(kept_matrix(total), expected)


def test_a_single_moment_is_its_own_sum():
    taken = moment(12, 5)

    assert add_moments(taken) is taken


@SHAPES
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("tall", [False, True])
def test_compressed_keeps_the_leading_directions(shape, rank, tall):
    rows = rows_of(*shape)
    # As many rows as columns or more are nothing that is made, but may be received.
    taken = Moment("rows", rows, float(shape[-2])) if tall else moment(*shape)

    small = taken.compressed(rank=rank)

    groups = rows if rows.ndim == 3 else rows[None]
    expected = torch.block_diag(*(leading_part(group, rank) for group in groups))
    assert small.tensor.shape[-2] <= max(rank, 1)
    assert relative_error(kept_matrix(small), expected) < 1e-10
    assert trace_of(small) == pytest.approx(trace_of(taken), rel=EXACT)


def leading_part(rows: Tensor, rank: int) -> Tensor:
    """The best approximation of one block in `rank` directions."""
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    part = (left * values)[:, :rank] @ right[:rank]
    return part.T @ part / len(rows)


@given(
    groups=st.integers(1, 3),
    count=st.integers(1, 12),
    dim=st.integers(1, 9),
    rank=st.one_of(st.none(), st.integers(1, 12)),
    energy=st.floats(0.01, 1),
    tall=st.booleans(),
    seed=seeds,
)
def test_compressed_holds_the_energy_in_the_fewest_directions(
    groups, count, dim, rank, energy, tall, seed
):
    taken = moment(groups, count, dim, seed=seed)
    if tall:
        taken = Moment("rows", rows_of(groups, count, dim, seed=seed), float(count))
    values = torch.linalg.eigvalsh(taken.tensor.mT @ taken.tensor)
    if taken.form == "dense":
        values = torch.linalg.eigvalsh(taken.tensor)
    held = [0.0, *values.flip(-1).sum(0).cumsum(0)]
    most = min(count, dim, rank or dim)

    small = taken.compressed(rank=rank, energy=energy)

    directions = min(small.tensor.shape[-2], dim)
    total = float(values.sum())
    assert 1 <= directions <= most
    assert directions == most or held[directions] >= (energy - 1e-9) * total
    assert held[directions - 1] <= (energy + 1e-9) * total
    assert trace_of(small) == pytest.approx(trace_of(taken), rel=EXACT)
    assert small.dropped >= 0


def test_energy_counts_what_was_dropped_before():
    eight = moment_of(torch.eye(8, dtype=torch.float64), count=8).compressed(rank=4)

    # The four that are left have half the trace, so that 0.375 of it is three of them.
    assert eight.compressed(rank=None, energy=0.374).tensor.shape == (3, 8)
    assert eight.compressed(rank=None, energy=0.9).tensor.shape == (4, 8)
    assert eight.compressed(rank=None, energy=0.9).dropped == eight.dropped


def test_rows_of_zeros_are_one_direction_of_any_energy():
    zeros = moment_of(torch.zeros(3, 5), count=3)

    small = zeros.compressed(rank=None, energy=0.5)

    assert small.tensor.shape == (1, 5)
    assert small.dropped == 0


@pytest.mark.usefixtures("no_decomposition")
@SHAPES
@pytest.mark.parametrize("spare", [0, 1, None])
def test_nothing_is_decomposed_where_nothing_can_be_cut(shape, spare):
    taken = moment(*shape)
    rank = None if spare is None else min(shape[-2:]) + spare

    assert taken.compressed(rank=rank) is taken
    dense = moment(*shape[:-2], 20, shape[-1])
    assert dense.compressed(rank=None if rank is None else shape[-1]) is dense


@pytest.mark.usefixtures("no_decomposition")
def test_a_diagonal_is_never_cut():
    diagonal = moment_of(normal(3, 5), count=3, diagonal=True)

    assert diagonal.compressed(rank=1, energy=0.1) is diagonal


@pytest.mark.parametrize("seed", range(12))
def test_cutting_nothing_but_rounding_drops_nothing_below_zero(seed):
    doubled = normal(2, 9, seed=seed).repeat(3, 1)

    small = moment_of(doubled, count=6).compressed(rank=2)

    assert 0 <= small.dropped < 1e-12 * float(doubled.square().sum())
