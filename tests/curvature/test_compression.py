"""What compressing a history costs: no trace, and an error within a known bound."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from skfac.curvature.history import LayerHistory
from skfac.curvature.inverse import LowRankInverse
from tests.support.dense import normal, relative_error
from tests.support.weighted import (
    DAMPING,
    EXACT,
    Run,
    assert_preconditions,
    blocks_of,
    dense_preconditioned,
    kept_matrix,
    run_of,
    settings,
    spectral_rows,
    split_pi,
    trace_of,
    update_weights,
    weighted_mean,
    whole_factor,
)

GROUPS = pytest.mark.parametrize("groups", [1, 3], ids=["whole", "grouped"])
HISTORIES = pytest.mark.parametrize("history", ["snapshot", "window", "ema"])


def simulated(
    ranks: list[int | None], counts: list[int], *, groups: int = 1, decay: float = 0.8
) -> Run:
    """A compressed history; after each update its error is within the bound."""
    run = run_of("ema", groups=groups)
    for rank, count in zip(ranks, counts, strict=True):
        run.fold(count, rank=rank, decay=decay)
        sides = run.history.activations + run.history.derivatives
        for moment, exact in zip(sides, run.exact(), strict=True):
            assert_bounded(moment, exact)
            assert rank is None or moment.form == "dense" or fits(moment, rank)
    return run


def fits(moment: Any, rank: int) -> bool:
    return moment.tensor.shape[-2] <= rank


def assert_bounded(moment: Any, exact: Tensor) -> None:
    """`‖Â - A‖₂ <= max(‖Δ‖₂, tr Δ / d)`, and Δ is what the moment says it dropped."""
    lost = exact - kept_matrix(moment)
    size, norm = len(exact), float(torch.linalg.matrix_norm(exact, 2))
    eigenvalues = torch.linalg.eigvalsh(lost)
    damped = kept_matrix(moment)
    damped += moment.mean_dropped * torch.eye(size, dtype=torch.float64)
    error = float(torch.linalg.matrix_norm(damped - exact, 2))
    assert float(eigenvalues[0]) > -1e-12 * norm
    assert float(lost.trace()) == pytest.approx(
        moment.dropped / moment.weight, abs=1e-12 * norm * size
    )
    assert moment.mean_dropped * size == pytest.approx(
        moment.dropped / moment.weight, rel=1e-12
    )
    bound = max(float(eigenvalues[-1]), moment.mean_dropped)
    assert error <= bound + 1e-12 * norm
    assert trace_of(moment) == pytest.approx(float(exact.trace()), rel=1e-12)


RANKS: dict[str, list[int | None]] = {
    "constant": [4] * 8,
    "one": [1] * 8,
    "shrinking": [9, 8, 6, 5, 4, 3, 2, 1],
    "growing": [1, 2, 3, 4, 5, 6, 8, 9],
    "shrinking from dense": [None, None, None, None, 5, 3, 3, 2],
    "growing to dense": [2, 2, 3, None, None, None, None, None],
    "dense and back": [3, 3, None, None, None, 20, 4, 4],
    "above d": [20] * 8,
}


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("count", [1, 3, 9])
@GROUPS
def test_compressed_ema_keeps_the_trace_and_the_bound(ranks, count, groups):
    simulated(ranks, [count] * len(ranks), groups=groups)


@given(
    ranks=st.lists(st.one_of(st.none(), st.integers(1, 14)), min_size=1, max_size=7),
    data=st.data(),
    groups=st.sampled_from([1, 2]),
    decay=st.floats(0, 0.99),
)
def test_any_compressed_ema_keeps_the_trace_and_the_bound(ranks, data, groups, decay):
    size = len(ranks)
    counts = data.draw(st.lists(st.integers(1, 14), min_size=size, max_size=size))

    simulated(ranks, counts, groups=groups, decay=decay)


@pytest.mark.parametrize("cap", [11, 20, None])
def test_without_a_cap_below_d_the_matrix_is_exact_from_then_on(cap):
    run, forms = run_of("ema"), []

    for _ in range(5):
        run.fold(4, rank=cap)
        forms.append(run.history.activations[0].form)
        assert_preconditions(run.precondition(), run, run.exact())

    assert forms == ["rows", "rows", "dense", "dense", "dense"]
    assert run.history.activations[0].dropped == 0


def test_what_was_dropped_decays_when_the_cap_is_lifted():
    run = simulated([2, 2], [6, 6])
    before = run.history.activations[0]

    run.fold(6, rank=None, decay=0.5)

    after = run.history.activations[0]
    assert before.dropped > 0
    assert after.dropped == pytest.approx(before.dropped / 2)
    assert after.form == "rows"


@GROUPS
def test_rank_and_energy_of_a_result_leave_the_history_alone(groups):
    run = run_of("ema", groups=groups)
    for _ in range(4):
        run.fold(4)
    before = run.history.activations[0].tensor.clone()

    cut = run.precondition(rank=3, energy=0.9)

    assert cut.activations.tensor.shape[-2] <= 3
    assert torch.equal(run.history.activations[0].tensor, before)
    assert_preconditions(run.precondition(), run, run.exact())


@HISTORIES
@pytest.mark.parametrize("count", [3, 4, 13])
@pytest.mark.parametrize(("rank", "energy"), [(2, 1.0), (None, 0.6), (3, 0.99)])
@GROUPS
def test_a_cut_result_has_the_leading_part_and_the_rest_as_damping(
    history, count, rank, energy, groups
):
    run = run_of(history, groups=groups)
    for _ in range(3):
        run.fold(count)
    exact = run.exact(1 if history == "snapshot" else None)

    layer = run.precondition(rank=rank, energy=energy)

    pairs = zip((layer.activations, layer.derivatives), exact, strict=True)
    for (inverse, matrix), share in zip(pairs, split_pi(*exact), strict=True):
        assert isinstance(inverse, LowRankInverse)
        expected, cut = leading_part(matrix, groups, inverse.basis.shape[-2])
        assert inverse.damping == pytest.approx(share + cut / len(matrix))
        expected += inverse.damping * torch.eye(len(matrix), dtype=torch.float64)
        found = inverse.left(inverse_of_identity(inverse, groups))
        whole = torch.block_diag(*found) if groups > 1 else found
        assert relative_error(whole, torch.linalg.inv(expected)) < EXACT
        kept = 1 - cut / float(matrix.trace())
        assert kept >= energy - 1e-9 or inverse.basis.shape[-2] == rank


def inverse_of_identity(inverse: LowRankInverse, groups: int) -> Tensor:
    identity = torch.eye(inverse.dim, dtype=torch.float64)
    return identity.expand(groups, -1, -1).contiguous() if groups > 1 else identity


def leading_part(matrix: Tensor, groups: int, rank: int) -> tuple[Tensor, float]:
    """Each block's part in its leading eigen-directions, and the trace of the rest."""
    parts = []
    for block in blocks_of(matrix, groups):
        values, vectors = torch.linalg.eigh(block)
        leading = vectors[:, -rank:] * values[-rank:].sqrt()
        parts.append(leading @ leading.T)
    whole = torch.block_diag(*parts)
    return whole, float((matrix - whole).trace())


@pytest.mark.parametrize("rank", [1, 3, 6])
@given(seed=st.integers(0, 1000), exponent=st.floats(-2, 1))
def test_eigenvalues_of_a_cut_inverse_lie_between_the_damped_extremes(
    rank, seed, exponent
):
    damping = 10**exponent
    chosen = settings(rank=rank)
    history = LayerHistory.empty("ema")
    rows = [spectral_rows(3, 9, seed=seed + j) for j in range(4)]
    for one in rows:
        history = history.fold(one, one, chosen)
    exact = weighted_mean(map(whole_factor, rows), update_weights([0.8] * 4))
    largest = float(torch.linalg.eigvalsh(exact)[-1])

    inverse = history.precondition(chosen, "equal", damping=damping).activations
    matrix = inverse.left(torch.eye(9, dtype=torch.float64))

    eigenvalues = torch.linalg.eigvalsh(matrix)
    torch.testing.assert_close(matrix, matrix.T)
    assert inverse.damping >= damping**0.5
    assert eigenvalues[-1] <= (1 + 1e-9) / damping**0.5
    assert eigenvalues[0] >= (1 - 1e-9) / (largest + inverse.damping)


def test_more_rank_brings_the_direction_closer_to_the_exact_one():
    d_in, gradient = 40, normal(20, 40)
    errors = []
    for rank in (2, 5, 10, 20, None):
        run = run_of("ema", d_in=d_in, d_out=20)
        for _ in range(12):
            run.fold(8, rank=rank)
        exact = dense_preconditioned(*run.exact(), gradient)
        applied = run.precondition(rank=rank).apply(gradient)
        errors.append(relative_error(applied, exact))

    assert all(more > less for more, less in itertools.pairwise(errors))
    # The step before the last keeps half of the directions, and is a percent off.
    assert errors[-1] < EXACT
    assert errors[-2] < 0.01 < 0.1 < errors[0] < 1


def test_the_dropped_trace_as_damping_beats_forgetting_it():
    run = run_of("ema", d_in=40, d_out=20)
    for _ in range(12):
        run.fold(8, rank=4)
    gradient = normal(20, 40)
    exact = dense_preconditioned(*run.exact(), gradient)

    damped = run.precondition(rank=4).apply(gradient)
    sides = run.history.activations, run.history.derivatives
    without = [(replace(moments[0], dropped=0.0),) for moments in sides]
    forgetful = replace(run.history, activations=without[0], derivatives=without[1])
    plain = forgetful.precondition(settings(), "pi", damping=DAMPING).apply(gradient)

    assert relative_error(damped, exact) < 0.8 * relative_error(plain, exact)
