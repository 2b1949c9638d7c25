"""A task becomes a version with the bits of `precondition_layer`, or a loss."""

import pytest
import torch
from torch import Tensor

from skfac.curvature.layer import (
    LayerPreconditioner,
    precondition_layer,
)
from skfac.curvature.settings import CurvatureSettings
from skfac.service.scheduler import Task
from skfac.service.solver import ATTEMPTS, DAMPING_GROWTH, Solver
from skfac.wire.outcome import Loss, Version
from skfac.wire.session import SessionSpec
from skfac.wire.snapshot import LayerRows, Snapshot
from tests.support.tasks import solved
from tests.support.values import (
    assembly_of,
    assert_same_preconditioner,
    layer_spec,
    same_bits,
    session_spec,
    snapshot,
    task_of,
)

SPLITS = pytest.mark.parametrize("split", ["pi", "equal"])


def task_with(activations: Tensor, derivatives: Tensor, damping: float) -> Task:
    spec = session_spec(layer_spec("fc", activations.shape[1], derivatives.shape[1]))
    rows = LayerRows(0, activations, derivatives)
    sent = Snapshot(0, 7, CurvatureSettings(damping=damping), (rows,))
    return Task("job", spec, assembly_of([sent]), queued_s=0.0)


def version_of(task: Task, solver: Solver | None = None) -> Version:
    outcome = solved(task, solver).outcome
    assert isinstance(outcome, Version)
    return outcome


def ranks_task(spec: SessionSpec, order: list[int], counts: list[int]) -> Task:
    sent = [
        snapshot(spec, 3, rank, count=counts[rank], damping=1.0 + rank)
        for rank in order
    ]
    return Task("job", spec, assembly_of(sent), queued_s=0.0)


@SPLITS
@pytest.mark.parametrize("count", [1, 2, 9])
def test_the_bits_are_those_of_precondition_layer(count, split):
    spec = session_spec(layer_spec(d_in=6, d_out=4), damping_split=split)
    task = task_of(spec, 5, count=count)
    rows = task.assembly.rows[0]

    solution = solved(task)

    version = solution.outcome
    assert isinstance(version, Version)
    assert (version.layer, version.step, version.rows, version.ranks) == (
        0,
        5,
        count,
        1,
    )
    assert solution.retries == 0
    expected = precondition_layer(
        rows.activations, rows.derivatives, damping=0.5, split=split
    )
    assert_same_preconditioner(version.preconditioner, expected)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0]])
def test_rows_are_stacked_in_the_order_of_the_ranks(order):
    spec = session_spec(layer_spec(d_in=20), world_size=3)
    task = ranks_task(spec, order, [2, 0, 3])
    rows = [task.assembly.rows[rank] for rank in range(3)]

    version = version_of(task)

    assert (version.rows, version.ranks) == (5, 3)
    expected = precondition_layer(
        torch.cat([r.activations for r in rows]),
        torch.cat([r.derivatives for r in rows]),
        damping=1.0,
        split="pi",
    )
    assert_same_preconditioner(version.preconditioner, expected)


def test_without_rank_0_the_lowest_rank_says_the_damping():
    spec = session_spec(world_size=3)

    late = version_of(ranks_task(spec, [2, 1], [4, 4, 4]))

    both = late.preconditioner.activations, late.preconditioner.derivatives
    assert both[0].damping * both[1].damping == pytest.approx(2.0)
    assert (late.rows, late.ranks) == (8, 2)


@pytest.mark.parametrize("counts", [[0], [0, 0]])
def test_no_rows_are_a_loss(counts):
    spec = session_spec(layer_spec("encoder.0"), world_size=len(counts))

    solution = solved(ranks_task(spec, list(range(len(counts))), counts))

    text = "No rank had rows of layer 'encoder.0' at step 3."
    assert solution.outcome == Loss(0, 3, "empty", text)
    assert solution.retries == 0


@pytest.mark.parametrize("retries", [1, 2, 3])
def test_a_bad_condition_is_helped_by_ten_times_the_damping(retries):
    # The condition is 10⁴ / √λ and float32 holds 8.4 · 10⁵: λ ≥ 1.4 · 10⁻⁴.
    rows, damping = torch.full((1, 3), 100 / 3**0.5), 5e-4 * 10.0**-retries
    task = task_with(rows, rows, damping)

    solution = solved(task)

    assert solution.retries == retries
    assert isinstance(solution.outcome, Version)
    assert solution.outcome.damping_factor == DAMPING_GROWTH**retries
    expected = precondition_layer(
        rows, rows, damping=damping * DAMPING_GROWTH**retries, split="pi"
    )
    assert_finite_and_near(solution.outcome.preconditioner, expected)


def assert_finite_and_near(
    actual: LayerPreconditioner, expected: LayerPreconditioner
) -> None:
    for mine, theirs in zip(actual.tensors, expected.tensors, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs)
    damping = expected.activations.damping
    assert actual.activations.damping == pytest.approx(damping, rel=1e-12)


def test_what_cannot_be_helped_is_a_loss_that_names_layer_and_step():
    rows = torch.full((1, 3), 1e6)

    solution = solved(task_with(rows, rows, 1e-6))

    assert isinstance(solution.outcome, Loss)
    assert (solution.outcome.layer, solution.outcome.step) == (0, 7)
    assert solution.outcome.reason == "failed"
    assert solution.outcome.message.startswith(
        "Layer 'fc' at step 7 was not inverted: A factor with eigenvalues up to 3e+12"
    )
    assert solution.retries == ATTEMPTS - 1


def test_an_inverse_that_would_not_be_finite_is_tried_again():
    zeros = torch.zeros(2, 3)  # each factor has the damping √λ, and the inverse 1/√λ

    solution = solved(task_with(zeros, zeros, 1e-79))

    assert solution.retries == 2
    assert isinstance(solution.outcome, Version)
    assert all(t.isfinite().all() for t in solution.outcome.preconditioner.tensors)


def test_rows_too_large_to_square_are_a_loss():
    rows = torch.full((2, 3), 1e200, dtype=torch.float64)

    solution = solved(task_with(rows, torch.ones_like(rows), 1.0))

    assert isinstance(solution.outcome, Loss)


def test_the_result_does_not_depend_on_what_was_solved_before():
    solver, spec = Solver("cpu"), session_spec(layer_spec(d_in=9, d_out=7))
    alone = version_of(task_of(spec, 4)).preconditioner

    for step in range(4):
        solved(task_of(spec, step, count=step + 1), solver)
    solved(task_with(torch.full((1, 3), 1e6), torch.ones(1, 2), 1e-6), solver)

    assert_same_preconditioner(
        version_of(task_of(spec, 4), solver).preconditioner, alone
    )


def test_rows_are_not_modified():
    task = task_of(session_spec())
    rows = task.assembly.rows[0]
    before = rows.activations.clone(), rows.derivatives.clone()

    solved(task)

    assert same_bits(rows.activations, before[0])
    assert same_bits(rows.derivatives, before[1])
